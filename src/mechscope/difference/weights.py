"""What fine-tuning did to the weights: per matrix, per head's own slices, per layer.

Query, key and value are separate matrices here whatever the family's storage (GPT-2 and GPT-NeoX keep them in one map): they are cut out by the
anatomy's slices. All changes are Frobenius norms; `relative` ones are divided by the base's norm. A PEFT adapter's change is added to the weight
it adapts, so that an adapter and a merged model give the same table. Several ranks share the matrices; a model that several pairs have in common
is decomposed once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope import ranks
from mechscope.difference.lockstep import models_of
from mechscope.errors import ModelError
from mechscope.instrument.execution import Execution
from mechscope.shapes import by_shape
from mechscope.stats.spectra import Spectrum, weight_change
from mechscope.subject import Pair, Subject
from mechscope.subject.anatomy import Block, Slice
from mechscope.subject.linear import is_conv1d
from mechscope.subject.placement import index_for, sent

log = logging.getLogger(__name__)

SINGULAR_VALUES = 8


@dataclass(frozen=True)
class WeightDifference:
    """How the weights changed.

    Attributes:
        table: One row per matrix and vector; the columns of `weights.parquet`.
        heads: ``(layer, head)``: relative change of a head's slices of query, key, value and output projection (and gate, in families that have one)
            together; of the layers that attend.
        layers: ``(layer,)``: relative change of all weights of a block together.
        attending: The layers that attend.
    """

    table: pd.DataFrame
    heads: np.ndarray
    layers: np.ndarray
    attending: tuple[int, ...]

    __repr__ = by_shape


def compare_weights(pair: Pair, *, execution: Execution = Execution()) -> WeightDifference:
    """Compare the weights of two models; `ModelError` where they do not have the same parameters."""
    return compare_weights_of([pair], execution=execution)[0]


@torch.no_grad()
def compare_weights_of(pairs: Sequence[Pair], *, spectra: bool = True, execution: Execution = Execution()) -> list[WeightDifference]:
    """Compare the weights of the models of some pairs, in their order; every rank calls this and gets the whole result.

    A model (the same `Subject`) that several pairs have in common is decomposed once.

    Args:
        pairs: The models.
        spectra: Whether matrices are decomposed; without, ranks, singular values and intruder dimensions are NaN.
        execution: Progress.

    Raises:
        ModelError: The models of a pair do not have the same parameters.
    """
    weights = {id(subject): dict(subject.weights()) for subject in models_of(pairs)}
    sides = [(weights[id(pair.base)], weights[id(pair.tuned)]) for pair in pairs]
    for pair, (base, tuned) in zip(pairs, sides, strict=True):
        _require_alike(pair, base, tuned)
    sizes = {name: value.numel() for base, _ in sides for name, value in base.items()}
    rows: dict[str, list[list[dict[str, Any]]]] = {}
    # the largest first, so that all ranks are dealt about as much
    for done, name in enumerate(ranks.own(sorted(sizes, key=lambda name: -sizes[name]))):
        execution.told("comparing weights", done * ranks.size(), len(sizes))
        known: _Known = {}
        rows[name] = [
            [_row(pair, name, part, known, spectra) for part in _parts(pair, name, base[name], tuned[name])] if name in base else []
            for pair, (base, tuned) in zip(pairs, sides, strict=True)
        ]
    for others in ranks.exchange(rows):
        rows |= others
    execution.told("comparing weights", len(sizes), len(sizes))
    tables = [pd.DataFrame([row for name in base for row in rows[name][number]]) for number, (base, _) in enumerate(sides)]
    return [
        WeightDifference(table, _heads(pair, base, tuned), _layers(pair, table), pair.base.anatomy.attending)
        for pair, (base, tuned), table in zip(pairs, sides, tables, strict=True)
    ]


# the spectra of one parameter's parts, by model, part and what two models of unlike vocabulary or device make of them
_Known = dict[tuple[int, str, torch.Size, torch.device], Spectrum]


def _row(pair: Pair, name: str, cut: tuple[str, Tensor, Tensor], known: _Known, spectra: bool) -> dict[str, Any]:
    part, base, tuned = cut
    layer, kind = _place(pair.base, name, part)
    first, second = (
        known.setdefault((id(subject), part, matrix.shape, matrix.device), Spectrum(matrix))
        for subject, matrix in ((pair.base, base), (pair.tuned, tuned))
    )
    change = weight_change(first, second, top=SINGULAR_VALUES, spectra=spectra)
    return {
        "name": f"{name}[{part}]" if part else name,
        "layer": layer,
        "kind": kind,
        "rows": base.shape[0],
        "columns": base.shape[1] if base.ndim == 2 else 1,
        "norm_base": change.norm_base,
        "change": change.change,
        "relative_change": change.relative_change,
        "effective_rank": change.effective_rank,
        "stable_rank": change.stable_rank,
        **{f"sv{index}": value for index, value in enumerate(change.singular_values, start=1)},
        "intruders": change.intruders,
    }


def _require_alike(pair: Pair, base: dict[str, Tensor], tuned: dict[str, Tensor]) -> None:
    """See that the models have the same parameters, up to tokens that one does not have; before ranks go their own ways."""
    if missing := sorted(base.keys() ^ tuned.keys()):
        raise ModelError(
            f"models {pair.base.source!r} and {pair.tuned.source!r} do not have the same parameters: {', '.join(missing[:3])} "
            f"({len(missing)} in all) are in one only; were the input and output embeddings untied?"
        )
    vocabularies = (pair.base.anatomy.vocab_size, pair.tuned.anatomy.vocab_size)
    for name, first in base.items():
        second = tuned[name]
        if first.shape != second.shape and (first.shape[1:] != second.shape[1:] or (first.shape[0], second.shape[0]) != vocabularies):
            raise ModelError(f"parameter {name} has shape {tuple(second.shape)} in the tuned model and {tuple(first.shape)} in the base")


def _readers(subject: Subject) -> Iterator[tuple[int, str, Slice]]:
    for layer in subject.anatomy.attending:
        for part, where in subject.anatomy.blocks[layer].own_heads.slices.items():
            yield layer, part, where


def _parts(pair: Pair, name: str, base: Tensor, tuned: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Cut a parameter into the matrices it stores, oriented (out, in); embeddings of different length to their shared tokens."""
    module_name, _, key = name.rpartition(".")
    if base.shape != tuned.shape:
        base, tuned = base[: pair.vocab_size], tuned[: pair.vocab_size]
    tuned = tuned.to(base.device)
    if key == "weight" and base.ndim == 2 and is_conv1d(pair.base.plain.get_submodule(module_name)):
        base, tuned = base.T, tuned.T
    if base.ndim == 3 and key in ("weight", "bias"):  # a convolution over tokens
        return [("", base.flatten(1), tuned.flatten(1))]
    if base.ndim == 3:  # experts side by side
        return [(f"e{expert}", own, other) for expert, (own, other) in enumerate(zip(base, tuned, strict=True))]
    fused = [(part, where) for _, part, where in _readers(pair.base) if where.name == module_name]
    if len(fused) < 2:
        return [("", base, tuned)]
    return [(part, base[where.all_features], tuned[where.all_features]) for part, where in fused]


def _place(subject: Subject, name: str, part: str) -> tuple[int, str]:
    """Return the layer (−1 outside the blocks) and the kind of a parameter."""
    module_name, _, key = name.rpartition(".")
    module = subject.plain.get_submodule(module_name)
    if module is subject.anatomy.embedding:
        return -1, "embedding"
    if module is subject.anatomy.unembedding:
        return -1, "unembedding"
    for layer, block in enumerate(subject.anatomy.blocks):
        if not name.startswith(f"{block.name}."):
            continue
        reader = next((reader for _, reader, where in _readers(subject) if where.name == module_name), None)
        kind = part or reader or ("mlp" if module_name in block.mlp_linears else _unnamed(block, name))
        return layer, kind if key == "weight" or kind == "expert" else f"{kind}_{key}"
    return -1, "position" if "pos" in name or "wpe" in name else "norm"


def _unnamed(block: Block, name: str) -> str:
    """Return the kind of a block's parameter that no linear map of attention or the MLP holds."""
    if block.mixer is not None and name.startswith(f"{block.mixer.name}."):
        return "mixer"
    if block.experts is not None and name.startswith(f"{block.experts.name}."):
        return "expert"
    return "router" if block.experts is not None and name.startswith(block.mlp_prefix) else "norm"


def _heads(pair: Pair, base: dict[str, Tensor], tuned: dict[str, Tensor]) -> np.ndarray:
    """Return the relative change of every head's own slices; a shared key/value slice counts for each head that reads it."""
    anatomy = pair.base.anatomy
    squares: dict[int, list[Tensor]] = {layer: [] for layer in anatomy.attending}
    for layer, _, where in _readers(pair.base):
        first, second = (weights[f"{where.name}.weight"] for weights in (base, tuned))
        own, new = (_by_stored_head(where, weight) for weight in (first, second.to(first.device)))
        of_stored = torch.stack([(new - own).square().sum((1, 2)), own.square().sum((1, 2))])
        stored = list(dict.fromkeys(where.starts))
        of_heads = of_stored[:, index_for([stored.index(start) for start in where.starts], of_stored)]
        squares[layer].append(of_heads.to(pair.base.device))
    # fetched once: a wait for every head's number would leave the device without work
    change, size = torch.stack([torch.stack(parts).sum(0) for parts in squares.values()], dim=1).cpu().numpy()
    relative: np.ndarray = np.sqrt(change / size)
    return relative


def _by_stored_head(where: Slice, weight: Tensor) -> Float[Tensor, "stored width d_model"]:
    """Cut a map into the slices it stores, in float64: one for each head, or for each group that shares a key and a value."""
    oriented = weight.T if is_conv1d(where.module) else weight
    features = oriented if where.side == "output" else oriented.T
    return features[sent(where.all_features, weight.device)].double().unflatten(0, (-1, where.width))


def _layers(pair: Pair, table: pd.DataFrame) -> np.ndarray:
    squares = (
        table.assign(change=table["change"] ** 2, norm=table["norm_base"] ** 2).groupby("layer")[["change", "norm"]].sum()
    ).sort_index()
    inside = squares[squares.index >= 0]
    return np.sqrt(inside["change"].to_numpy() / inside["norm"].to_numpy())
