"""Sparsity of attention by the Gini coefficient.

For n weights sorted ascending, w_1 ≤ … ≤ w_n, G = Σ_i (2i − n − 1) w_i / (n Σ_i w_i) (Hurley & Rickard 2009, "Comparing measures of
sparsity", find it the one measure with all the properties wanted of sparsity). Uniform attention has 0, attention on one key 1 − 1/n. Row
i of a causal map has only i + 1 keys to attend to: zeros beyond its support are not sparsity and do not count.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float


def gini(
    attention: Float[torch.Tensor, "*batch query key"], support: Bool[torch.Tensor, "*batch query key"] | None = None
) -> Float[torch.Tensor, "*batch query"]:
    """Return the Gini coefficient of every attention row over its support.

    Args:
        attention: Attention weights, not negative; rows need not sum to one.
        support: Which keys a row may attend to, broadcast against `attention`; by default those up to and including the query's own
            position, where the last query sits at the last key.

    Returns:
        A fraction from 0 to 1; 0 for a row with one key, NaN for a row without support or weight (padding).
    """
    query, key = attention.shape[-2:]
    if support is None:
        support = torch.ones(query, key, dtype=torch.bool, device=attention.device).tril(key - query)
    n = support.sum(dim=-1, keepdim=True).to(attention.dtype)
    # what lies outside the support becomes zero, sorts first, and adds nothing to either sum
    weights = torch.where(support, attention, torch.zeros_like(attention)).sort(dim=-1).values
    rank = torch.arange(1, key + 1, device=attention.device, dtype=attention.dtype) - (key - n)
    return ((2 * rank - n - 1) * weights).sum(dim=-1) / (n.squeeze(-1) * weights.sum(dim=-1))
