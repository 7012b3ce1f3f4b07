"""The largest and smallest entries of a product A Bᵀ that is never formed.

A vocabulary × vocabulary matrix of a head has 2.5·10⁹ entries for GPT-2, of which the few most extreme are wanted, exactly. Blocks of the product are
made one at a time and compared with the k-th entry found so far. By Cauchy–Schwarz no entry exceeds |a||b|: rows of both factors are ordered by
length, so the first blocks hold the likely winners and the rest is skipped as soon as lengths cannot reach the threshold. For the bound to
be tight the factors are first balanced, A Bᵀ = (Q_A U √S)(Q_B V √S)ᵀ, which lets no direction be long in one factor and short in the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.shapes import by_shape

# a block of 512 × 1,024 float32 entries, 2 MiB, stays near the processor
_ROWS, _COLUMNS = 512, 1024
# entries of a few whole rows held at once; 64 MiB in float32
_ENTRIES = 2**24


@dataclass(frozen=True)
class Entries:
    """Entries of a matrix, most extreme first.

    Attributes:
        rows: ``(n,)``.
        columns: ``(n,)``.
        values: ``(n,)``.
    """

    rows: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]
    values: Float[Tensor, " n"]

    __repr__ = by_shape


def extremes(a: Float[Tensor, "m rank"], b: Float[Tensor, "n rank"], *, k: int) -> tuple[Entries, Entries]:
    """Return the k largest and the k smallest entries of A Bᵀ, up to rounding of the entries; of equal ones, any.

    Args:
        a: The rows' factor.
        b: The columns' factor.
        k: How many of each; fewer where the matrix is smaller.
    """
    balanced_a, balanced_b = _balanced(a, b)
    (long_a, order_a), (long_b, order_b) = (_ordered(factor) for factor in (balanced_a, balanced_b))
    lengths_a, lengths_b = (torch.linalg.norm(factor, dim=1).tolist() for factor in (long_a, long_b))
    size = min(k, len(a) * len(b))
    high, low = _Best(size, len(b)), _Best(size, len(b))
    slack = 1 + 1e-5  # of the rounding of lengths and products
    for top in range(0, len(a), _ROWS):
        rows = long_a[top : top + _ROWS]
        for left in range(0, len(b), _COLUMNS):
            if lengths_a[top] * lengths_b[left] * slack < min(high.least, low.least):
                break
            block = rows @ long_b[left : left + _COLUMNS].T
            smallest, largest = block.aminmax()
            if largest > high.least:
                high.offer(block, top, left)
            if -smallest > low.least:
                low.offer(block.neg_(), top, left)
    return _exact(a, b, order_a, order_b, high, 1), _exact(a, b, order_a, order_b, low, -1)


def extremes_of_rows(
    a: Float[Tensor, "m rank"], b: Float[Tensor, "n rank"], *, k: int
) -> tuple[tuple[Int[Tensor, "m k"], Float[Tensor, "m k"]], tuple[Int[Tensor, "m k"], Float[Tensor, "m k"]]]:
    """Return columns and values of the k largest and the k smallest entries of every row of A Bᵀ."""
    k = min(k, len(b))
    parts: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
    for rows in a.split(max(1, _ENTRIES // len(b))):
        entries = rows @ b.T
        for largest, side in zip((True, False), parts, strict=True):
            values, columns = entries.topk(k, dim=1, largest=largest)
            side.append((columns, values))
    high, low = ((torch.cat([one for one, _ in side]), torch.cat([one for _, one in side])) for side in parts)
    return high, low


class _Best:
    """The k largest entries offered so far, unordered."""

    def __init__(self, k: int, n_columns: int) -> None:
        self.least = -torch.inf
        self.places = torch.empty(0, dtype=torch.int64)
        self._values, self._k, self._n_columns = torch.empty(0), k, n_columns

    def offer(self, block: Tensor, top: int, left: int) -> None:
        flat = block.flatten()
        chosen = (flat > self.least).nonzero()[:, 0]
        if len(chosen) > self._k:
            chosen = chosen[flat[chosen].topk(self._k).indices]
        rows, columns = chosen // block.shape[1] + top, chosen % block.shape[1] + left
        values = torch.cat([self._values.to(flat), flat[chosen]])
        places = torch.cat([self.places.to(chosen), rows * self._n_columns + columns])
        best = values.topk(min(self._k, len(values)))
        self._values, self.places = best.values, places[best.indices]
        if len(best.values) == self._k:
            self.least = float(best.values[-1])


def _exact(a: Tensor, b: Tensor, order_a: Tensor, order_b: Tensor, best: _Best, sign: int) -> Entries:
    """Read the entries off the factors as they were given, and order them."""
    rows, columns = order_a[best.places // len(b)], order_b[best.places % len(b)]
    values = (a[rows].double() * b[columns].double()).sum(1)
    order = (sign * values).argsort(descending=True, stable=True)
    return Entries(rows[order], columns[order], values[order])


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    (q_a, r_a), (q_b, r_b) = (torch.linalg.qr(factor) for factor in (a, b))
    u, values, vh = torch.linalg.svd(r_a.double() @ r_b.double().T, full_matrices=False)
    root = values.sqrt()
    return q_a @ (u * root).to(q_a), q_b @ (vh.T * root).to(q_b)


def _ordered(factor: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.linalg.norm(factor, dim=1).argsort(descending=True, stable=True)
    return factor[order], order
