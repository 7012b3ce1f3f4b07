"""Erasing a concept from activations, from co-moments alone: afterwards no linear probe tells the classes, or not along some directions.

class means   x − P (x − E x), P the projection onto the span of the differences of class means: what separates the means goes
LEACE         the smallest change, in the least-squares sense, after which no linear probe tells the classes: with W the whitening of x and P the projection
              onto the range of W Σ_xz, x − W⁺ P W (x − E x) (Belrose et al. 2023, theorem 4.3)
INLP          the directions of one ridge probe after the other, each fitted to what the ones before left (Ravfogel et al. 2020)

The mean over all rows stays where it is. After the first two all class means are equal on the rows that were learned from, so that a least-squares probe is at
chance there; INLP takes out what probes read, which need not be all: a ridge probe's direction is not that of the means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import DataError
from mechscope.shapes import by_shape
from mechscope.stats.co_moments import CoMoments

# variance along a direction, as a share of the largest, below which it is rounding
_NO_VARIANCE = 1e-13
# singular values of what is to be erased, as a share of the largest, below which they are rounding
_NO_CONCEPT = 1e-7


@dataclass(frozen=True)
class Eraser:
    """A map that takes directions out of rows: x − out · into · (x − mean).

    Attributes:
        mean: ``(site, width)``: what stays where it is.
        out: ``(site, width, rank)``: what is taken away.
        into: ``(site, rank, width)``: by how much; rows of zeros where a site has fewer directions than others.
    """

    mean: Float[Tensor, "site width"]
    out: Float[Tensor, "site width rank"]
    into: Float[Tensor, "site rank width"]

    __repr__ = by_shape

    def __call__(self, x: Float[Tensor, "site row width"]) -> Float[Tensor, "site row width"]:
        """Return rows without the concept."""
        centred = x.to(self.mean) - self.mean[:, None]
        return (x.to(self.mean) - (centred @ self.into.transpose(1, 2)) @ self.out.transpose(1, 2)).to(x)

    @property
    def rank(self) -> list[int]:
        """How many directions are taken out at each site."""
        return [int(each) for each in (self.into.abs().amax(-1) > 0).sum(-1)]


def erase_means(moments: CoMoments, labeling: int = 0) -> Eraser:
    """Return the map that takes out the span of the differences of class means; `DataError` where the classes do not differ."""
    basis, _ = _range(_concept(moments, labeling))
    return Eraser(moments.mean, basis, basis.transpose(1, 2))


def leace(moments: CoMoments, labeling: int = 0, *, shrinkage: float | Float[Tensor, " site"] = 0.0) -> Eraser:
    """Return the LEACE eraser of a labeling.

    Singular values are compared with the largest, so that what is erased does not hang on how frequent a class is.

    Args:
        moments: Of the rows that are learned from.
        labeling: Which of their labelings.
        shrinkage: λ, for all sites or for each: rows are whitened by (Σ + λ t I)^−½, t the mean variance. Class means are made equal whatever λ is; of few rows
            the change is the smaller on others where λ is above zero.

    Raises:
        DataError: The classes do not differ.
    """
    vectors, root, inverse = _whitening(moments, shrinkage)
    # in the basis of eigenvectors whitening is a scale
    basis, _ = _range(inverse[..., None] * (vectors.transpose(1, 2) @ _concept(moments, labeling)))
    return _unwhitened(moments, vectors, root, inverse, basis)


def erase_random(moments: CoMoments, rank: int, *, shrinkage: float | Float[Tensor, " site"] = 0.0, seed: int = 0) -> Eraser:
    """Return a map that takes out so many random directions as LEACE does its own: what an erasure stands beside.

    Args:
        moments: Of the rows that are learned from.
        rank: How many directions.
        shrinkage: As of `leace`.
        seed: Of the directions, which are uniform among those of whitened rows.
    """
    vectors, root, inverse = _whitening(moments, shrinkage)
    drawn = torch.randn(moments.width, rank, generator=torch.Generator().manual_seed(seed), dtype=root.dtype).to(root.device)
    # drawn before they are turned: the signs of directions of the covariance are those of rounding. None of them where rows do not vary
    basis, _ = torch.linalg.qr((root > 0)[..., None] * (vectors.transpose(1, 2) @ drawn))
    return _unwhitened(moments, vectors, root, inverse, basis)


def _whitening(
    moments: CoMoments, shrinkage: float | Float[Tensor, " site"]
) -> tuple[Float[Tensor, "site width width"], Float[Tensor, "site width"], Float[Tensor, "site width"]]:
    """Return the directions of the covariance, the deviation along each, and one over it, zero where there is none."""
    values, vectors = torch.linalg.eigh(moments.covariance)
    mean = values.clamp(min=0).mean(-1)
    values = values.clamp(min=0) + (torch.as_tensor(shrinkage, dtype=torch.float64).to(mean.device) * mean)[:, None]
    root = torch.where(values > _NO_VARIANCE * values.amax(-1, keepdim=True), values.sqrt(), 0.0)
    return vectors, root, torch.where(root > 0, 1 / root.clamp(min=torch.finfo(root.dtype).tiny), 0.0)


def _unwhitened(moments: CoMoments, vectors: Tensor, root: Tensor, inverse: Tensor, basis: Float[Tensor, "site width rank"]) -> Eraser:
    """Return the eraser of directions of whitened rows."""
    return Eraser(moments.mean, vectors @ (root[..., None] * basis), (basis * inverse[..., None]).transpose(1, 2) @ vectors.transpose(1, 2))


def inlp(moments: CoMoments, labeling: int = 0, *, steps: int = 1, penalty: float = 1e-3) -> Eraser:
    """Return the map that takes out the directions of ridge probes, each fitted to what the ones before left.

    The directions are projected out by one projection on their joint span, as products of projections lose their exactness (Ben-Israel 2015).

    Args:
        moments: Of the rows that are learned from.
        labeling: Which of their labelings.
        steps: How many probes; each takes out as many directions as there are classes less one.
        penalty: λ of the probes, in units of the mean variance.

    Raises:
        DataError: The classes do not differ.
    """
    covariance, crossed = moments.covariance, _concept(moments, labeling)
    ridge = penalty * covariance.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(moments.width).to(covariance)
    basis, least = covariance.new_zeros(moments.sites, moments.width, 0), None
    for _ in range(steps):
        left = torch.eye(moments.width).to(covariance) - basis @ basis.transpose(1, 2)
        weights = torch.linalg.solve(left @ covariance @ left + ridge, left @ crossed)
        # against the first probe's: where nothing is left to read, directions of rounding are none
        directions, least = _range(weights, least)
        # orthogonal to those before up to rounding, which a second projection takes away
        directions = left @ directions
        basis = torch.cat([basis, directions / directions.norm(dim=1, keepdim=True).clamp(min=0.5)], dim=2)
    return Eraser(moments.mean, basis, basis.transpose(1, 2))


def _concept(moments: CoMoments, labeling: int) -> Float[Tensor, "site width class"]:
    """Return the covariance of rows with classes, zero where it is rounding."""
    crossed = moments.cross_covariance(labeling)
    spread = moments.covariance.diagonal(dim1=1, dim2=2).sum(-1).sqrt()
    there = crossed.norm(dim=(1, 2)) > torch.finfo(torch.float64).eps * moments.width * spread
    if not bool(there.any()):
        raise DataError("the classes do not differ in their mean activations: there is nothing to erase")
    return crossed * there[:, None, None]


def _range(
    x: Float[Tensor, "site width column"], least: Float[Tensor, " site"] | None = None
) -> tuple[Float[Tensor, "site width rank"], Float[Tensor, " site"]]:
    """Return an orthonormal basis of the range at every site, with columns of zeros for directions that are not there.

    Args:
        x: Covariances with the indicators of classes, or what was made of them: one column fewer is independent.
        least: Singular values up to this are rounding; None for a share of the largest.

    Returns:
        The basis, and the least singular values.
    """
    rank = min(x.shape[1], max(1, x.shape[2] - 1))
    left, values, _ = torch.linalg.svd(x, full_matrices=False)
    least = _NO_CONCEPT * values[:, 0] if least is None else least
    return left[..., :rank] * (values[:, None, :rank] > least[:, None, None]), least
