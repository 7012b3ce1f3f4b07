"""Heads in vocabulary space: which tokens a head promotes when it attends to one, and which tokens attend to which.

Entry (source, target) of W_E W_OV W_U is what attending to a source adds to a target's logit; entry (query, key) of W_E W_QK W_Eᵀ is how much a query
token looks for a key token (Elhage et al. 2021; Dar et al. 2023, "Analyzing transformers in embedding space"). Both matrices are vocabulary ×
vocabulary and are never formed: the most extreme entries of all, or of some rows, are found exactly by blocks. For a pair of models the same
entries of W_tuned − W_base, seen through the base's embeddings: what did the update teach this head to copy or to attend to?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.subject.components import Components, chosen_heads
from mechscope.weights.extremes import extremes, extremes_of_rows
from mechscope.weights.forms import Model, forms_of
from mechscope.weights.vocabulary import Embedding, Vocabulary

OV_COLUMNS = ("layer", "head", "component", "sign", "place", "source", "target", "value", "source_id", "target_id")
QK_COLUMNS = ("layer", "head", "component", "offset", "sign", "place", "query", "key", "value", "query_id", "key_id")


@torch.no_grad()
def ov_tokens(
    model: Model,
    *,
    heads: Components | str | None = None,
    sources: Sequence[int] | None = None,
    k: int = 10,
    embedding: Embedding = "normalised",
    effective: bool = False,
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """List what heads' OV circuits promote and suppress most.

    Args:
        model: A model, or a pair for what fine-tuning changed.
        heads: Which heads; by default all.
        sources: Token ids: the top k targets of each. By default the top k entries of the whole vocabulary × vocabulary matrix.
        k: How many per sign.
        embedding: How tokens are read: `"normalised"` or `"raw"`, see `Vocabulary`.
        effective: Whether tokens are read with what the first MLP makes of them.
        execution: Progress.

    Returns:
        One row per head, sign (`promoted`, `suppressed`) and place (from 1; within a source where sources are given): `layer`, `head`, `component`,
        `sign`, `place`, `source`, `target`, `value` (logits at a final norm of scale one), `source_id`, `target_id`. Heads that
        fine-tuning left as they were have no rows.

    Raises:
        SettingsError: Heads or tokens do not fit the model, or k is below 1.
        ModelError: The model's heads cannot be taken apart.
    """
    forms = forms_of(model)
    vocabulary = Vocabulary(forms.subject, embedding=embedding, effective=effective)
    rows = None if sources is None else vocabulary.checked(sources, "sources")

    def sides(layer: int, head: int) -> tuple[Tensor, Tensor]:
        form = forms.ov(layer, head)
        return vocabulary.read(form, layer), vocabulary.written(form.right)

    chosen = chosen_heads(forms.subject.anatomy, heads)
    entries = _entries(chosen, sides, rows, _positive(k), execution, "OV circuits")
    return _table(vocabulary, entries, ("source", "target"), ("promoted", "suppressed"), OV_COLUMNS)


@torch.no_grad()
def qk_tokens(
    model: Model,
    *,
    heads: Components | str | None = None,
    queries: Sequence[int] | None = None,
    offset: int = 0,
    k: int = 10,
    embedding: Embedding = "normalised",
    effective: bool = False,
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """List which tokens attend to which, by heads' QK circuits.

    Read `"normalised"`, a value is the model's own score for two tokens that stand alone, before any soft cap. Learned positions have no part in it: see
    `position_scores`.

    Args:
        model: A model, or a pair for what fine-tuning changed.
        heads: Which heads; by default all.
        queries: Token ids: the top k keys of each. By default the top k entries of the whole vocabulary × vocabulary matrix.
        offset: Query position less key position, in tokens. Counts in rotary families only; at the default, 0, nothing is turned: content alone.
        k: How many per sign.
        embedding: How tokens are read: `"normalised"` or `"raw"`, see `Vocabulary`.
        effective: Whether tokens are read with what the first MLP makes of them.
        execution: Progress.

    Returns:
        One row per head, sign (`attended`, `avoided`) and place (from 1; within a query where queries are given): `layer`, `head`, `component`, `offset`,
        `sign`, `place`, `query`, `key`, `value` (scores before softmax), `query_id`, `key_id`. Heads that fine-tuning left as they were have no rows.

    Raises:
        SettingsError: Heads, tokens or the offset do not fit the model, or k is below 1.
        ModelError: The model's heads cannot be taken apart, or its queries and keys have norms of their own.
    """
    forms = forms_of(model)
    vocabulary = Vocabulary(forms.subject, embedding=embedding, effective=effective)
    rows = None if queries is None else vocabulary.checked(queries, "queries")

    def sides(layer: int, head: int) -> tuple[Tensor, Tensor]:
        form = forms.qk(layer, head, offset=offset)
        return vocabulary.read(form, layer), vocabulary.read(form, layer, side="right")

    chosen = chosen_heads(forms.subject.anatomy, heads)
    entries = _entries(chosen, sides, rows, _positive(k), execution, "QK circuits")
    return _table(vocabulary, entries, ("query", "key"), ("attended", "avoided"), QK_COLUMNS, offset=offset)


@dataclass(frozen=True)
class _Extremes:
    """Extreme entries of one head's matrix."""

    layer: int
    head: int
    high: bool
    rows: list[int]
    columns: list[int]
    values: list[float]
    places: list[int]


def _entries(
    chosen: Sequence[tuple[int, int]],
    sides: Callable[[int, int], tuple[Tensor, Tensor]],
    rows: Sequence[int] | None,
    k: int,
    execution: Execution,
    label: str,
) -> Iterator[_Extremes]:
    for done, (layer, head) in enumerate(chosen):
        execution.told(label, done, len(chosen))
        a, b = sides(layer, head)
        if a.shape[1]:  # nothing changed where nothing is left of the difference
            yield from _of_head(layer, head, a, b, rows, k)
    execution.told(label, len(chosen), len(chosen))


def _of_head(layer: int, head: int, a: Tensor, b: Tensor, rows: Sequence[int] | None, k: int) -> Iterator[_Extremes]:
    if rows is None:
        for high, best in zip((True, False), extremes(a, b, k=k), strict=True):
            places = list(range(1, len(best.values) + 1))
            yield _Extremes(layer, head, high, best.rows.tolist(), best.columns.tolist(), best.values.tolist(), places)
        return
    for high, (columns, values) in zip((True, False), extremes_of_rows(a[list(rows)], b, k=k), strict=True):
        each = columns.shape[1]
        repeated = [row for row in rows for _ in range(each)]
        yield _Extremes(
            layer, head, high, repeated, columns.flatten().tolist(), values.flatten().tolist(), [*range(1, each + 1)] * len(rows)
        )


def _table(
    vocabulary: Vocabulary,
    entries: Iterator[_Extremes],
    names: tuple[str, str],
    signs: tuple[str, str],
    order: tuple[str, ...],
    **same: int,
) -> pd.DataFrame:
    spelling, parts = vocabulary.subject.spelling, []
    for one in entries:
        head = {"layer": one.layer, "head": one.head, "component": f"a{one.layer}.h{one.head}", "sign": signs[0] if one.high else signs[1]}
        tokens = {names[0]: spelling.tokens(one.rows), names[1]: spelling.tokens(one.columns)}
        ids = {f"{names[0]}_id": one.rows, f"{names[1]}_id": one.columns}
        parts.append(pd.DataFrame({**head, "place": one.places, **tokens, "value": one.values, **ids, **same}))
    return pd.concat(parts, ignore_index=True)[list(order)] if parts else pd.DataFrame(columns=list(order))


def _positive(k: int) -> int:
    if k < 1:
        raise SettingsError(f"the top {k} entries: ask for at least 1")
    return k
