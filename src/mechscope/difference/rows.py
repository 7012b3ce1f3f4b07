"""From values per token to values per document: means over each document's query rows of each kind."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def row_means(x: Float[Tensor, "batch some token"], rows: Bool[Tensor, "batch rows token"]) -> Float[Tensor, "batch rows some"]:
    """Average over each document's query rows of each kind, in float64; NaN rows (and padding, whatever it holds) are left out."""
    x = x.double()
    valid = ~x.isnan()
    kinds = rows.to(x.device).double()
    total = torch.einsum("bst,brt->brs", x.masked_fill(~valid, 0.0), kinds)
    count = torch.einsum("bst,brt->brs", valid.double(), kinds)
    return total / torch.where(count > 0, count, torch.nan)
