"""What a head does, as a bilinear form of low rank: W = leftᵀ right, never multiplied out.

A head's OV circuit takes what it reads to what it writes, W_OV = W_Vᵀ W_O; its QK circuit pairs what a query reads with what a key reads,
W_QK = W_Qᵀ W_K (Elhage et al. 2021, "A mathematical framework for transformer circuits"). Both are d_model × d_model of rank d_head, so norms,
singular values and products come from QR decompositions of the two factors and matrices of d_head × d_head. The difference of two forms is a form
of twice the rank: the factors side by side, one of them negated. Arithmetic is in float64, so that a small change of a large matrix is not rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.shapes import by_shape


@dataclass(frozen=True)
class Singular:
    """Leading singular vectors of a form, W ≈ Σ value · left ⊗ right.

    Attributes:
        values: ``(n,)``, descending.
        left: ``(n, d_model)``, unit vectors on the side that is read first (what is attended to; a query).
        right: ``(n, d_model)``, on the other side (what is written; a key).
    """

    values: Float[Tensor, " n"]
    left: Float[Tensor, "n d_model"]
    right: Float[Tensor, "n d_model"]

    __repr__ = by_shape


@dataclass(frozen=True)
class Bilinear:
    """The form (left x + left_constant) · (right y + right_constant).

    Attributes:
        left: ``(rank, d_model)``, float64.
        right: ``(rank, d_model)``, float64.
        left_constant: ``(rank,)``: what is there for x = 0 (biases and the shifts of norms); None for nothing. No part of `matrix`, `norm` or `singular`.
        right_constant: ``(rank,)``: the same for y = 0.
    """

    left: Float[Tensor, "rank d_model"]
    right: Float[Tensor, "rank d_model"]
    left_constant: Float[Tensor, " rank"] | None = None
    right_constant: Float[Tensor, " rank"] | None = None

    __repr__ = by_shape

    @property
    def rank(self) -> int:
        """The number of factors' rows: the largest rank the form can have."""
        return len(self.left)

    def norm(self) -> float:
        """Return ‖leftᵀ right‖_F."""
        return float(torch.linalg.norm(self.onto_right()))

    def onto_right(self) -> Float[Tensor, "rank d_model"]:
        """Return a small matrix M with M Y as long as leftᵀ right Y for every Y: R right, where leftᵀ = Q R."""
        return _triangle(self.left) @ self.right

    def onto_left(self) -> Float[Tensor, "rank d_model"]:
        """Return the same for the transposed form: R left, where rightᵀ = Q R."""
        return _triangle(self.right) @ self.left

    def singular(self) -> Singular:
        """Return all singular values of leftᵀ right, at most rank of them, with their vectors; only the signs of pairs are arbitrary."""
        return _decomposed(self.left, self.right)

    def minus(self, other: Bilinear) -> Bilinear:
        """Return the difference of two forms, as one of the smallest rank that is not rounding; of rank 0 where they are equal.

        Its factors are of the difference's own size: the two forms' common part has cancelled before anything is projected through it.
        """
        constants = self._has_constants or other._has_constants
        ours, theirs = self._homogeneous(constants), other._homogeneous(constants)
        left = torch.cat([ours[0], theirs[0].to(ours[0])])
        right = torch.cat([ours[1], -theirs[1].to(ours[1])])
        singular = _decomposed(left, right)
        floor = left.shape[1] * torch.finfo(left.dtype).eps * torch.linalg.norm(left) * torch.linalg.norm(right)
        large = singular.values > floor
        root = singular.values[large].sqrt()[:, None]
        left, right = root * singular.left[large], root * singular.right[large]
        if not constants:
            return Bilinear(left, right)
        return Bilinear(left[:, :-1], right[:, :-1], left[:, -1], right[:, -1])

    @property
    def _has_constants(self) -> bool:
        return self.left_constant is not None or self.right_constant is not None

    def _homogeneous(self, constants: bool) -> tuple[Tensor, Tensor]:
        """Return both factors, with `constants` those as a last column, which multiplies a one behind x and y."""
        if not constants:
            return self.left, self.right
        pairs = ((self.left, self.left_constant), (self.right, self.right_constant))
        left, right = (
            torch.cat([factor, (factor.new_zeros(len(factor)) if constant is None else constant)[:, None]], dim=1)
            for factor, constant in pairs
        )
        return left, right


def _triangle(factor: Float[Tensor, "rank d"]) -> Float[Tensor, "rank rank"]:
    return torch.linalg.qr(factor.T, mode="r").R


def _decomposed(left: Float[Tensor, "rank d"], right: Float[Tensor, "rank d"]) -> Singular:
    (q_left, r_left), (q_right, r_right) = (torch.linalg.qr(factor.T) for factor in (left, right))
    u, values, vh = torch.linalg.svd(r_left @ r_right.T)
    n = len(values)
    return Singular(values, (q_left @ u[:, :n]).T, (q_right @ vh[:n].T).T)
