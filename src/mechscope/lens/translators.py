"""The tuned lens: for every place an affine map to the end of the residual stream, put before the logit lens.

    lens(x) = unembed(norm(x + A x + b))

Trained so that it says what the model will say in the end (Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens",
§3), it corrects for the drift of representations from layer to layer; with A = 0 and b = 0 it is the logit lens. The stream after the last block needs
no map. A map may act in a subspace only: what one head writes has d_head dimensions, and A is held as (d_model, d_head) times a basis of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import ModelError, RunError, SettingsError
from mechscope.lens.places import LensPlace
from mechscope.shapes import by_shape
from mechscope.store.tables import read_tensors, write_tensors
from mechscope.subject import Subject

log = logging.getLogger(__name__)

_KIND = "mechscope translators"


@dataclass(frozen=True)
class Translator:
    """An affine map x + A x + b.

    Attributes:
        weight: ``(d_model, features)``: A, or what it does to the coordinates in the basis.
        bias: ``(d_model)``: b.
        basis: ``(features, d_model)``: orthonormal rows that span what A acts on; None for everything.
    """

    weight: Float[Tensor, "d_model features"]
    bias: Float[Tensor, " d_model"]
    basis: Float[Tensor, "features d_model"] | None = None

    __repr__ = by_shape

    @classmethod
    def identity(cls, like: Float[Tensor, "some d_model"], basis: Float[Tensor, "features d_model"] | None = None) -> Translator:
        """Return a map that changes nothing, of the width and type of some rows."""
        width = like.shape[-1]
        return cls(like.new_zeros(width, width if basis is None else len(basis)), like.new_zeros(width), basis)

    def __call__(self, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """Return rows as they would stand at the end of the model, in the map's type."""
        rows = rows.to(self.weight)
        return rows + torch.addmm(self.bias, rows if self.basis is None else rows @ self.basis.T, self.weight.T)


@dataclass(frozen=True)
class Translators:
    """Trained maps of one model.

    Attributes:
        maps: By place.
        fingerprint: Of the model they were trained on.
        layers: Its number of layers.
        settings: How they were trained.
        other_model: Whether they may be used on another model of the same shape.
    """

    maps: Mapping[LensPlace, Translator]
    fingerprint: str
    layers: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    other_model: bool = False

    __repr__ = by_shape

    @property
    def width(self) -> int:
        """The model's d_model."""
        return next(len(translator.bias) for translator in self.maps.values())

    def translated(self, place: LensPlace, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """Return a place's rows as they would stand at the end of the residual stream.

        Raises:
            SettingsError: There is no map for the place.
        """
        if place == LensPlace("residual", self.layers - 1):
            return rows
        translator = self.maps.get(place)
        if translator is None:
            raise SettingsError(f"there is no translator for {place.component}: the trained ones are {self._held()}")
        return translator(rows).to(rows)

    def check(self, subject: Subject, places: Iterable[LensPlace] = ()) -> None:
        """Refuse a model that the maps do not belong to.

        Args:
            subject: The model.
            places: What is to be read.

        Raises:
            ModelError: The maps are another model's, and `other_model` is not set; or they do not fit its shape.
            SettingsError: There is no map for a place.
        """
        anatomy = subject.anatomy
        if (self.layers, self.width) != (anatomy.n_layers, anatomy.d_model):
            raise ModelError(
                f"the translators are of a model with {self.layers} layers of width {self.width}, {subject.source!r} has {anatomy.n_layers} of "
                f"{anatomy.d_model}: train some for this model"
            )
        if self.fingerprint != subject.fingerprint:
            mismatch = (
                f"the translators were trained on a model with fingerprint {self.fingerprint[:12]}, {subject.source!r} has "
                f"{subject.fingerprint[:12]}"
            )
            if not self.other_model:
                raise ModelError(f"{mismatch}: train some for this model, or load them with other_model=True if that is meant")
            log.warning("%s: they are used on it as asked", mismatch, extra={"weakens": "lens_summary"})
        for place in places:
            if place not in self.maps and place != LensPlace("residual", self.layers - 1):
                raise SettingsError(f"there is no translator for {place.component}: the trained ones are {self._held()}")

    def save(self, path: Path | str) -> None:
        """Write the maps to a safetensors file, with the model's fingerprint and the settings in its header."""
        tensors: dict[str, Tensor] = {}
        places = []
        for place, translator in self.maps.items():
            places.append({"site": place.site, "layer": place.layer, "head": place.head})
            tensors |= {f"{place.component}.weight": translator.weight, f"{place.component}.bias": translator.bias}
            if translator.basis is not None:
                tensors[f"{place.component}.basis"] = translator.basis
        meta = {"kind": _KIND, "fingerprint": self.fingerprint, "layers": self.layers, "width": self.width, "settings": dict(self.settings)}
        write_tensors(tensors, Path(path), meta={**meta, "places": places})

    @classmethod
    def load(cls, path: Path | str, subject: Subject, *, other_model: bool = False) -> Translators:
        """Read what `save` wrote, for the model it was trained on.

        Args:
            path: The file.
            subject: The model that is to be read.
            other_model: Take them although they were trained on another model of this shape (a base model's lens on its fine-tuned version); this
                is logged.

        Raises:
            RunError: The file is missing, damaged or something else.
            ModelError: The maps are another model's.
        """
        tensors, meta = read_tensors(Path(path))
        if not isinstance(meta, dict) or meta.get("kind") != _KIND:
            raise RunError(f"{path} holds no translators: give a file that Translators.save wrote")
        maps = {}
        for place in (LensPlace(**fields) for fields in meta["places"]):
            weight, bias, basis = (tensors.get(f"{place.component}.{name}") for name in ("weight", "bias", "basis"))
            if weight is None or bias is None:
                raise RunError(f"{path} lacks the translator of {place.component}: it was changed, train and save it again")
            maps[place] = Translator(
                weight.to(subject.device), bias.to(subject.device), None if basis is None else basis.to(subject.device)
            )
        translators = cls(maps, meta["fingerprint"], meta["layers"], meta["settings"], other_model)
        translators.check(subject)
        return translators

    def _held(self) -> str:
        names = [place.component for place in self.maps]
        return ", ".join(names) if len(names) < 8 else f"{', '.join(names[:3])} … {names[-1]}"
