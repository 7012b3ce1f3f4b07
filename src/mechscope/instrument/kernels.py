"""Attention arithmetic that never holds a whole pattern.

Two ways to the same numbers. `averages` asks the fused kernel for P·X and the logsumexp of the scores, with any value matrix X: whatever is
linear in the pattern P costs one more attention call (idea 2 of the design). `pattern_blocks` walks over blocks of queries and shows each
block's log-pattern exactly, with any mask, window or soft cap, in float32 or float64: the fallback, and the oracle in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

# Elements of one padded operand that `averages` holds at once: 128 MiB in float32. Longer inputs go head by head.
_OPERAND = 2**25
# Elements of one block of scores in `pattern_blocks`: 16 MiB in float32, about what a core's share of the last cache level turns over quickly.
_BLOCK = 2**22


@dataclass(frozen=True)
class PatternBlock:
    """Some query rows of an attention pattern.

    Attributes:
        start: First query row of the block.
        log_pattern: ``(batch, head, rows, keys)``: natural logarithm of the pattern, −inf where a key cannot be seen. Only keys
            ``0 … keys−1`` are held; under a causal mask those behind the block's last row are left out.
        log_sink: ``(batch, head, rows)``: logarithm of the mass on a head's learned sink, with which a row sums to one; None without sinks.
    """

    start: int
    log_pattern: Float[Tensor, "batch head rows keys"]
    log_sink: Float[Tensor, "batch head rows"] | None = None


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which statistics are computed: half precision would round q·(P K) at the third digit, so at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def averages(
    query: Float[Tensor, "batch head query d"],
    key: Float[Tensor, "batch kv query d"],
    values: Sequence[Float[Tensor, "batch some_head query d2"]],
    *,
    scaling: float,
) -> tuple[list[Float[Tensor, "batch head query d2"]], Float[Tensor, "batch head query"]]:
    """Average value matrices under a causal attention pattern, and return the scores' logsumexp, by the fused kernel.

    Args:
        query: Queries.
        key: Keys, one per head or shared by groups of heads.
        values: Matrices X of which P·X is wanted; one head (broadcast), one per key head, or one per query head.
        scaling: Factor on the scores.

    Returns:
        The averages, one per entry of `values`, and the logsumexp of every score row.
    """
    batch, heads, length, _ = query.shape
    dtype = statistics_dtype(query.dtype)
    widths = [value.shape[-1] for value in values]
    # One call for all matrices: they stand side by side as one wide value. The CPU kernel wants query and key as wide as the value: zeros do not
    # change a score. It costs 1.6 × one plain call for two matrices instead of 2 × (12 heads × 4,096 tokens, 2 threads).
    width = -(-max(sum(widths), query.shape[-1]) // 8) * 8
    step = max(1, min(heads, _OPERAND // (batch * length * width)))
    averaged, sums = [], []
    for first in range(0, heads, step):
        chosen = slice(first, min(first + step, heads))
        q = query[:, chosen].to(dtype)
        k = _for_heads(key, heads, chosen).to(dtype)
        x = torch.cat([_for_heads(value, heads, chosen).to(dtype).expand(batch, q.shape[1], -1, -1) for value in values], dim=-1)
        out, lse = _fused(pad(q, (0, width - q.shape[-1])), pad(k, (0, width - k.shape[-1])), pad(x, (0, width - x.shape[-1])), scaling)
        averaged.append(out)
        sums.append(lse)
    out = torch.cat(averaged, dim=1) if len(averaged) > 1 else averaged[0]
    lse = torch.cat(sums, dim=1) if len(sums) > 1 else sums[0]
    return list(out[..., : sum(widths)].split(widths, dim=-1)), lse


def _for_heads(x: Tensor, heads: int, chosen: slice) -> Tensor:
    """Pick the rows of (batch, kv, …) that serve a range of query heads."""
    if x.shape[1] == 1 and heads > 1:
        return x
    group = heads // x.shape[1]
    index = torch.arange(chosen.start, chosen.stop, device=x.device) // group
    return x[:, chosen] if group == 1 else x[:, index]


def is_fusable(query: Float[Tensor, "batch head query d"]) -> bool:
    """Tell whether the fused kernel takes such queries: CUDA's has no float64, in which statistics of a float64 model are computed."""
    return query.device.type == "cpu" or statistics_dtype(query.dtype) == torch.float32


def _fused(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Run the fused causal kernel that also returns the logsumexp."""
    if query.device.type == "cuda":
        key = key.expand(-1, query.shape[1], -1, -1)  # a view: this kernel does not share keys among heads by itself
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, True, scale=scaling)
        return out, lse[..., : query.shape[2]]  # the kernel pads the logsumexp to a multiple of its block
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scaling)
    return out, lse


def pattern_blocks(
    query: Float[Tensor, "batch head query d"],
    key: Float[Tensor, "batch kv key d"],
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[PatternBlock]:
    """Yield the exact log-pattern, some query rows at a time.

    Args:
        query: Queries.
        key: Keys; grouped heads are repeated here.
        scaling: Factor on the scores.
        mask: Boolean ``(batch, 1, query, key)`` or additive mask; None means causal. A row that may see nothing is all −inf.
        softcap: Bound c of scores ``c·tanh(s/c)``, None for plain scores.
        sinks: A score per head that every row sees besides its keys.
        dtype: Type to compute in; by default that of `statistics_dtype`.
    """
    batch, heads, length, _ = query.shape
    keys = key.shape[2]
    dtype = statistics_dtype(query.dtype) if dtype is None else dtype
    key = key.to(dtype).repeat_interleave(heads // key.shape[1], dim=1).transpose(-1, -2)
    rows = max(1, min(length, _BLOCK // max(1, batch * heads * keys)))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        seen = stop + keys - length if mask is None else keys
        scores = (query[:, :, start:stop].to(dtype) * scaling) @ key[..., :seen]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is None:
            hidden = torch.ones(stop - start, seen, dtype=torch.bool, device=scores.device).triu(seen - (stop - start) + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        elif mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[:, :, start:stop], -torch.inf)
        else:
            scores = scores + mask[:, :, start:stop].to(dtype)
        if sinks is not None:
            own = sinks.to(scores)[None, :, None, None].expand(batch, heads, stop - start, 1)
            scores = torch.cat([scores, own], dim=-1)
        log_pattern, log_sink = torch.log_softmax(scores, dim=-1), None
        if sinks is not None:
            log_pattern, log_sink = log_pattern[..., :-1], log_pattern[..., -1]
        if mask is not None and mask.dtype == torch.bool:
            # a padded query sees nothing: an empty row, as the fused kernels give, where the softmax would be NaN and spread through its value
            log_pattern = log_pattern.masked_fill(~mask[:, :, start:stop].any(-1, keepdim=True), -torch.inf)
        yield PatternBlock(start, log_pattern, log_sink)
