"""What fine-tuning did to a weight matrix: size, rank and direction of ΔW = W_tuned − W_base.

Singular values come from the eigenvalues of the smaller Gram matrix, summed over slices of rows, so a 50,257 × 768 embedding needs one
768 × 768 matrix and no large SVD. Effective rank is the exponential of the entropy of the normalised singular values (Roy & Vetterli 2007),
stable rank ‖ΔW‖²_F / σ₁². Intruder dimensions (Shuttleworth et al. 2024, arXiv 2410.21228) are leading left singular vectors of the tuned
matrix that resemble no singular vector of the base: the mark by which low-rank training differs from full fine-tuning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float

# rows converted to the working dtype at a time; 4,096 × 4,096 float64 are 128 MiB
_ROWS = 4096


@dataclass(frozen=True)
class WeightChange:
    """How a parameter changed.

    Attributes:
        norm_base: Frobenius norm of the base parameter.
        change: Frobenius norm of the change.
        relative_change: change / norm_base; NaN where the base is zero and the tuned is not.
        effective_rank: Of the change; 0 where nothing changed, NaN for a vector.
        stable_rank: Of the change; 0 where nothing changed, NaN for a vector.
        singular_values: The largest of the change, descending, zeros beyond its rank; NaN for a vector.
        intruders: Number of intruder dimensions; NaN for a vector.
    """

    norm_base: float
    change: float
    relative_change: float
    effective_rank: float
    stable_rank: float
    singular_values: tuple[float, ...]
    intruders: float


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A parameter, ``(out, in)``, whose singular values and vectors are computed in `dtype` on first use and kept for further comparisons."""

    matrix: torch.Tensor
    dtype: torch.dtype = torch.float64

    @classmethod
    def of(cls, parameter: torch.Tensor | Spectrum, dtype: torch.dtype) -> Spectrum:
        """Wrap a parameter; a `Spectrum` is returned as it is."""
        return parameter if isinstance(parameter, Spectrum) else cls(parameter.detach(), dtype)

    @cached_property
    def parts(self) -> tuple[Float[torch.Tensor, " rank"], Float[torch.Tensor, "short rank"]]:
        """Singular values, descending, zero where they are rounding, and the singular vectors of the shorter side."""
        values, vectors = torch.linalg.eigh(_gram(self.matrix, dtype=self.dtype))
        return _roots(values.flip(0)), vectors.flip(1)


def weight_change(
    base: torch.Tensor | Spectrum, tuned: torch.Tensor | Spectrum, *, top: int = 8, dtype: torch.dtype = torch.float64, spectra: bool = True
) -> WeightChange:
    """Measure how a parameter changed.

    Args:
        base: The base model's parameter; matrices as (out, in), so transpose what is stored as (in, out), such as GPT-2's `Conv1D`. Only
            the intruder dimensions depend on the orientation. What is not a matrix has norms only. As a `Spectrum` it is decomposed once
            for all that it is compared with.
        tuned: The tuned model's, of the same shape.
        top: How many singular values to return.
        dtype: Working precision; a `Spectrum` has its own.
        spectra: Whether matrices are decomposed; without, they have norms only, as what is not a matrix.

    Raises:
        ValueError: The two are not of one shape.
    """
    both = Spectrum.of(base, dtype), Spectrum.of(tuned, dtype)
    base, tuned = (spectrum.matrix for spectrum in both)
    if base.shape != tuned.shape:
        raise ValueError(f"weights of shapes {tuple(base.shape)} and {tuple(tuned.shape)}: compare parameters of one shape")
    norm = float(torch.linalg.vector_norm(base, dtype=dtype))
    if base.ndim != 2 or not spectra:
        change = _distance(base, tuned, dtype)
        return WeightChange(norm, change, _ratio(change, norm), math.nan, math.nan, (math.nan,) * top, math.nan)
    if torch.equal(base, tuned):
        return WeightChange(norm, 0.0, 0.0, 0.0, 0.0, (0.0,) * top, 0.0)
    sigma = singular_values_of_change(base, tuned, dtype=dtype)
    change = float(torch.linalg.vector_norm(sigma))
    leading = (*sigma[:top].tolist(), *(0.0,) * max(0, top - len(sigma)))
    return WeightChange(
        norm,
        change,
        _ratio(change, norm),
        effective_rank(sigma),
        float((sigma / sigma[0]).square().sum()) if sigma[0] > 0 else 0.0,
        leading,
        float(intruder_dimensions(*both)),
    )


def singular_values_of_change(
    base: Float[torch.Tensor, "out in"], tuned: Float[torch.Tensor, "out in"], *, dtype: torch.dtype = torch.float64
) -> Float[torch.Tensor, " rank"]:
    """Return all min(out, in) singular values of tuned − base, descending, computed in `dtype`.

    A Gram matrix squares the values, so those below about √(size · eps) of the largest (4e-7 for 768 in float64, 1e-2 in float32) are
    rounding and are returned as zero.
    """
    return _roots(torch.linalg.eigvalsh(_gram(tuned, base, dtype=dtype)).flip(0))


def effective_rank(singular_values: Float[torch.Tensor, " n"]) -> float:
    """Return exp of the entropy (nats) of the singular values normalised to sum to one; k for k equal values, 0 where all are zero."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    return math.exp(float(torch.special.entr(singular_values / total).sum()))


def intruder_dimensions(
    base: Float[torch.Tensor, "out in"] | Spectrum,
    tuned: Float[torch.Tensor, "out in"] | Spectrum,
    *,
    k: int = 10,
    epsilon: float = 0.6,
    dtype: torch.dtype = torch.float64,
) -> int:
    """Count the tuned matrix's leading left singular vectors that are new.

    New is one of the first k whose |cosine| with every left singular vector of the base is below ε. The paper leaves k and ε as
    parameters; counts compare only at the same ones. Vectors of singular values that are zero up to rounding are no directions of a
    matrix and are left out on both sides. Where singular values of the base (nearly) coincide, as in a matrix never trained, its vectors
    are arbitrary within their span, and a small change can turn them into others: such a count says little.

    Args:
        base: The base matrix.
        tuned: The tuned matrix, of the same shape.
        k: How many of the tuned matrix's vectors to look at.
        epsilon: Cosine below which a vector is new.
        dtype: Working precision; a `Spectrum` has its own.
    """
    first, second = Spectrum.of(base, dtype), Spectrum.of(tuned, dtype)
    (sigma_base, vectors_base), (sigma_tuned, vectors_tuned) = first.parts, second.parts
    base, tuned = first.matrix, second.matrix
    real_base, real_tuned = sigma_base > 0, (sigma_tuned > 0) & (torch.arange(len(sigma_tuned), device=tuned.device) < k)
    vectors_base, vectors_tuned = vectors_base[:, real_base], vectors_tuned[:, real_tuned]
    if base.shape[0] <= base.shape[1]:
        cosine = vectors_base.T @ vectors_tuned
    else:
        # the Gram matrix was that of the inputs: left vectors are U = W V / σ, and their products need W_baseᵀ W_tuned only
        product = sum(
            ours.to(vectors_base.dtype).T @ (theirs.to(vectors_base.dtype) @ vectors_tuned)
            for ours, theirs in zip(base.split(_ROWS), tuned.split(_ROWS), strict=True)
        )
        cosine = vectors_base.T @ product / sigma_base[real_base, None] / sigma_tuned[real_tuned]
    largest = torch.cat([cosine.abs(), cosine.new_zeros(1, cosine.shape[1])]).amax(dim=0)
    return int((largest < epsilon).sum())


def _gram(matrix: torch.Tensor, minus: torch.Tensor | None = None, *, dtype: torch.dtype) -> torch.Tensor:
    """Sum the smaller Gram matrix of matrix − minus over slices of the longer side."""
    tall = matrix if matrix.shape[0] > matrix.shape[1] else matrix.T
    other = None if minus is None else (minus if minus.shape[0] > minus.shape[1] else minus.T)
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=dtype, device=matrix.device)
    for start in range(0, tall.shape[0], _ROWS):
        rows = tall[start : start + _ROWS].to(dtype)
        if other is not None:
            rows = rows - other[start : start + _ROWS].to(dtype)
        gram.addmm_(rows.T, rows)
    return gram


def _distance(base: torch.Tensor, tuned: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the norm of tuned − base, converted some rows at a time."""
    pieces = zip(*((parameter.split(_ROWS) if parameter.ndim else (parameter,)) for parameter in (base, tuned)), strict=True)
    return math.hypot(*(float(torch.linalg.vector_norm(second.to(dtype) - first.to(dtype))) for first, second in pieces))


def _roots(values: torch.Tensor) -> torch.Tensor:
    floor = values[0] * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > floor, values, torch.zeros_like(values)).sqrt()


def _ratio(change: float, norm: float) -> float:
    if change == 0:
        return 0.0
    return change / norm if norm > 0 else math.nan
