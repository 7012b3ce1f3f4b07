"""Attention knockout: which tokens must see which, and in which layers? (Geva et al. 2023)

Attention from query tokens to key tokens is cut (their scores become −∞) in a window of layers around each layer, because information can take a
detour through the neighbouring ones; or in one head at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mechscope.causal.effects import Effects, effects, place_columns
from mechscope.causal.places import places
from mechscope.causal.texts import Gathered, Progress, Runs, batches, check_fits, metric_of
from mechscope.data.pairs import PairBatch, Pairs, Where
from mechscope.errors import SettingsError
from mechscope.instrument import Knockout, Prefix
from mechscope.subject import Components, Subject


def knock_out(
    subject: Subject,
    pairs: Pairs,
    *,
    keys: Where,
    queries: Where = "last",
    window: int = 1,
    each_head: bool = False,
    components: Components | str | None = None,
    metric: str = "logit-diff",
    tokens_per_batch: int = 1024,
    seed: int = 0,
    progress: Progress | None = None,
) -> Effects:
    """Cut attention between tokens of the clean texts, one window of layers or one head at a time.

    Args:
        subject: The model.
        pairs: The texts; only the clean ones are run.
        keys: Tokens that are not seen: a segment, `changed`, positions (see `PairBatch.positions`).
        queries: Tokens that may not look at them.
        window: Layers of a window; it is cut short at the model's ends.
        each_head: Cut one head of one layer at a time instead.
        components: Only windows around these layers, or only these heads.
        metric: As for `patch`.
        tokens_per_batch: Most tokens of a batch of texts, padding included.
        seed: Seed of the bootstrap.
        progress: Called with a label, what is done and how much there is.

    Returns:
        One row per window (`layer` is its centre) or head.

    Raises:
        MechscopeError: Texts, positions or components do not fit the model or each other; no query stands behind a key, so nothing is cut.
    """
    layers = subject.anatomy.n_layers
    if not 1 <= window <= layers:
        raise SettingsError(f"a window of {window} layers does not fit a model of {layers}: choose 1 to {layers}")
    check_fits(subject, pairs)
    where = places(subject.anatomy, "head" if each_head else "residual", components)
    cuts: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = []
    rows: list[dict[str, Any]] = []
    for place in where:
        first = max(0, place.layer - (window - 1) // 2)
        span = (place.layer,) if each_head else tuple(range(first, min(layers, place.layer + window // 2 + 1)))
        cuts.append((span, None if place.head is None else (place.head,)))
        name = str(place) if each_head else f"layers:{span[0]}" + (f"-{span[-1]}" if len(span) > 1 else "")
        rows.append({**place_columns(place, f"{_name(queries)} → {_name(keys)}"), "component": name, "site": "knockout"})
    gathered, done = Gathered(pairs), 0
    for batch in batches(pairs, tokens_per_batch):
        at, unseen = batch.positions(queries), batch.positions(keys)
        _require_something_cut(batch, at, unseen, queries, keys)
        clean = Prefix(subject, batch.clean, batch.real, sites={"mask"})
        runs = Runs(clean, metric_of(metric, batch, clean))

        def tell(number: int, batch: PairBatch = batch) -> None:
            nonlocal done
            done += number * len(batch.pairs)
            if progress is not None:
                progress("knocking out attention", done, len(cuts) * len(pairs))

        units = [[Knockout(layer, at, unseen, heads) for layer in span] for span, heads in cuts]
        gathered.put("unchanged", batch, runs.unchanged())
        gathered.put("cut", batch, runs.of(units, progress=tell))
    return effects(rows, gathered["cut"], gathered["unchanged"], metric=metric, seed=seed, window=window)


def _name(where: Where) -> str:
    if isinstance(where, str | int):
        return str(where)
    return ",".join(map(str, where)) if isinstance(where, Sequence) else "mask"


def _require_something_cut(batch: PairBatch, queries: Any, keys: Any, asked: Where, unseen: Where) -> None:
    """Refuse texts in which every key stands behind every query: attention there is none already."""
    last_query = queries.shape[1] - 1 - queries.flip(1).to(int).argmax(1)
    first_key = keys.to(int).argmax(1)
    if bool((first_key > last_query).any()):
        pair = batch.pairs[int((first_key > last_query).nonzero()[0, 0])]
        raise SettingsError(
            f"pair {pair.id!r}: keys {_name(unseen)!r} all stand behind queries {_name(asked)!r}, which cannot see them anyway: swap the two"
        )
