"""Statistics of a slice of logits: the largest, the rank of a target, entropy, divergence; each in as few sweeps as it takes.

The k largest logits lie in the k groups of 64 words with the largest maxima, so one sweep of maxima finds them exactly, where sorting would cost half as
much as the unembedding itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# words whose maximum is taken together
GROUP = 64


class TokenStats(NamedTuple):
    """Statistics of rows over the vocabulary; None for those not requested. Logarithms are natural, entropy and KL in nats.

    Attributes:
        top: ``(rows, k)``: the likeliest tokens, likeliest first.
        top_log_probability: ``(rows, k)``.
        target_log_probability: ``(rows)``; NaN where a row has no target.
        rank: ``(rows)``: 1 for the likeliest token. Of tokens with equal logits the lower id comes first, as in a stable sort. 0 without a target.
        entropy: ``(rows)``.
        kl: ``(rows)``: KL(final ‖ lens).
    """

    top: Int[Tensor, "rows k"]
    top_log_probability: Float[Tensor, "rows k"]
    target_log_probability: Float[Tensor, " rows"] | None = None
    rank: Int[Tensor, " rows"] | None = None
    entropy: Float[Tensor, " rows"] | None = None
    kl: Float[Tensor, " rows"] | None = None

    @classmethod
    def joined(cls, parts: Sequence[TokenStats]) -> TokenStats:
        """Join the statistics of consecutive rows."""
        # a column is None in all parts or in none
        return cls._make(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))


def to_probabilities(words: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Turn logits into probabilities in place, and return their logsumexp."""
    highest = words.amax(-1, keepdim=True)
    total = words.sub_(highest).exp_().sum(-1, keepdim=True)
    words.div_(total)
    return (highest + total.log())[:, 0]


def said_of(
    padded: Float[Tensor, "rows padded"],
    vocabulary: int,
    targets: Int[Tensor, " rows"] | None,
    *,
    k: int,
    ranks: bool,
    entropy: bool,
    scratch: Tensor | None = None,
) -> tuple[TokenStats, Float[Tensor, " rows"]]:
    """Return the statistics of some rows of logits, and their logsumexp.

    Args:
        padded: Logits, padded with −∞ to whole groups of words.
        vocabulary: Number of words.
        targets: A token per row, −1 for none.
        k: How many of the likeliest tokens.
        ranks: Also give the targets' ranks.
        entropy: Also give entropies.
        scratch: ``(rows or more, vocabulary or more)`` of the same type, overwritten.
    """
    words = padded[:, :vocabulary]
    # memory of this size, taken anew for every slice, would cost as much as a sweep
    swept = padded.new_empty(words.shape) if scratch is None else scratch[: len(words), :vocabulary]
    groups = padded.unflatten(1, (-1, GROUP))
    values, tokens = _largest(groups, groups.amax(-1), k)
    rank = None if targets is None or not ranks else _ranks(words, targets, swept)
    odds = torch.sub(words, values[:, :1], out=swept).exp_()
    total = odds.sum(-1)
    normaliser = values[:, 0] + total.log()
    stats = TokenStats(tokens, values - normaliser[:, None], rank=rank)
    if targets is not None:
        own = words.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        stats = stats._replace(target_log_probability=(own - normaliser).masked_fill(targets < 0, torch.nan))
    if entropy:
        stats = stats._replace(entropy=normaliser - odds.mul_(words).sum(-1) / total)
    return stats, normaliser


def _largest(groups: Float[Tensor, "rows groups words"], highest: Float[Tensor, "rows groups"], k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row and their columns."""
    chosen = highest.topk(min(k, highest.shape[1]), sorted=False).indices
    candidates = groups.gather(1, chosen[:, :, None].expand(-1, -1, GROUP))
    values, places = candidates.flatten(1).topk(k)
    return values, chosen.gather(1, places // GROUP) * GROUP + places % GROUP


def _ranks(words: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"], flags: Float[Tensor, "rows vocab"]) -> Int[Tensor, " rows"]:
    """Return 1 + the number of words before the target in a stable sort by falling logit; 0 without a target."""
    own = words.gather(1, targets.clamp(min=0)[:, None])
    # flags are numbers, not truth values: their sum is ten times as fast
    before = torch.gt(words, own, out=flags).sum(-1).long() + 1
    equal = torch.eq(words, own, out=flags).sum(-1)
    for row in (equal > 1).nonzero()[:, 0].tolist():
        before[row] += (words[row, : int(targets[row].clamp(min=0))] == own[row]).sum()
    return before.masked_fill(targets < 0, 0)


def divergence(
    final: Float[Tensor, "rows vocab"],
    final_normaliser: Float[Tensor, " rows"],
    lens: Float[Tensor, "rows vocab"],
    normaliser: Float[Tensor, " rows"],
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """Return KL(final ‖ lens) word by word, and the final probabilities."""
    probabilities = (final - final_normaliser[:, None]).exp()
    return (probabilities * (final - lens)).sum(-1) + (normaliser - final_normaliser), probabilities
