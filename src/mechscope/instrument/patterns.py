"""Statistics of attention patterns: entropy, divergence between two models, distance, sink, mass on segments, Gini.

Anything linear in the pattern P is attention with another value matrix. With scores s_ij = scale · q_i·k_j and logsumexp lse_i

    entropy      H_i      = lse_i − scale · q_i · (P K)_i
    KL(P‖Q)_i             = −H_i(P) − scale' · q'_i · (P K')_i + lse'_i        q', k', lse' of the other model, same head
    distance_i            = i − (P · positions)_i
    sink_i                = exp(s_i0 − lse_i)
    segment mass          = P · 1_segment

so no L × L map is ever held (idea 2 of the design). Soft-capped scores, sliding windows shorter than the text and masks that are not padding
go through the exact block-of-queries path instead. All values are per query row; entropies in nats.

Heads with a learned sink (gpt-oss) put a part s of their attention on no key. Their entropy, distance and Gini coefficient are those over the keys,
p / (1 − s); masses and divergences count the sink as one more key, so that masses and s sum to one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.instrument.attention import AttentionCall
from mechscope.instrument.kernels import PatternBlock, averages, is_fusable, pattern_blocks, statistics_dtype
from mechscope.instrument.padding import Padding
from mechscope.shapes import by_shape
from mechscope.subject.placement import sent

Method = Literal["auto", "fused", "exact"]
# where a mask says whether it is padding alone, once that was looked at
_SEEN = "_mechscope_only_padding"


@dataclass(frozen=True)
class PatternStatistics:
    """What each query row of each head looks at; every tensor is ``(batch, head, query)``. Rows of padding hold no meaning.

    Attributes:
        entropy: Entropy in nats.
        relative_entropy: Entropy over the logarithm of the number of keys the row can see, 0 to 1; NaN for a row that sees one key.
        distance: Expected distance in tokens from the query back to the key.
        sink: Mass on the first real token.
        segments: Mass on each named set of keys.
        gini: Gini coefficient of the row over the keys it can see; None unless wanted.
        learned_sink: Mass s on a head's learned sink; None in families without.
        entropy_with_sink: Entropy with the learned sink as one more key; None in families without.
    """

    entropy: Float[Tensor, "batch head query"]
    relative_entropy: Float[Tensor, "batch head query"]
    distance: Float[Tensor, "batch head query"]
    sink: Float[Tensor, "batch head query"]
    segments: Mapping[str, Float[Tensor, "batch head query"]]
    gini: Float[Tensor, "batch head query"] | None = None
    learned_sink: Float[Tensor, "batch head query"] | None = None
    entropy_with_sink: Float[Tensor, "batch head query"] | None = None

    __repr__ = by_shape


@dataclass(frozen=True)
class PatternComparison:
    """Two models' patterns of the same heads over the same tokens.

    Attributes:
        base: Statistics of the first pattern P.
        tuned: Statistics of the second pattern Q.
        kl_base_tuned: Σ_j P log(P/Q), nats, ``(batch, head, query)``.
        kl_tuned_base: Σ_j Q log(Q/P).
    """

    base: PatternStatistics
    tuned: PatternStatistics
    kl_base_tuned: Float[Tensor, "batch head query"]
    kl_tuned_base: Float[Tensor, "batch head query"]

    __repr__ = by_shape


def describe(
    call: AttentionCall,
    real: Bool[Tensor, "batch query"] | Padding | None = None,
    *,
    segments: Mapping[str, Bool[Tensor, "batch query"]] | None = None,
    gini: bool = False,
    method: Method = "auto",
) -> PatternStatistics:
    """Compute the statistics of one model's pattern.

    Args:
        call: One attention call, as a tap sees it.
        real: True where a token is real; None if there is no padding. A `Padding` of it, made once per batch, spares every layer the question
            where the padding stands.
        segments: Named sets of key positions whose share of the attention is wanted.
        gini: Also compute the Gini coefficient; it is not linear in P, so it takes the exact path.
        method: `auto` uses the fused identity wherever it holds exactly; `fused` insists; `exact` forces the block path.
    """
    padding, segments = _here(call.query.device, real, segments)
    if not gini and _use_fused(call, padding, method):
        return _fused(call, None, padding, segments).statistics
    return _exact(call, call, padding, segments, gini)[0]


def compare(
    base: AttentionCall,
    tuned: AttentionCall,
    real: Bool[Tensor, "batch query"] | Padding | None = None,
    *,
    segments: Mapping[str, Bool[Tensor, "batch query"]] | None = None,
    gini: bool = False,
    method: Method = "auto",
) -> PatternComparison:
    """Compute both models' statistics and the divergence between their patterns, in both directions.

    The models may lie on different devices: results are on the first one's.

    Args:
        base: One attention call of the first model.
        tuned: The same layer's call of the second model.
        real: True where a token is real; None if there is no padding.
        segments: Named sets of key positions whose share of the attention is wanted.
        gini: Also compute the Gini coefficient, by the exact path.
        method: `auto`, `fused` or `exact`; see `describe`.
    """
    padding, segments = _here(base.query.device, real, segments)
    tuned = _beside(tuned, base.query.device)
    if not gini and _use_fused(base, padding, method) and _use_fused(tuned, padding, method):
        one, two = _fused(base, tuned, padding, segments), _fused(tuned, base, padding, segments)
        forward = two.logsumexp - one.cross - one.statistics.entropy
        backward = one.logsumexp - two.cross - two.statistics.entropy
        return PatternComparison(one.statistics, two.statistics, forward, backward)
    (first, forward), (second, backward) = _exact(base, tuned, padding, segments, gini), _exact(tuned, base, padding, segments, gini)
    return PatternComparison(first, second, forward, backward)


def pattern(call: AttentionCall, *, dtype: torch.dtype | None = None) -> Float[Tensor, "batch head query key"]:
    """Return the whole attention pattern of one layer, for a document short enough to hold it."""
    keys = call.key.shape[2]
    blocks = (block.log_pattern.exp() for block in _blocks(call, dtype))
    return torch.cat([torch.nn.functional.pad(block, (0, keys - block.shape[-1])) for block in blocks], dim=2)


def learned_sink(call: AttentionCall) -> Float[Tensor, "batch head query"] | None:
    """Return the mass that each row of one layer puts on its head's learned sink; None in families without."""
    if call.sinks is None:
        return None
    return torch.cat([block.log_sink.exp() for block in _blocks(call) if block.log_sink is not None], dim=2)


def _here(
    device: torch.device, real: Tensor | Padding | None, segments: Mapping[str, Tensor] | None
) -> tuple[Padding | None, Mapping[str, Tensor]]:
    """Bring what is known of the tokens to the device of a layer."""
    padding = None if real is None else Padding.of(real).on(device)
    return padding, {name: sent(mark, device) for name, mark in (segments or {}).items()}


def _beside(call: AttentionCall, device: torch.device) -> AttentionCall:
    """Bring what a pattern is made of to a device."""
    if call.query.device == device:
        return call
    mask, sinks = (None if x is None else x.to(device) for x in (call.mask, call.sinks))
    return replace(call, query=call.query.to(device), key=call.key.to(device), mask=mask, sinks=sinks)


def _use_fused(call: AttentionCall, padding: Padding | None, method: Method) -> bool:
    length = call.query.shape[2]
    windowed = call.window is not None and call.window < length
    linear = call.softcap is None and call.sinks is None and not windowed and call.key.shape[2] == length and is_fusable(call.query)
    possible = linear and _one_stretch(call, padding)
    if method == "fused" and not possible:
        raise ValueError(
            "method='fused' needs plain causal scores: this call has a soft cap, a window shorter than the text, holes in its mask, or float64 on CUDA"
        )
    return method != "exact" and possible


def _one_stretch(call: AttentionCall, padding: Padding | None) -> bool:
    """Tell whether each document's real tokens are one causal stretch, as a mask that is only padding leaves them."""
    if padding is None:
        return call.mask is None
    limited = call.reach is not None and call.reach < call.query.shape[2]
    return padding.contiguous and (not limited or _only_padding(call.mask, padding))


def _only_padding(mask: Tensor | None, padding: Padding) -> bool:
    """Tell whether a mask hides nothing but padding and what follows: some families give windows and chunks by the mask alone."""
    if mask is None:
        return True
    known: bool | None = getattr(mask, _SEEN, None)
    if known is None:
        known = mask.dtype == torch.bool
        if known:
            # the last real token of a text sees the whole text, or there is more to the mask
            real = padding.real
            last = real.shape[1] - 1 - real.flip(1).to(torch.uint8).argmax(1)
            row = mask.expand(len(real), *mask.shape[1:])[torch.arange(len(real), device=mask.device), :, last]
            known = bool((row.sum(-1) == real.sum(1, keepdim=True)).all())
        setattr(mask, _SEEN, known)  # the layers share it, and reading it waits for the device
    return known


@dataclass(frozen=True)
class _Fused:
    """One pattern's statistics with what its divergence from another pattern is made of, ``(batch, head, query)`` each."""

    statistics: PatternStatistics
    logsumexp: Tensor
    cross: Tensor  # scale' · q'·(P K'): the other model's scores, averaged under this pattern


def _fused(call: AttentionCall, other: AttentionCall | None, padding: Padding | None, segments: Mapping[str, Tensor]) -> _Fused:
    """Use the identity: every statistic from one call of the fused kernel."""
    batch, heads, length, _ = call.query.shape
    device, dtype = call.query.device, statistics_dtype(call.query.dtype)
    there, back = (_as_it_is, _as_it_is) if padding is None else (padding.there, padding.back)
    query, key = there(call.query).to(dtype), _centred(there(call.key).to(dtype))
    positions = torch.arange(length, device=device, dtype=dtype)
    marks = [positions.expand(batch, length), *(there(mark[:, None].to(dtype))[:, 0] for mark in segments.values())]
    values = [torch.stack(marks, dim=-1)[:, None], key]
    if other is not None:
        values.append(_centred(there(other.key).to(dtype)))
    (marked, mean_key, *mean_other), lse = averages(query, key, values, scaling=call.scaling)
    entropy = lse - call.scaling * (query * mean_key).sum(-1)
    cross = torch.zeros_like(lse)
    if other is not None:
        cross = other.scaling * (there(other.query).to(dtype) * mean_other[0]).sum(-1)
    first = key[:, :, 0].repeat_interleave(heads // key.shape[1], dim=1)
    sink = (call.scaling * torch.einsum("bhqd,bhd->bhq", query, first) - lse).exp()
    statistics = PatternStatistics(
        entropy=back(entropy),
        relative_entropy=back(_relative(entropy, positions + 1)),
        distance=back(positions - marked[..., 0]),
        sink=back(sink),
        segments={name: back(marked[..., index]) for index, name in enumerate(segments, start=1)},
    )
    return _Fused(statistics, back(lse), back(cross))


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _centred(key: Float[Tensor, "batch kv key d"]) -> Float[Tensor, "batch kv key d"]:
    """Take out what all keys share: it shifts a row's scores alike, so no pattern sees it, but lse and q·(P K) would cancel it to rounding."""
    return key - key.mean(dim=2, keepdim=True)


def _relative(entropy: Tensor, support: Tensor) -> Tensor:
    """Divide by the largest entropy a row can have; undefined where only one key is seen."""
    return entropy / torch.where(support > 1, support.log(), torch.nan)


def _exact(
    call: AttentionCall, other: AttentionCall, padding: Padding | None, segments: Mapping[str, Tensor], gini: bool
) -> tuple[PatternStatistics, Tensor]:
    """Look at the pattern itself, a block of query rows at a time."""
    batch, _, length, _ = call.query.shape
    keys = call.key.shape[2]
    dtype = statistics_dtype(call.query.dtype)
    real = torch.ones(batch, keys, dtype=torch.bool, device=call.query.device) if padding is None else padding.real
    positions = (real.cumsum(1) - 1).to(dtype)
    start = real.to(torch.uint8).argmax(dim=1)
    first = torch.nn.functional.one_hot(start, keys)
    # position, first token and segments, side by side: (batch, 1, key, 2 + segments)
    marks = torch.stack([positions, first.to(dtype), *(mark.to(dtype) for mark in segments.values())], dim=-1)[:, None]
    rows: dict[str, list[Tensor]] = {name: [] for name in ("entropy", "support", "marked", "place", "kl", "gini", "learned", "whole")}
    for block, reference in zip(_blocks(call), _blocks(other), strict=True):
        log_p = block.log_pattern
        hidden = log_p == -torch.inf
        p = log_p.exp()
        finite = log_p.masked_fill(hidden, 0.0)
        entropy, marked = -(p * finite).sum(-1), p @ marks[:, :, : p.shape[-1]]
        kl = (p * (finite - reference.log_pattern.masked_fill(hidden, 0.0))).sum(-1)
        place = marked[..., 0]
        if block.log_sink is not None and reference.log_sink is not None:
            learned = block.log_sink.exp()
            whole = entropy - learned * block.log_sink
            kl = kl + learned * (block.log_sink - reference.log_sink)
            # −Σ p̂ log p̂ with p̂ = p / (1 − s): what the sink leaves is shared among the keys
            rest = p.sum(-1)
            entropy, place, p = entropy / rest + rest.log(), place / rest, p / rest[..., None]
            rows["learned"].append(learned)
            rows["whole"].append(whole)
        rows["entropy"].append(entropy)
        rows["kl"].append(kl)
        rows["support"].append((~hidden).sum(-1))
        rows["marked"].append(marked)
        rows["place"].append(place)
        if gini:
            rows["gini"].append(_gini(p, hidden))
    joined = {name: torch.cat(parts, dim=2) for name, parts in rows.items() if parts}
    marked = joined["marked"]
    statistics = PatternStatistics(
        entropy=joined["entropy"],
        relative_entropy=_relative(joined["entropy"], joined["support"].to(dtype)),
        distance=positions[:, None, -length:] - joined["place"],
        sink=marked[..., 1],
        segments={name: marked[..., index] for index, name in enumerate(segments, start=2)},
        gini=joined.get("gini"),
        learned_sink=joined.get("learned"),
        entropy_with_sink=joined.get("whole"),
    )
    return statistics, joined["kl"]


def _blocks(call: AttentionCall, dtype: torch.dtype | None = None) -> Iterator[PatternBlock]:
    return pattern_blocks(call.query, call.key, scaling=call.scaling, mask=call.mask, softcap=call.softcap, sinks=call.sinks, dtype=dtype)


def _gini(p: Float[Tensor, "batch head rows keys"], hidden: Tensor) -> Float[Tensor, "batch head rows"]:
    """Return G = 2 Σ_i i·p_(i) / (n Σ p) − (n + 1)/n over the n keys a row can see, p_(i) ascending: 0 for uniform, 1 − 1/n for one-hot."""
    ordered = p.masked_fill(hidden, 0.0).sort(dim=-1).values
    support = (~hidden).sum(-1, keepdim=True)
    # the keys that cannot be seen are zeros and sort first: ranks count from behind them
    rank = (torch.arange(1, p.shape[-1] + 1, device=p.device) - (p.shape[-1] - support)).to(p.dtype)
    n = support[..., 0].to(p.dtype)
    return 2 * (rank * ordered).sum(-1) / n - (n + 1) / n
