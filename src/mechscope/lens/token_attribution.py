"""Direct logit attribution, token by token: at which predicted token a part contributes, and from which source token a head brings it.

A head's write at query i is Σ_j P_ij v_j W_O, a sum over the tokens j it looks at (Elhage et al. 2021: attention moves information between residual
streams). So its contribution splits by source token without rest, P_ij ⟨v_j, u W_Oᵀ⟩; the value bias rides on v.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import check_fits, per_text
from mechscope.instrument.attention import AttentionCall, observed
from mechscope.instrument.execution import Execution
from mechscope.instrument.kernels import pattern_blocks
from mechscope.lens.decomposition import Decomposition
from mechscope.lens.question import Question
from mechscope.subject import Components, Subject
from mechscope.subject.components import chosen_heads


def attribute_positions(
    subject: Subject, pairs: Pairs, *, metric: str = "target-logit", execution: Execution = Execution()
) -> pd.DataFrame:
    """Attribute a metric to the parts of a model at every position that is read, for texts few enough to be looked at one by one.

    Args:
        subject: The model.
        pairs: The texts; corrupt ones are not run.
        metric: `logit-diff` (right answers − wrong ones after the last token), or `target-logit` (the target tokens', or the right
            answers', less the mean over the vocabulary).
        execution: Tokens of a batch (1,024 by default).

    Returns:
        One row per text, position and part: `text` (id), `position` (of the token whose next token is predicted), `token` (what stands there),
        `component`, `kind`, `layer`, `head`, `effect` (in logits of that one prediction: a text's contribution is the mean over its positions).

    Raises:
        MechscopeError: Texts or metric do not fit the model, or it cannot be taken apart.
    """
    check_fits(subject, pairs)
    taken_apart = Decomposition(subject)
    names = pd.DataFrame([asdict(part) for part in taken_apart.parts])

    def attributed(batch: PairBatch) -> list[pd.DataFrame]:
        tables = []
        question = Question.of(metric, batch)
        parts = taken_apart.of(batch, question).parts.numpy()
        for row, pair in enumerate(batch.pairs):
            rows, positions = _rows_of(batch, question, row)
            repeated = pd.DataFrame({name: np.tile(column, len(rows)) for name, column in names.items()})
            at = np.repeat(positions, len(names))
            tokens = np.repeat([subject.spelling.token(pair.clean[position]) for position in positions], len(names))
            tables.append(repeated.assign(text=pair.id, position=at, token=tokens, effect=parts[rows].ravel()))
        return tables

    tables = per_text(pairs, attributed, execution, tokens=1024, label="attributing positions")
    order = ["text", "position", "token", "component", "kind", "layer", "head", "effect"]
    return pd.concat(tables, ignore_index=True)[order]


@torch.no_grad()
def attribute_sources(
    subject: Subject, pairs: Pairs, heads: Components | str, *, metric: str = "logit-diff", execution: Execution = Execution()
) -> pd.DataFrame:
    """Split chosen heads' contributions by the tokens they look at.

    Args:
        subject: The model.
        pairs: The texts; corrupt ones are not run.
        heads: Which heads, for example `"a3.h5,a4.h0"`.
        metric: `logit-diff` (right answers − wrong ones after the last token), or `target-logit` (the target tokens', or the right
            answers', less the mean over the vocabulary).
        execution: Tokens of a batch (1,024 by default).

    Returns:
        One row per text, head, query and source token: `text` (id), `component`, `layer`, `head`, `query` (position that is read), `source` (position
        looked at, up to the query), `token` (what stands at the source), `attention` (fraction), `effect` (in logits). A text's effects of a head
        sum to the head's effect in `attribute_logits`.

    Raises:
        MechscopeError: Texts, heads or metric do not fit the model, or it cannot be taken apart.
    """
    check_fits(subject, pairs)
    chosen = chosen_heads(subject.anatomy, heads)
    taken_apart = Decomposition(subject)

    def split(batch: PairBatch) -> list[pd.DataFrame]:
        tables = []
        question = Question.of(metric, batch)
        sources = _Sources(taken_apart, batch, question, chosen)
        for row, pair in enumerate(batch.pairs):
            of_text = []
            rows, positions = _rows_of(batch, question, row)
            begin = batch.shift(row)
            seen = [(index, slice(begin, begin + at + 1)) for index, at in zip(rows, positions, strict=True)]
            source = np.concatenate([np.arange(at + 1) for at in positions])
            spelled = np.array(subject.spelling.tokens(pair.clean), dtype=object)
            where = {"text": pair.id, "query": np.repeat(positions, positions + 1), "source": source, "token": spelled[source]}
            for layer, head in chosen:
                share, effect = (values.double().numpy() for values in sources.of(layer, head))
                attention, effects = (np.concatenate([one[index, tokens] for index, tokens in seen]) for one in (share, effect))
                named = {"component": f"a{layer}.h{head}", "layer": layer, "head": head}
                columns = {"attention": attention, "effect": effects / len(rows)}
                of_text.append(pd.DataFrame({**where, **named, **columns}))
            tables.append(pd.concat(of_text, ignore_index=True))
        return tables

    tables = per_text(pairs, split, execution, tokens=1024, label="attributing sources")
    order = ["text", "component", "layer", "head", "query", "source", "token", "attention", "effect"]
    return pd.concat(tables, ignore_index=True)[order]


class _Sources:
    """One batch's heads, split by source token."""

    def __init__(self, taken_apart: Decomposition, batch: PairBatch, question: Question, chosen: tuple[tuple[int, int], ...]) -> None:
        self._question, self._apart = question, taken_apart
        self._split: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._chosen = chosen
        with taken_apart.subject.active(), observed(taken_apart.subject, self._tap):
            self._direction, _ = question.directions(taken_apart.readout, taken_apart.dtype)
            walk, _ = taken_apart.embedded(batch)
            rows = question.reading.take(walk.run()[None])[0]
            self._scale = taken_apart.readout.scale(rows.to(taken_apart.dtype)).cpu()

    def of(self, layer: int, head: int) -> tuple[Float[Tensor, "read token"], Float[Tensor, "read token"]]:
        """Return a head's attention from the rows that are read, and what comes from there."""
        share, effect = self._split[layer, head]
        return share, effect * self._scale

    def _tap(self, call: AttentionCall) -> None:
        heads = [head for layer, head in self._chosen if layer == call.layer]
        if not heads:
            return
        reading, dtype = self._question.reading, self._apart.dtype
        z = reading.take(call.z[None])[0]
        pulled = self._apart.pulled(call.layer, z, self._direction)[:, heads]  # (read, chosen, d_head)
        value = call.value[:, [head // (z.shape[1] // call.value.shape[1]) for head in heads]].to(dtype)
        shares, effects = [], []
        for row in range(self._question.texts):
            mine = reading.example == row
            share = _pattern_rows(call, row, reading.position[mine], heads, dtype)
            shares.append(share)
            effects.append(share * torch.einsum("rhe,hte->rht", pulled[mine.to(pulled.device)], value[row]))
        share, effect = torch.cat(shares).cpu(), torch.cat(effects).cpu()
        for index, head in enumerate(heads):
            self._split[call.layer, head] = (share[:, index], effect[:, index])


def _pattern_rows(call: AttentionCall, row: int, queries: Tensor, heads: list[int], dtype: torch.dtype) -> Float[Tensor, "query head key"]:
    """Return some query rows of some heads' patterns in one text."""
    queries = queries.to(call.query.device)
    keys = torch.arange(call.key.shape[2], device=call.query.device)
    if call.mask is None:
        mask = (keys <= queries[:, None])[None, None]
    else:  # one for all heads, or one for each
        mask = call.mask[row : row + 1, :, queries]
        mask = mask if mask.shape[1] == 1 else mask[:, heads]
    group = call.query.shape[1] // call.key.shape[1]
    query, key = call.query[row : row + 1, heads][:, :, queries], call.key[row : row + 1, [head // group for head in heads]]
    sinks = None if call.sinks is None else call.sinks[heads]
    blocks = pattern_blocks(query, key, scaling=call.scaling, mask=mask, softcap=call.softcap, sinks=sinks, dtype=dtype)
    return torch.cat([block.log_pattern.exp() for block in blocks], dim=2)[0].transpose(0, 1)


def _rows_of(batch: PairBatch, question: Question, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of the rows that are read belong to a text, and their positions in it."""
    rows = (question.reading.example == row).nonzero().flatten()
    return rows.numpy(), question.reading.position[rows].numpy() - batch.shift(row)
