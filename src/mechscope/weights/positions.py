"""Heads in position space: how much a query looks for a key by where it stands.

Learned positions have a matrix of their own, W_pos W_QK W_posᵀ (Elhage et al. 2021): in an attention-only model whose first layer reads positions as they
are embedded, a previous-token head shows there as its first lower diagonal. Rotary families have no vectors of positions; what is left of position
there is the score that an average query gives an average key at each offset, the mean over all pairs of tokens.

This finds no previous-token heads in general. Positions are read as if nothing had been added to them, which holds in layer 0 alone, and tokens, whose
scores may be larger, are left out. Measured: of a two-layer attention-only model the known head is first (all queries score the token before
highest); of GPT-2's 144 heads the known ones rank 80th and 100th; of a GPT-2 of 7 million parameters on news, the four heads that attend most to the token
before rank 15th to 22nd of 48 by share, with a rank correlation of .01 over heads, and no contrast of the scores does better (−.4 to −.3). Which
heads attend to the token before, `pattern_roles` measures on texts.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.subject.components import Components, chosen_heads
from mechscope.subject.load import Subject
from mechscope.weights.bilinear import Bilinear
from mechscope.weights.forms import Forms
from mechscope.weights.rotary import score_matrices
from mechscope.weights.vocabulary import Embedding, Vocabulary, position_rows

# queries whose scores for all keys are held at once
_QUERIES = 256


@torch.no_grad()
def position_scores(
    subject: Subject, *, heads: Components | str | None = None, offsets: int = 16, embedding: Embedding = "normalised"
) -> pd.DataFrame:
    """List heads' scores by the offset between query and key.

    Args:
        subject: The model.
        heads: Which heads; by default all.
        offsets: How many, from 0 (a query's own position) on.
        embedding: How positions (or tokens, in rotary families) are read: `"normalised"` by the layer's norm, each by itself, or `"raw"`.

    Returns:
        One row per head and offset: `layer`, `head`, `component`, `space` (`learned` or `rotary`), `offset`, `score` (before softmax: the mean over
        all queries that have this many keys behind them, or over all pairs of tokens) and `share` (the share of these queries, 0–1, that score the key at
        this offset highest of all keys they can see, by position alone: no sign of a previous-token head behind layer 0; NaN in rotary families).

    Raises:
        SettingsError: Heads or the number of offsets do not fit the model.
        ModelError: Heads cannot be taken apart, or queries and keys have norms of their own.
    """
    if not 1 <= offsets <= subject.anatomy.max_positions:
        raise SettingsError(f"{offsets} offsets: the model has {subject.anatomy.max_positions} positions, ask for 1 to as many")
    forms, vocabulary, learned = Forms(subject), Vocabulary(subject, embedding=embedding), position_rows(subject)
    rows: list[dict[str, Any]] = []
    turned: dict[int, Tensor] = {}
    for layer, head in chosen_heads(subject.anatomy, heads):
        if layer not in turned:
            turned = {layer: score_matrices(subject, layer, range(offsets))}  # one layer's at a time
        if learned is not None:
            scores, shares = _of_learned(forms.bare_qk(layer, head, turned[layer][0]), learned, vocabulary, layer, offsets)
        else:
            scores, shares = _of_rotary(forms, vocabulary, layer, head, turned[layer]), [math.nan] * offsets
        name = {"layer": layer, "head": head, "component": f"a{layer}.h{head}", "space": "rotary" if learned is None else "learned"}
        rows += [
            {**name, "offset": offset, "score": score, "share": share}
            for offset, (score, share) in enumerate(zip(scores, shares, strict=True))
        ]
    return pd.DataFrame(rows)


def _of_learned(form: Bilinear, learned: Tensor, vocabulary: Vocabulary, layer: int, offsets: int) -> tuple[list[float], list[float]]:
    positions = vocabulary.as_read(learned, layer)
    query, key = (vocabulary.through(positions, form, side=side).double() for side in ("left", "right"))
    first, last = offsets - 1, len(query)
    at = [(query[first:] * key[first - offset : last - offset]).sum(1).mean() for offset in range(offsets)]
    best = torch.cat([_offsets_of_best(query, key, range(start, min(start + _QUERIES, last))) for start in range(first, last, _QUERIES)])
    return [float(score) for score in at], [float((best == offset).double().mean()) for offset in range(offsets)]


def _offsets_of_best(query: Tensor, key: Tensor, where: range) -> Tensor:
    places = torch.arange(where.start, where.stop, device=query.device)
    scores = query[places] @ key.T
    unseen = torch.arange(len(key), device=query.device) > places[:, None]
    return places - scores.masked_fill(unseen, -torch.inf).argmax(1)


def _of_rotary(forms: Forms, vocabulary: Vocabulary, layer: int, head: int, turned: Tensor) -> list[float]:
    average = vocabulary.rows(layer).double().mean(0, keepdim=True)
    scores = []
    for matrix in turned:
        form = forms.bare_qk(layer, head, matrix)
        query, key = (vocabulary.through(average, form, side=side) for side in ("left", "right"))
        scores.append(float((query * key).sum()))
    return scores
