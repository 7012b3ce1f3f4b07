"""The shape of a dictionary: what it reads, what it writes, and which of its latents do which.

All kinds of dictionary differ in this alone. Latents come in groups; a group reads some neighbouring input places together (its pre-activation is a sum
over them) and writes to some neighbouring output places:

    autoencoder        one group; reads a place and writes the same
    transcoder         one group; reads what an MLP reads and writes what it writes (`skip`: a linear map beside it)
    crosscoder         one group; reads and writes all places, of one model or of several
    cross-layer        a group for every layer; it reads its own layer and writes to that and all later ones
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.features.places import Place, places
from mechscope.features.rules import RULE_TENSORS, Rule


@dataclass(frozen=True)
class Group:
    """Latents that read and write the same places.

    Attributes:
        latents: How many.
        reads: Half-open range of the input places.
        writes: Half-open range of the output places.
    """

    latents: int
    reads: tuple[int, int]
    writes: tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """What a dictionary reads and writes, and its rule.

    Attributes:
        inputs: The places it reads.
        outputs: The places it writes.
        input_widths: Numbers per token at each input place.
        output_widths: The same of the output places.
        groups: Its latents.
        rule: Which of them are active.
        skip: Whether a linear map from input to output stands beside it.
    """

    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    input_widths: tuple[int, ...]
    output_widths: tuple[int, ...]
    groups: tuple[Group, ...]
    rule: Rule
    skip: bool = False

    def __post_init__(self) -> None:
        if self.rule.k is not None and self.rule.k > self.latents:
            raise SettingsError(f"k={self.rule.k} of {self.latents} latents cannot be active: give a smaller k or more latents")
        if self.latents < 1 or not self.inputs or not self.outputs:
            raise SettingsError("a dictionary needs at least one latent, one place to read and one to write")

    @property
    def latents(self) -> int:
        """Number of latents."""
        return sum(group.latents for group in self.groups)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The latents of each group, half-open."""
        return tuple(pairwise(accumulate((group.latents for group in self.groups), initial=0)))

    @property
    def places(self) -> tuple[Place, ...]:
        """All places, each once."""
        return tuple(dict.fromkeys((*self.inputs, *self.outputs)))

    def read_columns(self, group: Group) -> slice:
        """Return the columns of the inputs side by side that a group reads."""
        return _columns(self.input_widths, group.reads)

    def written_columns(self, group: Group) -> slice:
        """Return the columns of the outputs side by side that a group writes."""
        return _columns(self.output_widths, group.writes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        found: dict[str, tuple[int, ...]] = {}
        for number, group in enumerate(self.groups):
            for name, widths, part in (("encoder", self.input_widths, group.reads), ("decoder", self.output_widths, group.writes)):
                found[f"{name}.{number}"] = (group.latents, sum(widths[slice(*part)]))
        found |= {"encoder_bias": (self.latents,), "decoder_bias": (sum(self.output_widths),)}
        if self.skip:
            found["skip"] = (sum(self.output_widths), sum(self.input_widths))
        one_for_all = self.rule.name == "batchtopk"
        return found | dict.fromkeys(RULE_TENSORS[self.rule.name], () if one_for_all else (self.latents,))

    def tensors(
        self, *, seed: int = 0, apart: bool = False, threshold: float = 0.001, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return the tensors that training starts with.

        Decoder rows are random and of norm one, and the same at places that differ by their model alone, so that every latent begins as one that models share;
        what is written back where it was read is read as it is written; biases are zero.

        Args:
            seed: Of the random rows.
            apart: Draw the rows of every place by themselves, so that no latent begins as one that models share.
            threshold: Where JumpReLU's thresholds start.
            dtype: Their type.
        """
        generator = torch.Generator().manual_seed(seed)
        made: dict[str, Tensor] = {}
        for name, shape in self.shapes().items():
            if name.startswith(("encoder.", "decoder.")):
                rows = torch.randn(shape, generator=generator, dtype=torch.float64)
                if name.startswith("decoder.") and not apart:
                    self._share(rows, self.groups[int(name.removeprefix("decoder."))])
                made[name] = (rows / rows.norm(dim=1, keepdim=True)).to(dtype)
            else:
                made[name] = torch.zeros(shape, dtype=dtype)
        for number, group in enumerate(self.groups):
            if self.inputs[slice(*group.reads)] == self.outputs[slice(*group.writes)]:
                made[f"encoder.{number}"] = made[f"decoder.{number}"].clone()
        if self.rule.name == "jumprelu":
            made["threshold"] += threshold
        return made

    def _share(self, rows: Tensor, group: Group) -> None:
        """Give rows the same part at places that differ by their model alone."""
        writes = slice(*group.writes)
        parts: dict[tuple[str, int], Tensor] = {}
        for place, part in zip(self.outputs[writes], rows.split(self.output_widths[writes], dim=1), strict=True):
            part.copy_(parts.setdefault((place.site, place.layer), part))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "inputs": [each.name for each in self.inputs], "outputs": [each.name for each in self.outputs]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read plain values back."""
        groups = (Group(each["latents"], tuple(each["reads"]), tuple(each["writes"])) for each in values["groups"])
        return cls(
            places(values["inputs"]),
            places(values["outputs"]),
            tuple(values["input_widths"]),
            tuple(values["output_widths"]),
            tuple(groups),
            Rule(**values["rule"]),
            values["skip"],
        )


def _columns(widths: Sequence[int], part: tuple[int, int]) -> slice:
    ends = (0, *accumulate(widths))
    return slice(ends[part[0]], ends[part[1]])


def autoencoder(place: Place | str, width: int, latents: int, rule: Rule) -> Layout:
    """Return a sparse autoencoder of a place: it writes what it reads."""
    return crosscoder(place, [width], latents, rule)


def crosscoder(sites: Place | str | Sequence[Place | str], widths: Sequence[int], latents: int, rule: Rule) -> Layout:
    """Return a crosscoder: every latent reads and writes all places, of one model or of several (Lindsey et al. 2024)."""
    where, count = places(sites), len(widths)
    if len(where) != count:
        raise SettingsError(f"{len(where)} places with {count} widths: give one width for each")
    return Layout(where, where, tuple(widths), tuple(widths), (Group(latents, (0, count), (0, count)),), rule)


def transcoder(layer: int, width: int, latents: int, rule: Rule, *, skip: bool = False) -> Layout:
    """Return a transcoder: it reads what the MLP of a layer reads and writes what that adds (Dunefsky et al. 2024); `skip` as Paulo et al. (2025)."""
    inside, outside = Place("mlp_input", layer), Place("mlp_output", layer)
    return Layout((inside,), (outside,), (width,), (width,), (Group(latents, (0, 1), (0, 1)),), rule, skip)


def cross_layer(layers: Sequence[int], width: int, latents: int, rule: Rule) -> Layout:
    """Return a cross-layer transcoder: `latents` in every layer, which read its MLP's input and write to the outputs of it and all later ones."""
    count = len(layers)
    groups = tuple(Group(latents, (at, at + 1), (at, count)) for at in range(count))
    inside, outside = (tuple(Place(site, layer) for layer in sorted(layers)) for site in ("mlp_input", "mlp_output"))
    return Layout(inside, outside, (width,) * count, (width,) * count, groups, rule)
