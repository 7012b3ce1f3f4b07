"""What two models exchange at once: a component's sites, and the weights that are its own.

A layer is its attention (or what mixes tokens there instead) and its MLP; a head is its z, and its slices of the q, k, v and output projections (in
grouped-query families the key and value it shares with its group are counted as its own too). Biases that belong to no head (of the output projection)
are the attention's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mechscope.causal.effects import place_columns
from mechscope.causal.places import Place, places_of
from mechscope.errors import SettingsError
from mechscope.subject import Components, Subject
from mechscope.subject.anatomy import Block, Slice
from mechscope.subject.linear import is_conv1d

Index = tuple[slice, ...]
LEVELS = ("layer", "attention", "mixer", "mlp", "head", "residual", "embedding", "unembedding")
_WHOLE: tuple[Index, ...] = ((slice(None),),)


@dataclass(frozen=True)
class Part:
    """What is exchanged at once.

    Attributes:
        columns: What a table's row says of it.
        places: Its sites, for activations.
        weights: Its parameters by name in the plain model, each with the pieces that belong to it.
        start: First block in which those weights act: −1 for the embedding, the number of blocks for what comes after them.
    """

    columns: dict[str, Any]
    places: tuple[Place, ...]
    weights: Mapping[str, tuple[Index, ...]]
    start: int


def parts_of(subject: Subject, levels: Sequence[str], by: str) -> list[Part]:
    """List the parts of some levels.

    Raises:
        SettingsError: A level is not known, or cannot be exchanged that way.
    """
    parts: list[Part] = []
    for level in levels:
        if level not in LEVELS:
            raise SettingsError(f"level {level!r} is not known: use some of {', '.join(LEVELS)}")
        if (level == "residual" and by == "weights") or (level in ("embedding", "unembedding") and by == "activations"):
            other = "activations" if by == "weights" else "weights"
            raise SettingsError(f"level {level!r} cannot be exchanged by {by}, only by {other}")
        parts += _level(subject, level)
    return parts


def set_of(subject: Subject, chosen: Components | str) -> Part:
    """Return a set of heads, MLPs and whole layers as one part."""
    components = Components.parse(chosen) if isinstance(chosen, str) else chosen
    components.validate(subject.anatomy)
    whole = [_layer(subject, layer) for layer in components.layers]
    single = Components(components.heads, components.mlps, mixers=components.mixers)
    weights: dict[str, tuple[Index, ...]] = {}
    for part in (*whole, *(_place_part(subject, place) for place in places_of(single, subject.anatomy))):
        for name, where in part.weights.items():
            weights[name] = weights.get(name, ()) + where
    places = (*(place for part in whole for place in part.places), *places_of(single, subject.anatomy))
    columns = {"component": str(components), "site": "set", "layer": -1, "head": -1, "feature": -1, "positions": "all"}
    return Part(columns, places, weights, min((place.layer for place in places), default=0))


def _level(subject: Subject, level: str) -> Iterator[Part]:
    anatomy = subject.anatomy
    if level in ("embedding", "unembedding"):
        yield _ends(subject, level)
    elif level == "head":
        for layer, head in anatomy.heads():
            yield _place_part(subject, Place("z", layer, head=head))
    else:
        if level == "mixer" and not anatomy.mixing:
            raise SettingsError("level 'mixer': all layers of the model attend; exchange level 'attention'")
        for layer in {"attention": anatomy.attending, "mixer": anatomy.mixing}.get(level, tuple(range(anatomy.n_layers))):
            match level:
                case "layer":
                    yield _layer(subject, layer)
                case "attention":
                    yield _place_part(subject, Place("attention_output", layer))
                case "mixer":
                    yield _place_part(subject, Place("mixer_output", layer))
                case "mlp":
                    yield _place_part(subject, Place("mlp_output", layer))
                case "residual":
                    yield Part(place_columns(Place("residual", layer)), (Place("residual", layer),), {}, layer)


def _layer(subject: Subject, layer: int) -> Part:
    block = subject.anatomy.blocks[layer]
    columns = {"component": f"layers:{layer}", "site": "layer", "layer": layer, "head": -1, "feature": -1, "positions": "all"}
    places = (Place(block.mixing_site, layer), Place("mlp_output", layer))
    return Part(columns, places, _under(subject, f"{block.name}."), layer)


def _place_part(subject: Subject, place: Place) -> Part:
    block = subject.anatomy.blocks[place.layer]
    if place.head is not None:
        weights = _of_head(block, place.head)
    elif place.site == block.mixing_site:
        weights = _under(subject, f"{block.mixing.name}.")
    else:
        weights = _under(subject, block.mlp_prefix)
    return Part(place_columns(place), (place,), weights, place.layer)


def _under(subject: Subject, prefix: str) -> dict[str, tuple[Index, ...]]:
    return {name: _WHOLE for name, _ in subject.weights() if name.startswith(prefix)}


def _of_head(block: Block, head: int) -> dict[str, tuple[Index, ...]]:
    weights: dict[str, tuple[Index, ...]] = {}
    for part in block.own_heads.slices.values():
        features = slice(part.starts[head], part.starts[head] + part.width)
        for key, index in _pieces(part, features):
            name = f"{part.name}.{key}"
            weights[name] = (*weights.get(name, ()), index)
    return weights


def _pieces(part: Slice, features: slice) -> Iterator[tuple[str, Index]]:
    """Yield a slice's place in the weight as it is stored, and in the bias where the head owns output features."""
    rows = (part.side == "output") is not is_conv1d(part.module)
    yield "weight", ((features,) if rows else (slice(None), features))
    if part.side == "output" and getattr(_plain(part.module), "bias", None) is not None:
        yield "bias", (features,)


def _plain(module: nn.Module) -> nn.Module:
    return getattr(module, "base_layer", module)


def _ends(subject: Subject, level: str) -> Part:
    """Return what stands before the first block, or behind the last."""
    anatomy = subject.anatomy
    inside = tuple(f"{block.name}." for block in anatomy.blocks)
    modules = {id(module): name for name, module in subject.plain.named_modules()}
    behind = tuple(
        f"{modules[id(module)]}." for module in (anatomy.final_norm, anatomy.projection_out, anatomy.unembedding) if module is not None
    )
    names = [name for name, _ in subject.weights() if not name.startswith(inside)]
    chosen = [name for name in names if name.startswith(behind) is (level == "unembedding")]
    component, start = ("embed", -1) if level == "embedding" else (level, anatomy.n_layers)
    columns = {"component": component, "site": level, "layer": -1, "head": -1, "feature": -1, "positions": "all"}
    return Part(columns, (), dict.fromkeys(chosen, _WHOLE), start)
