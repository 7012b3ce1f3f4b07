"""A selection of a model's parts, as a value.

One immutable type says which heads, MLPs and whole layers are meant. The same value is what a table names, an intervention changes, a figure
outlines and LoRA adapts. Its text form follows the circuit literature: `a3.h5` is head 5 of layer 3, `m3` the MLP of layer 3, `layers:2,3`
whole layers (every head and the MLP); parts are joined by commas, and `none` is the empty selection. `m3.e5` is an expert of layer 3, where its MLP is a
mixture of them. `mixer3` is what mixes tokens in a layer 3 that does not attend (linear attention, a state-space model, a short convolution): such a layer
is its mixer and its MLP. `resid6.f1024` is latent 1024 of the dictionary that stands at a place; what takes latents is given their dictionaries with them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mechscope.errors import SettingsError

if TYPE_CHECKING:
    from mechscope.subject.anatomy import Anatomy

_HEAD = re.compile(r"a(\d+)\.h(\d+)")
_MLP = re.compile(r"m(\d+)")
_EXPERT = re.compile(r"m(\d+)\.e(\d+)")
_MIXER = re.compile(r"mixer(\d+)")
_LATENT = re.compile(r"((?:resid|a|m)\d+(?:\.z)?)\.f(\d+)")
_LAYERS = re.compile(r"layers:(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)")
_KINDS = ("heads", "mlps", "layers", "latents", "experts", "mixers")
_PART = re.compile(r"layers:\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*(?=,|$)|[^,]+")


@dataclass(frozen=True)
class Components:
    """Heads, MLPs and whole layers of a model, sorted and without repeats.

    Attributes:
        heads: (layer, head) pairs, counted from zero.
        mlps: Layers whose MLP is meant.
        layers: Layers meant as a whole.
        latents: (place, latent) of dictionaries: `("resid6", 1024)`.
        experts: (layer, expert) of MLPs that are mixtures of experts.
        mixers: Layers that do not attend, whose mixer is meant.
    """

    heads: tuple[tuple[int, int], ...] = ()
    mlps: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    latents: tuple[tuple[str, int], ...] = ()
    experts: tuple[tuple[int, int], ...] = ()
    mixers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _KINDS:
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))

    @classmethod
    def of_heads(cls, heads: Iterable[tuple[int, int]]) -> Components:
        """Select single heads, given as (layer, head) pairs."""
        return cls(heads=tuple((int(layer), int(head)) for layer, head in heads))

    @classmethod
    def of_layers(cls, layers: Iterable[int]) -> Components:
        """Select whole layers."""
        return cls(layers=tuple(int(layer) for layer in layers))

    @classmethod
    def parse(cls, text: str) -> Components:
        """Read the text form; the inverse of `str`.

            selection  = "none" | part { "," part }               blanks are ignored, an empty text is "none"
            part       = head | mlp | mixer | expert | layers | latent
            head       = "a" number ".h" number                   a3.h5: head 5 of layer 3
            mlp        = "m" number                               m3
            mixer      = "mixer" number                           mixer3: what mixes tokens in layer 3, which does not attend
            expert     = "m" number ".e" number                   m3.e5: expert 5 of layer 3
            layers     = "layers:" span { "," span }              layers:0-3,5: whole layers, heads (or mixer) and MLP; further parts may follow
            span       = number [ "-" number ]                    both ends belong to it
            latent     = place ".f" number                        resid6.f1024, a6.f3, m6.f3, a6.z.f3: of the dictionary that stands there

        Tables and edges also name what no selection can hold: `embed`, `resid3`, `a3` (what attention adds), `m3.n1024`, `logits`.

        Args:
            text: For example `"a3.h5,m3"`, `"layers:2,3,5"`, `"layers:0-3,a5.h1"` or `"none"`.

        Raises:
            SettingsError: A part is not of one of these forms, or a span of layers runs backwards.
        """
        heads: list[tuple[int, int]] = []
        mlps: list[int] = []
        layers: list[int] = []
        latents: list[tuple[str, int]] = []
        experts: list[tuple[int, int]] = []
        mixers: list[int] = []
        text = re.sub(r"\s+", "", text)
        if text in ("", "none"):
            return cls()
        for part in _PART.findall(text):
            if match := _HEAD.fullmatch(part):
                heads.append((int(match[1]), int(match[2])))
            elif match := _MLP.fullmatch(part):
                mlps.append(int(match[1]))
            elif match := _MIXER.fullmatch(part):
                mixers.append(int(match[1]))
            elif match := _EXPERT.fullmatch(part):
                experts.append((int(match[1]), int(match[2])))
            elif match := _LATENT.fullmatch(part):
                latents.append((match[1], int(match[2])))
            elif match := _LAYERS.fullmatch(part):
                for span in match[1].split(","):
                    first, _, last = span.partition("-")
                    if last and int(last) < int(first):
                        raise SettingsError(f"component 'layers:{span}' runs backwards: write 'layers:{last}-{first}'")
                    layers.extend(range(int(first), int(last or first) + 1))
            else:
                raise SettingsError(
                    f"component {part!r} is not understood: write heads as 'a3.h5', MLPs as 'm3', experts as 'm3.e5', mixers of layers that do not attend as "
                    "'mixer3', whole layers as 'layers:2,3,5', joined by commas"
                )
        return cls(tuple(heads), tuple(mlps), tuple(layers), tuple(latents), tuple(experts), tuple(mixers))

    def __str__(self) -> str:
        parts = [f"a{layer}.h{head}" for layer, head in self.heads] + [f"m{layer}" for layer in self.mlps]
        parts += [f"mixer{layer}" for layer in self.mixers]
        parts += [f"m{layer}.e{expert}" for layer, expert in self.experts]
        if self.layers:
            parts.append("layers:" + ",".join(map(str, self.layers)))
        parts += [f"{place}.f{latent}" for place, latent in self.latents]
        return ",".join(parts) or "none"

    def __len__(self) -> int:
        return sum(len(getattr(self, name)) for name in _KINDS)

    def __or__(self, other: Components) -> Components:
        return Components(**{name: getattr(self, name) + getattr(other, name) for name in _KINDS})

    def __and__(self, other: Components) -> Components:
        return self._keep(other, present=True)

    def __sub__(self, other: Components) -> Components:
        return self._keep(other, present=False)

    def _keep(self, other: Components, *, present: bool) -> Components:
        return Components(**{name: tuple(x for x in getattr(self, name) if (x in getattr(other, name)) is present) for name in _KINDS})

    def expand(self, n_heads: int, mixing: Collection[int] = ()) -> Components:
        """Return the same parts with every whole layer written as its heads (its mixer, of the layers in `mixing`, which do not attend) and its MLP."""
        heads = self.heads + tuple((layer, head) for layer in self.layers if layer not in mixing for head in range(n_heads))
        mixers = self.mixers + tuple(layer for layer in self.layers if layer in mixing)
        return replace(self, heads=heads, mlps=self.mlps + self.layers, layers=(), mixers=mixers)

    @property
    def without_latents(self) -> Components:
        """The parts of the model itself."""
        return replace(self, latents=())

    @property
    def without_experts(self) -> Components:
        """The parts that are not single experts."""
        return replace(self, experts=())

    def validate(self, anatomy: Anatomy, *, experts: bool = False) -> Components:
        """Return itself if every part exists in the model.

        Args:
            anatomy: The model's parts.
            experts: Whether single experts are of use here; where they are not, they are refused.

        Raises:
            SettingsError: A part lies outside the model; the message names it and the model's size. Or one is a latent, which no model has by itself.
        """
        for place, latent in self.latents:
            raise SettingsError(
                f"component {place}.f{latent} is a latent of a dictionary, and heads, MLPs or layers are needed here: ablate, patch and steer take latents, "
                "with --dictionary"
            )
        for layer, expert in self.experts:
            if not experts:
                raise SettingsError(
                    f"component m{layer}.e{expert} is an expert, and heads, MLPs or layers are needed here: ablate, patch and counterfactual take experts"
                )
            _require_expert(anatomy, layer, expert)
        size = f"the model has layers 0-{anatomy.n_layers - 1} with heads 0-{anatomy.n_heads - 1}"
        for layer, head in self.heads:
            if layer >= anatomy.n_layers or head >= anatomy.n_heads:
                raise SettingsError(f"component a{layer}.h{head} does not exist: {size}")
            if layer in anatomy.mixing:
                raise SettingsError(f"component a{layer}.h{head} does not exist: {_without_heads(anatomy)}")
        for layer in self.mixers:
            if layer not in anatomy.mixing:
                others = f": {_without_heads(anatomy)}" if anatomy.mixing else ", as all layers do"
                why = f"layer {layer} attends{others}" if layer < anatomy.n_layers else size
                raise SettingsError(f"component mixer{layer} does not exist: {why}")
        for name, group in (("m", self.mlps), ("layers:", self.layers)):
            for layer in group:
                if layer >= anatomy.n_layers:
                    raise SettingsError(f"component {name}{layer} does not exist: {size}")
        return self


def _without_heads(anatomy: Anatomy) -> str:
    return f"layers {', '.join(map(str, anatomy.mixing))} do not attend; what mixes tokens there is written mixer{anatomy.mixing[0]}"


def _require_expert(anatomy: Anatomy, layer: int, expert: int) -> None:
    if layer >= anatomy.n_layers:
        raise SettingsError(f"component m{layer}.e{expert} does not exist: the model has layers 0-{anatomy.n_layers - 1}")
    experts = anatomy.blocks[layer].experts
    if experts is None:
        raise SettingsError(f"component m{layer}.e{expert} does not exist: the MLP of layer {layer} is dense, it has no experts")
    if expert >= experts.number:
        raise SettingsError(f"component m{layer}.e{expert} does not exist: layer {layer} has experts 0-{experts.number - 1}")


def chosen_heads(anatomy: Anatomy, heads: Components | str | None) -> tuple[tuple[int, int], ...]:
    """Return (layer, head) of a selection or its text form, whole layers by their heads; all of the model for None.

    Raises:
        SettingsError: The selection does not fit the model, or holds no heads.
    """
    if heads is None:
        return tuple(anatomy.heads())
    chosen = (Components.parse(heads) if isinstance(heads, str) else heads).validate(anatomy).expand(anatomy.n_heads, anatomy.mixing).heads
    if not chosen:
        raise SettingsError(f"components {str(heads)!r} hold no heads: name some, such as 'a3.h5', or whole layers")
    return chosen
