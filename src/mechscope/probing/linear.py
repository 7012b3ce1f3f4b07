"""Linear probes in closed form, from co-moments alone: all sites at once, no row is seen a second time.

A class's score is wₖ·x + bₖ, and the class with the largest score is what the probe says. With μₖ the class means, Σ the covariance of rows and Σ_w that
within classes:

difference in means     wₖ = μₖ                                   the class whose mean is nearest
mass-mean               wₖ = Σ_w⁻¹ μₖ, of two classes             Marks and Tegmark (2023), read halfway between the means: their probe has no intercept
LDA                     wₖ = (Σ_w + λ t I)⁻¹ μₖ                    Fisher (1936); t = tr Σ / width, so that λ means the same at every site
ridge                   w = (Σ + λ t I)⁻¹ Σ_xz                     least squares on the indicators z of classes

In all but ridge bₖ = −½ wₖ·μₖ (+ log of the class's share, where shares count). With two Gaussian classes of one covariance LDA has the least error of all:
Φ(−√Δ / 2), Δ = (μ₁ − μ₀)ᵀ Σ_w⁻¹ (μ₁ − μ₀).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.errors import DataError
from mechscope.shapes import by_shape
from mechscope.stats.co_moments import CoMoments

Priors = Literal["equal", "observed"]


@dataclass(frozen=True)
class LinearProbe:
    """A linear probe at every site.

    Attributes:
        weights: ``(site, class, width)``.
        bias: ``(site, class)``.
    """

    weights: Float[Tensor, "site class width"]
    bias: Float[Tensor, "site class"]

    __repr__ = by_shape

    def scores(self, x: Float[Tensor, "site row width"]) -> Float[Tensor, "site row class"]:
        """Return each class's score."""
        return torch.baddbmm(self.bias[:, None], x.to(self.weights), self.weights.transpose(1, 2))

    def says(self, x: Float[Tensor, "site row width"]) -> Int[Tensor, "site row"]:
        """Return the class with the largest score."""
        return self.scores(x).argmax(-1)

    @property
    def direction(self) -> Float[Tensor, "site width"]:
        """Of two classes, what the second's score has over the first's; `DataError` where there are others."""
        if self.weights.shape[1] != 2:
            raise DataError(f"a probe of {self.weights.shape[1]} classes has no one direction: read its weights")
        return self.weights[:, 1] - self.weights[:, 0]


def difference_in_means(moments: CoMoments, labeling: int = 0) -> LinearProbe:
    """Return the probe that says the class whose mean is nearest; `DataError` where a class has no rows."""
    means = _means(moments, labeling)
    return LinearProbe(means, -(means**2).sum(-1) / 2)


def mass_mean(moments: CoMoments, labeling: int = 0) -> LinearProbe:
    """Return the mass-mean probe: the difference of two class means, turned by the inverse covariance within classes.

    Raises:
        DataError: There are not two classes, one has no rows, or the covariance within classes is singular.
    """
    if (classes := moments.classes[labeling]) != 2:
        raise DataError(f"a mass-mean probe tells two classes apart, here are {classes}: use LDA, which is the same for any number of them")
    return lda(moments, labeling)


def lda(moments: CoMoments, labeling: int = 0, *, shrinkage: float | Sequence[float] = 0.0, priors: Priors = "equal") -> LinearProbe:
    """Return the probe of linear discriminant analysis.

    Args:
        moments: Of the rows that are learned from.
        labeling: Which of their labelings.
        shrinkage: λ, for all sites or for each.
        priors: Whether classes weigh alike, as balanced accuracy wants, or as often as they occur.

    Raises:
        DataError: A class has no rows, or the covariance within classes is singular and λ is zero.
    """
    means = _means(moments, labeling)
    weights = _solved(moments.within(labeling), moments, shrinkage, means.transpose(1, 2)).transpose(1, 2)
    bias = -(weights * means).sum(-1) / 2
    if priors == "observed":
        bias = bias + (moments.counts(labeling) / moments.n).log()
    return LinearProbe(weights, bias)


def ridge(moments: CoMoments, labeling: int = 0, *, penalty: float | Sequence[float] = 0.0) -> LinearProbe:
    """Return the probe of least squares on the indicators of classes; its scores are estimates of them.

    Args:
        moments: Of the rows that are learned from.
        labeling: Which of their labelings.
        penalty: λ, for all sites or for each.

    Raises:
        DataError: A class has no rows, or the covariance is singular and λ is zero.
    """
    _means(moments, labeling)
    weights = _solved(moments.covariance, moments, penalty, moments.cross_covariance(labeling)).transpose(1, 2)
    share = moments.counts(labeling) / moments.n
    return LinearProbe(weights, share - torch.einsum("skw,sw->sk", weights, moments.mean))


def r_squared(probe: LinearProbe, held: CoMoments, labeling: int = 0) -> Float[Tensor, " site"]:
    """Return how much of the variance of class indicators a probe's scores explain, on rows of which only co-moments are known.

    Args:
        probe: A ridge probe, whose scores estimate indicators.
        held: Of the rows that are judged on.
        labeling: Which of their labelings.

    Returns:
        1 − (squared errors of all classes) / (their variance), per site: negative where the probe is worse than the share of each class.
    """
    weights, share = probe.weights, (held.counts(labeling) / held.n).to(probe.weights.device)
    mean = share - probe.bias - torch.einsum("skw,sw->sk", weights, held.mean)
    explained = 2 * torch.einsum("skw,swk->sk", weights, held.cross_covariance(labeling))
    spread = torch.einsum("skw,swv,skv->sk", weights, held.covariance, weights)
    variance = share * (1 - share)
    return 1 - (variance - explained + spread + mean**2).sum(-1) / variance.sum()


def chosen_penalty(learned: CoMoments, judged: CoMoments, labeling: int = 0) -> Float[Tensor, " site"]:
    """Return, for every site, the λ of `PENALTIES` whose ridge probe explains most of rows that it was not fitted to.

    For LDA too: of two classes both have the same directions but for a change of λ.

    Args:
        learned: Of the rows that are learned from.
        judged: Of other rows.
        labeling: Which of their labelings.
    """
    values, vectors = torch.linalg.eigh(learned.covariance)
    scale, _ = _scale(learned)
    inner = vectors.transpose(1, 2) @ learned.cross_covariance(labeling)
    share = learned.counts(labeling) / learned.n
    explained = []
    for penalty in PENALTIES:
        weights = (vectors @ (inner / (values.clamp(min=0) + penalty * scale[:, None])[..., None])).transpose(1, 2)
        probe = LinearProbe(weights, share - torch.einsum("skw,sw->sk", weights, learned.mean))
        explained.append(r_squared(probe, judged, labeling))
    return torch.tensor(PENALTIES, dtype=torch.float64)[torch.stack(explained).argmax(0).cpu()]


# from hardly any to the difference of means, in steps of √10
PENALTIES = tuple(10.0 ** (each / 2) for each in range(-10, 5))


def _means(moments: CoMoments, labeling: int) -> Float[Tensor, "site class width"]:
    counts = moments.counts(labeling)
    if not bool((counts > 0).all()):
        raise DataError(f"class {int(counts.argmin())} of labeling {labeling} has no rows: a probe needs some of every class")
    return moments.class_means(labeling)


def _solved(
    covariance: Float[Tensor, "site width width"],
    moments: CoMoments,
    shrinkage: float | Sequence[float],
    right: Float[Tensor, "site width column"],
) -> Float[Tensor, "site width column"]:
    """Return (covariance + λ t I)⁻¹ times the right side."""
    share = torch.as_tensor(shrinkage, dtype=torch.float64, device=covariance.device).expand(moments.sites)
    scale, same = _scale(moments)
    # rounding makes a singular covariance look like one with tiny eigenvalues of either sign
    rounding = covariance.diagonal(dim1=1, dim2=2).amax(-1) * moments.width * torch.finfo(torch.float64).eps
    identity = torch.eye(moments.width, dtype=torch.float64, device=covariance.device)
    shrunk = covariance + (share * scale + same - rounding)[:, None, None] * identity
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    if bool(failed.any()):
        raise DataError(
            f"{moments.n:,} rows of width {moments.width:,} have a singular covariance at site {int(failed.nonzero()[0])}: give shrinkage above 0"
        )
    return torch.cholesky_solve(right, factor)


def _scale(moments: CoMoments) -> tuple[Float[Tensor, " site"], Float[Tensor, " site"]]:
    """Return the mean variance of each site, 1 where all rows are the same up to rounding, and which sites these are (1, others 0).

    They are the same where all texts end with one token and its embedding is read.
    """
    variance = moments.covariance.diagonal(dim1=1, dim2=2).mean(-1)
    same = variance <= torch.finfo(torch.float64).eps ** 2 * moments.width * moments.mean.square().mean(-1)
    return torch.where(same, 1.0, variance), same.double()
