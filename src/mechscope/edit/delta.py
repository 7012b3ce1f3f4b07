"""An edit as a value: what is added to some weights, and the hashes of the weights that it fits.

A file of it is small (an edit of rank one is two vectors). Applied, it stands in the model for as long as a `with` lasts: the parameters' own tensors are set
aside and put back, so that undoing is exact to the last bit, which taking the change away again is not. Every parameter is hashed before and after; so edits
stack in the order in which they were made, and in no other model or order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mechscope.errors import ModelError, RunError
from mechscope.shapes import by_shape
from mechscope.store.hashing import hash_state, short
from mechscope.store.tables import read_tensors, write_tensors
from mechscope.subject import Subject

_KIND = "mechscope edit"


@dataclass(frozen=True)
class LowRank:
    """A change of a weight as left @ rightᵀ: ``(row, rank)`` and ``(column, rank)``, as the weight is stored."""

    left: Tensor
    right: Tensor

    __repr__ = by_shape

    @property
    def dense(self) -> Tensor:
        """The change itself, in float64."""
        return self.left.double() @ self.right.double().T


Change = Tensor | LowRank


@dataclass(frozen=True)
class Delta:
    """What an edit adds to a model's weights.

    Attributes:
        changes: By the parameter's name in the plain Hugging Face model, in the orientation in which it is stored.
        fits: The hash of each of these parameters before the edit.
        gives: The hash of each after it.
        about: JSON-able: what was edited, how, and where.
    """

    changes: Mapping[str, Change]
    fits: Mapping[str, str]
    gives: Mapping[str, str]
    about: Mapping[str, Any] = field(default_factory=dict)

    __repr__ = by_shape

    @classmethod
    def of(cls, subject: Subject, changes: Mapping[str, Change], about: Mapping[str, Any] | None = None) -> Delta:
        """Make an edit of a model as it is now.

        Args:
            subject: The model.
            changes: By parameter; kept in float32, or in float64 where the parameter is.
            about: JSON-able notes.

        Raises:
            ModelError: There is no such parameter, a shape does not fit, or a change is not finite.
        """
        own = _parameters(subject)
        kept: dict[str, Change] = {}
        for name, change in changes.items():
            if name not in own:
                raise ModelError(f"model {subject.source!r} has no parameter {name!r} to edit")
            parts = (change.left, change.right) if isinstance(change, LowRank) else (change,)
            shape = (len(parts[0]), len(parts[-1])) if isinstance(change, LowRank) else tuple(change.shape)
            if shape != tuple(own[name].shape):
                raise ModelError(f"a change of shape {shape} does not fit {name}, which is {tuple(own[name].shape)}")
            if not all(bool(torch.isfinite(part).all()) for part in parts):
                raise ModelError(
                    f"the change of {name} is not finite: the edit cannot be solved here; use another layer or more texts for the keys"
                )
            dtype = torch.float64 if own[name].dtype == torch.float64 else torch.float32
            tensors = [part.detach().to("cpu", dtype) for part in parts]
            kept[name] = LowRank(*tensors) if isinstance(change, LowRank) else tensors[0]
        fits = {name: _hash(own[name]) for name in kept}
        gives = {name: _hash(_changed(own[name], change)) for name, change in kept.items()}
        return cls(kept, fits, gives, dict(about or {}))

    def require_fit(self, subject: Subject) -> None:
        """Refuse any model but the one that the edit was made for; `ModelError` in one sentence."""
        own = _parameters(subject)
        for name, expected in self.fits.items():
            found = _hash(own[name]) if name in own else None
            if found != expected:
                there = f"has {short(found)}" if found is not None else "does not have it"
                undone = (
                    ": it is applied already"
                    if found == self.gives[name]
                    else ": apply it to the model it was made from, edits before it first"
                )
                raise ModelError(f"the edit fits a model whose {name} has the hash {short(expected)}, {subject.source!r} {there}{undone}")

    def size(self, subject: Subject) -> float:
        """Return ‖Δ‖ / ‖W‖, the largest over the parameters that are changed."""
        own = _parameters(subject)
        return max(float(_dense(change).double().norm() / own[name].detach().double().norm()) for name, change in self.changes.items())

    def save(self, path: Path) -> None:
        """Write it to one safetensors file; `RunError` where it cannot be written."""
        tensors: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            tensors |= {f"{name}.left": change.left, f"{name}.right": change.right} if isinstance(change, LowRank) else {name: change}
        meta = {"kind": _KIND, "fits": dict(self.fits), "gives": dict(self.gives), "about": dict(self.about)}
        write_tensors(tensors, path, meta=meta)

    @classmethod
    def load(cls, path: Path) -> Delta:
        """Read what `save` wrote; `RunError` where it is missing, damaged or no edit."""
        tensors, meta = read_tensors(path)
        if not isinstance(meta, dict) or meta.get("kind") != _KIND:
            raise RunError(f"{path} is not an edit: give a file that `mechscope edit` wrote")
        fits, gives = (_texts(meta.get(key)) for key in ("fits", "gives"))
        changes: dict[str, Change] = {}
        for name in fits or {}:
            if name in tensors:
                changes[name] = tensors[name]
            elif {f"{name}.left", f"{name}.right"} <= tensors.keys():
                changes[name] = LowRank(tensors[f"{name}.left"], tensors[f"{name}.right"])
        if not fits or not gives or not fits.keys() == gives.keys() == changes.keys():
            raise RunError(f"{path} is a damaged edit: what it says of its weights and those it holds differ; make it again")
        return cls(changes, fits, gives, meta.get("about") or {})


@contextlib.contextmanager
def applied(subject: Subject, *deltas: Delta) -> Iterator[Subject]:
    """Hold edits in a model, one made upon the other, for the duration; `generate` included.

    Args:
        subject: The model.
        deltas: In the order in which they were made.

    Yields:
        The edited model as a subject of its own (the same modules), whose fingerprint is that of the edited weights.

    Raises:
        ModelError: An edit does not fit the model with those before it.
    """
    own = _parameters(subject)
    originals: dict[str, Tensor] = {}
    try:
        for delta in deltas:
            delta.require_fit(subject)
            for name, change in delta.changes.items():
                originals.setdefault(name, own[name].data)
                own[name].data = _changed(own[name], change)
        yield replace(subject, source=f"{subject.source} (edited)" if deltas else subject.source)
    finally:
        for name, tensor in originals.items():
            own[name].data = tensor


def save_edited(subject: Subject, folder: Path, *deltas: Delta) -> None:
    """Write a model with edits in its weights as a folder that `from_pretrained` reads, with its tokenizer if it has one.

    Args:
        subject: The model, which stays as it is.
        folder: Made if missing.
        deltas: In the order in which they were made.

    Raises:
        ModelError: An edit does not fit.
        RunError: The folder cannot be written.
    """
    with applied(subject, *deltas) as edited:
        try:
            edited.plain.save_pretrained(folder)
            if subject.tokenizer is not None:
                subject.tokenizer.save_pretrained(folder)
        except OSError as error:
            raise RunError(f"the edited model cannot be written to {folder}: {error.strerror or error}") from error


def _parameters(subject: Subject) -> dict[str, nn.Parameter]:
    if subject.is_adapter:
        raise ModelError(
            f"model {subject.source!r} carries an adapter: merge it (model.merge_and_unload(), save_pretrained) before editing"
        )
    subject.require_in_memory("editing")
    return dict(subject.plain.named_parameters())


def _dense(change: Change) -> Tensor:
    return change.dense if isinstance(change, LowRank) else change


def _changed(weight: Tensor, change: Change) -> Tensor:
    """Return a weight with a change, added in float64 and rounded once to the weight's own type."""
    return (weight.detach().double() + _dense(change).to(weight.device, torch.float64)).to(weight.dtype)


def _hash(tensor: Tensor) -> str:
    return hash_state({"": tensor.detach()})


def _texts(value: Any) -> dict[str, str] | None:
    if not isinstance(value, dict) or not all(isinstance(own, str) for own in value.values()):
        return None
    return value
