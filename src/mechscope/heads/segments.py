"""Attention from some rows of a text to some of its keys, and what chance gives.

Chance is the same head with a query of zero: it looks at every key it can see alike. Run through the very function that measured the head, it gives
the share of the visible keys that count, whatever hides the others (the future, padding, a sliding window).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.data.pairs import PairBatch, Span
from mechscope.instrument import AttentionCall, describe


def uniform(call: AttentionCall) -> AttentionCall:
    """Return a call with one head that looks at all keys it can see alike, and at no learned sink."""
    mask = call.mask if call.mask is None else call.mask[:, :1]
    return replace(
        call,
        query=torch.zeros_like(call.query[:, :1]),
        key=call.key[:, :1],
        value=call.value[:, :1],
        z=call.z[:, :, :1],
        mask=mask,
        sinks=None,
    )


def marked(batch: PairBatch, spans: Mapping[str, Sequence[Span]]) -> Bool[Tensor, "batch token"]:
    """Mark token spans, by the id of the pair; a text without any has nothing marked."""
    mask = torch.zeros_like(batch.real)
    for row, pair in enumerate(batch.pairs):
        for begin, end in spans.get(pair.id, ()):
            mask[row, batch.shift(row) + begin : batch.shift(row) + end] = True
    return mask


def masses(
    call: AttentionCall, batch: PairBatch, segments: Mapping[str, Bool[Tensor, "batch token"]]
) -> tuple[dict[str, Float[Tensor, "batch head token"]], dict[str, Float[Tensor, "batch 1 token"]]]:
    """Return every row's mass on each segment, and the same for a head that looks at all keys alike."""
    own, chance = (describe(one, batch.real, segments=segments) for one in (call, uniform(call)))
    return dict(own.segments), dict(chance.segments)


def row_means(values: Float[Tensor, "batch head token"], rows: Bool[Tensor, "batch token"]) -> Float[Tensor, "batch head"]:
    """Average over the marked rows of each text; NaN for a text without any. What stands in other rows does not matter."""
    rows = rows.to(values.device)[:, None]
    # rows of padding may hold NaN, which a product with zero would keep
    return torch.where(rows, values, 0).sum(-1) / rows.sum(-1)


def spread(whole: Float[Tensor, "batch head token"], part: Tensor, of: Tensor) -> Float[Tensor, "batch head token"]:
    """Return what a part of a segment would get if the mass on the whole were spread evenly over its visible keys.

    Args:
        whole: A head's mass on the segment.
        part: A uniform head's mass on the part, ``(batch, 1, token)``.
        of: A uniform head's mass on the segment.
    """
    return whole * torch.where(of > 0, part / of, 0)
