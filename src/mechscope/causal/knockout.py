"""Attention knockout: which tokens must see which, and in which layers? (Geva et al. 2023)

Attention from query tokens to key tokens is cut (their scores become −∞) in a window of layers around each layer, because information can take a
detour through the neighbouring ones; or in one head at a time. `attention_flow` does it for every pair of segments: the way information takes through a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from mechscope.causal.effects import Effects, effects, place_columns
from mechscope.causal.places import places
from mechscope.data.pairs import PairBatch, Pairs, Where
from mechscope.data.scoring import PerText, Runs, batches, check_fits, metric_of
from mechscope.errors import SettingsError
from mechscope.instrument import CachedRun, Knockout
from mechscope.instrument.execution import Execution
from mechscope.subject import Components, Subject
from mechscope.subject.anatomy import Anatomy

# layers cut together, and in each of them which heads (None for all)
Cut = dict[int, tuple[int, ...] | None]


def attention_knockout(
    subject: Subject,
    pairs: Pairs,
    *,
    keys: Where,
    queries: Where = "last",
    window: int = 1,
    heads: Components | str | None = None,
    each_head: bool = False,
    components: Components | str | None = None,
    metric: str = "logit-diff",
    execution: Execution = Execution(),
) -> Effects:
    """Cut attention between tokens of the clean texts, one window of layers or one head at a time.

    Args:
        subject: The model.
        pairs: The texts; only the clean ones are run.
        keys: Tokens that are not seen: a segment, `changed`, positions (see `PairBatch.positions`).
        queries: Tokens that may not look at them.
        window: Layers of a window; it is cut short at the model's ends.
        heads: Cut only these heads of a window's layers; None for all.
        each_head: Cut one head of one layer at a time instead.
        components: Only windows around these layers, or only these heads.
        metric: `logit-diff`, `probability`, `loss` or `kl`.
        execution: Tokens of a batch (1,024 by default), progress.

    Returns:
        One row per window (`layer` is its centre) or head.

    Raises:
        MechscopeError: Texts, positions or components do not fit the model or each other; no query stands behind a key, so nothing is cut; or a
            query would see no token at all.
    """
    if each_head and heads is not None:
        raise SettingsError("heads chooses what is cut in a window of layers, each_head cuts single heads: choose those by components")
    for batch in batches(pairs, execution.tokens(1024)):
        _require_cuttable(batch, queries, keys)
    rows, cuts = _cuts(subject.anatomy, window, heads, each_head=each_head, components=components)
    label = f"{_name(queries)} → {_name(keys)}"
    rows = [{**row, "positions": label} for row in rows]
    values, unchanged = _cut_off(subject, pairs, cuts, [(queries, keys)], metric, execution)
    return effects(rows, values, unchanged, metric=metric, window=window)


def attention_flow(
    subject: Subject,
    pairs: Pairs,
    segments: Sequence[str],
    *,
    window: int = 1,
    heads: Components | str | None = None,
    components: Components | str | None = None,
    metric: str = "logit-diff",
    execution: Execution = Execution(),
) -> Effects:
    """Cut attention from every segment to every segment it can see, one window of layers at a time.

    Args:
        subject: The model.
        pairs: The texts; only the clean ones are run.
        segments: Names of segments, or `last`, `target`, `changed`.
        window: Layers of a window; it is cut short at the model's ends.
        heads: Cut only these heads of a window's layers; None for all.
        components: Only windows around these layers.
        metric: `logit-diff`, `probability`, `loss` or `kl`.
        execution: Tokens of a batch (1,024 by default), progress.

    Returns:
        One row per window and ordered pair of segments, `positions` being `query → key`; a text counts where there is something to cut. Pairs that no
        text counts for are left out and named in the notes.

    Raises:
        MechscopeError: Texts, segments or components do not fit the model or each other; or no segment can see another.
    """
    if not segments or len(set(segments)) < len(segments):
        raise SettingsError(f"segments {list(segments)}: give one name or more, each once")
    rows, cuts = _cuts(subject.anatomy, window, heads, each_head=False, components=components)
    possible: dict[tuple[str, str], bool] = {(query, key): False for query in segments for key in segments}
    for batch in batches(pairs, execution.tokens(1024)):
        for query, key in possible:
            possible[query, key] |= bool((~_nothing_to_cut(batch, query, key)).any())
    spans = [pair for pair, some in possible.items() if some]
    if not spans:
        raise SettingsError(f"none of the segments {', '.join(segments)} can see another: there is no attention to cut")
    values, unchanged = _cut_off(subject, pairs, cuts, spans, metric, execution)
    labelled = [{**row, "positions": f"{query} → {key}"} for query, key in spans for row in rows]
    left_out = [f"{query} → {key}" for (query, key), some in possible.items() if not some]
    return effects(labelled, values, unchanged, metric=metric, window=window, left_out=left_out)


def _cuts(
    anatomy: Anatomy, window: int, heads: Components | str | None, *, each_head: bool, components: Components | str | None
) -> tuple[list[dict[str, Any]], list[Cut]]:
    """Return the columns that name each cut, and the cuts."""
    if not 1 <= window <= anatomy.n_layers:
        raise SettingsError(f"a window of {window} layers does not fit a model of {anatomy.n_layers}: choose 1 to {anatomy.n_layers}")
    if not each_head:  # past a cut, what mixes tokens in other layers would still carry what is looked for
        anatomy.require_all_attending("cutting attention over windows of layers")
    chosen: dict[int, list[int]] | None = None
    if heads is not None:
        chosen = {}
        for place in places(anatomy, "head", heads):
            chosen.setdefault(place.layer, []).append(-1 if place.head is None else place.head)
    rows: list[dict[str, Any]] = []
    cuts: list[Cut] = []
    for place in places(anatomy, "head" if each_head else "residual", components):
        if each_head:
            span, name = range(place.layer, place.layer + 1), str(place)
        else:
            span = range(max(0, place.layer - (window - 1) // 2), min(anatomy.n_layers, place.layer + window // 2 + 1))
            name = f"layers:{span[0]}" + (f"-{span[-1]}" if len(span) > 1 else "")
        single = None if place.head is None else (place.head,)
        cuts.append({layer: single if chosen is None else tuple(chosen[layer]) for layer in span if chosen is None or layer in chosen})
        rows.append({**place_columns(place), "component": name, "site": "knockout"})
    return rows, cuts


def _cut_off(
    subject: Subject, pairs: Pairs, cuts: Sequence[Cut], spans: Sequence[tuple[Where, Where]], metric: str, execution: Execution
) -> tuple[np.ndarray, np.ndarray]:
    """Return the metric of every cut of every pair of positions, pairs of positions outermost, and of the whole model."""
    check_fits(subject, pairs)
    gathered = PerText(pairs)

    def cut_off(batch: PairBatch) -> dict[str, np.ndarray]:
        clean = CachedRun(subject, batch.clean, batch.real, sites={"mask"})
        runs = Runs(clean, metric_of(metric, batch, clean))
        masks = [(batch.positions(queries), batch.positions(keys)) for queries, keys in spans]
        units = [[Knockout(layer, at, unseen, heads) for layer, heads in cut.items()] for at, unseen in masks for cut in cuts]
        values = runs.of(units, progress=gathered.step)
        untouched = np.stack([_nothing_to_cut(batch, queries, keys).numpy() for queries, keys in spans])
        values[untouched.repeat(len(cuts), axis=0)] = np.nan
        return {"unchanged": runs.unchanged(), "cut": values}

    gathered.run(cut_off, execution, tokens=1024, label="knocking out attention", units=len(spans) * len(cuts))
    return gathered["cut"], gathered["unchanged"]


def _name(where: Where) -> str:
    if isinstance(where, str | int):
        return str(where)
    return ",".join(map(str, where)) if isinstance(where, Sequence) else "mask"


def _unseen_anyway(queries: Bool[Tensor, "batch token"], keys: Bool[Tensor, "batch token"]) -> Bool[Tensor, " batch"]:
    """Mark texts in which every key stands behind every query: attention there is none already."""
    return ~(queries & (keys.cumsum(1) > 0)).any(1)


def _blinded(batch: PairBatch, queries: Bool[Tensor, "batch token"], keys: Bool[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
    """Mark queries that would see no token: the softmax of nothing is not defined."""
    return queries & ((batch.real & ~keys).cumsum(1) == 0)


def _nothing_to_cut(batch: PairBatch, queries: Where, keys: Where) -> Bool[Tensor, " batch"]:
    """Mark texts in which the cut is empty or not defined."""
    at, unseen = batch.positions(queries), batch.positions(keys)
    return _unseen_anyway(at, unseen) | _blinded(batch, at, unseen).any(1)


def _require_cuttable(batch: PairBatch, queries: Where, keys: Where) -> None:
    """Refuse cuts that are empty or not defined in some text."""
    at, unseen = batch.positions(queries), batch.positions(keys)
    if (row := _unseen_anyway(at, unseen).nonzero()).numel():
        raise SettingsError(
            f"pair {batch.pairs[int(row[0])].id!r}: keys {_name(keys)!r} all stand behind queries {_name(queries)!r}, which cannot see them "
            "anyway: swap the two"
        )
    if (place := _blinded(batch, at, unseen).nonzero()).numel():
        row_at, column = place[0].tolist()
        raise SettingsError(
            f"pair {batch.pairs[row_at].id!r}: token {column - batch.shift(row_at)} of queries {_name(queries)!r} sees nothing but keys "
            f"{_name(keys)!r}: leave it out of the queries, or one token it sees out of the keys"
        )
