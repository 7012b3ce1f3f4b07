"""What probes read: rows of activations at the same site of every layer, from one run of a batch.

residual           `embed`, `resid0`, …      the embedding, and the stream behind each block
attention_output   `a0`, …                   what attention adds to it
mixer_output       `mixer0`, …               what mixes tokens in a layer that does not attend adds to it
mlp_output         `m0`, …                   what the MLP adds to it
head               `a0.h0`, …                what a head hands to the output projection
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.data.pairs import PairBatch
from mechscope.errors import SettingsError
from mechscope.instrument import Recording, record
from mechscope.instrument.record import Site
from mechscope.instrument.walk import run_backbone
from mechscope.probing.tasks import Reading
from mechscope.subject import Subject
from mechscope.subject.placement import sent

ProbeSite = Literal["residual", "attention_output", "mixer_output", "mlp_output", "head"]
_RECORDED: dict[ProbeSite, tuple[Site, ...]] = {
    "residual": ("embedding", "residual"),
    "attention_output": ("attention_output",),
    "mixer_output": ("mixer_output",),
    "mlp_output": ("mlp_output",),
    "head": ("z",),
}


@dataclass(frozen=True)
class Component:
    """A place whose activations are read: its name in every table, and its layer, −1 for the embedding."""

    name: str
    layer: int


def components_of(subject: Subject, site: ProbeSite) -> tuple[Component, ...]:
    """Return the places of a site in a model, in the order of `Activations.rows`.

    Raises:
        SettingsError: There is no such site.
    """
    layers, heads = _layers(subject, site), range(subject.anatomy.n_heads)
    match site:
        case "residual":
            return (Component("embed", -1), *(Component(f"resid{layer}", layer) for layer in layers))
        case "attention_output":
            return tuple(Component(f"a{layer}", layer) for layer in layers)
        case "mixer_output":
            if not layers:
                raise SettingsError("the model has no mixers besides attention: all its layers attend; probe attention_output")
            return tuple(Component(f"mixer{layer}", layer) for layer in layers)
        case "mlp_output":
            return tuple(Component(f"m{layer}", layer) for layer in layers)
        case "head":
            return tuple(Component(f"a{layer}.h{head}", layer) for layer in layers for head in heads)
    raise SettingsError(f"site {site!r} is not probed: the sites are {', '.join(_RECORDED)}")


def _layers(subject: Subject, site: ProbeSite) -> Sequence[int]:
    """Return the layers that have a site: in a hybrid stack some attend, and others mix tokens in another way."""
    anatomy = subject.anatomy
    if site == "mixer_output":
        return anatomy.mixing
    return anatomy.attending if site in ("attention_output", "head") else range(anatomy.n_layers)


@dataclass(frozen=True)
class Activations:
    """What probes read of a model.

    Attributes:
        subject: The model.
        site: What is read of every layer.
        reading: Which tokens of a text.
    """

    subject: Subject
    site: ProbeSite
    reading: Reading

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.subject.anatomy.d_head if self.site == "head" else self.subject.anatomy.d_model

    @torch.no_grad()
    def rows(self, batch: PairBatch) -> Float[Tensor, "component row width"]:
        """Run a batch, and return its rows text after text, where the embedding lies."""
        with self.subject.active(), record(self.subject, *_RECORDED[self.site]) as recording:
            run_backbone(self.subject, batch.clean, None if bool(batch.real.all()) else batch.real)
        return torch.stack([sent(self._read(value, batch), self.subject.device) for value in self._values(recording)])

    def _values(self, recording: Recording) -> list[Float[Tensor, "batch token width"]]:
        layers = _layers(self.subject, self.site)
        match self.site:
            case "residual":
                return [recording["embedding"], *(recording["residual", layer] for layer in layers)]
            case "head":
                return [head for layer in layers for head in recording["z", layer].unbind(2)]
            case _:
                return [recording[self.site, layer] for layer in layers]

    def _read(self, value: Float[Tensor, "batch token width"], batch: PairBatch) -> Float[Tensor, "row width"]:
        if self.reading == "mean":
            real = sent(batch.real, value.device).double()
            # what stands at padding means nothing, and may be NaN
            summed = torch.where(real[..., None] > 0, value.double(), 0.0).sum(1)
            return summed / real.sum(1, keepdim=True)
        if self.reading == "last":
            return value[sent(batch.positions("last"), value.device)]
        first = batch.positions(0)
        return value[sent(batch.real & ~first, value.device)]
