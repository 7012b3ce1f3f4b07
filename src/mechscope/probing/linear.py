"""Linear probes in closed form, from co-moments alone: all sites at once, no row is seen a second time.

A class's score is wₖ·x + bₖ, and the class with the largest score is what the probe says. With μₖ the class means, Σ the covariance of rows and Σ_w that
within classes:

difference in means     wₖ = δₖ                                   the class whose mean is nearest
mass-mean               wₖ = Σ_w⁻¹ δₖ, of two classes             Marks and Tegmark (2023), read halfway between the means: their probe has no intercept
LDA                     wₖ = (Σ_w + λ t I)⁻¹ δₖ                    Fisher (1936); t = tr Σ / width, so that λ means the same at every site
ridge                   w = (Σ + λ t I)⁻¹ Σ_xz                     least squares on the indicators z of classes

In all but ridge δₖ is a class's mean less the mean μ of all rows, and bₖ = −wₖ·μ − ½ wₖ·δₖ (+ log of the class's share, where shares count); classes without
rows are never said. With two Gaussian classes of one covariance LDA has the least error of all: Φ(−√Δ / 2), Δ = (μ₁ − μ₀)ᵀ Σ_w⁻¹ (μ₁ − μ₀).

Σ is taken apart once, whatever the number of labelings and λ: Σ_w is Σ less a matrix of as many ranks as there are classes (Woodbury's formula).
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Spectrum:
    """The covariance of rows at every site, taken apart into variances along directions.

    Attributes:
        values: ``(site, width)``.
        vectors: ``(site, width, width)``, directions in columns.
        scale: ``(site,)``: the mean variance; 1 where all rows are the same up to rounding, as where all texts end with one token and its embedding is read.
    """

    values: Float[Tensor, "site width"]
    vectors: Float[Tensor, "site width width"]
    scale: Float[Tensor, " site"]

    __repr__ = by_shape

    @classmethod
    def of(cls, moments: CoMoments) -> Spectrum:
        """Take the covariance of all rows apart."""
        values, vectors = torch.linalg.eigh(moments.covariance)
        variance = values.clamp(min=0).mean(-1)
        same = variance <= torch.finfo(torch.float64).eps ** 2 * moments.width * moments.mean.square().mean(-1)
        return cls(values.clamp(min=0), vectors, torch.where(same, 1.0, variance))

    def inverse(self, shrinkage: float | Float[Tensor, " site"]) -> Float[Tensor, "site width"]:
        """Return 1 / (variance + λ t) along every direction; `DataError` where there is no variance and λ is zero."""
        share = torch.as_tensor(shrinkage, dtype=torch.float64).to(self.scale.device).expand(len(self.scale))
        rounding = torch.where(share > 0, 0.0, self.values.amax(-1) * self.values.shape[1] * torch.finfo(torch.float64).eps)
        shrunk = self.values + (share * self.scale)[:, None]
        if bool((shrunk <= rounding[:, None]).any()):
            raise DataError(_SINGULAR)
        return 1 / shrunk


def difference_in_means(moments: CoMoments, labeling: int = 0) -> LinearProbe:
    """Return the probe that says the class whose mean is nearest; `DataError` where fewer than two classes have rows."""
    return _nearest(moments, labeling, moments.class_deviations(labeling))


def mass_mean(moments: CoMoments, labeling: int = 0) -> LinearProbe:
    """Return the mass-mean probe: the difference of two class means, turned by the inverse covariance within classes.

    Raises:
        DataError: There are not two classes with rows, or the covariance within classes is singular.
    """
    if (classes := moments.classes[labeling]) != 2:
        raise DataError(f"a mass-mean probe tells two classes apart, here are {classes}: use LDA, which is the same for any number of them")
    return lda(moments, labeling)


def lda(
    moments: CoMoments,
    labeling: int = 0,
    *,
    shrinkage: float | Float[Tensor, " site"] = 0.0,
    priors: Priors = "equal",
    spectrum: Spectrum | None = None,
) -> LinearProbe:
    """Return the probe of linear discriminant analysis.

    Args:
        moments: Of the rows that are learned from.
        labeling: Which of their labelings.
        shrinkage: λ, for all sites or for each.
        priors: Whether classes weigh alike, as balanced accuracy wants, or as often as they occur.
        spectrum: That of the moments, where it is at hand.

    Raises:
        DataError: Fewer than two classes have rows, or the covariance within classes is singular and λ is zero.
    """
    spectrum = spectrum or Spectrum.of(moments)
    # everything along the directions of the spectrum, where the covariance is a scale
    deviations = moments.class_deviations(labeling) @ spectrum.vectors
    solved = deviations * spectrum.inverse(shrinkage)[:, None]
    root = (moments.counts(labeling) / moments.n).sqrt()[:, None]
    inner = solved @ (deviations * root).transpose(1, 2)
    left = torch.eye(len(root), dtype=torch.float64, device=root.device) - root * inner
    if bool((torch.linalg.eigvalsh(left)[:, 0] <= moments.width * torch.finfo(torch.float64).eps).any()):
        raise DataError(_SINGULAR)
    solved = solved + torch.linalg.solve(left, inner.transpose(1, 2)).transpose(1, 2) @ (solved * root)
    return _nearest(moments, labeling, solved @ spectrum.vectors.transpose(1, 2), priors)


def ridge(
    moments: CoMoments, labeling: int = 0, *, penalty: float | Float[Tensor, " site"] = 0.0, spectrum: Spectrum | None = None
) -> LinearProbe:
    """Return the probe of least squares on the indicators of classes; its scores are estimates of them.

    Args:
        moments: Of the rows that are learned from.
        labeling: Which of their labelings.
        penalty: λ, for all sites or for each.
        spectrum: That of the moments, where it is at hand.

    Raises:
        DataError: Fewer than two classes have rows, or the covariance is singular and λ is zero.
    """
    _there(moments, labeling)
    spectrum = spectrum or Spectrum.of(moments)
    along = spectrum.vectors.transpose(1, 2) @ moments.cross_covariance(labeling)
    weights = (spectrum.vectors @ (spectrum.inverse(penalty)[..., None] * along)).transpose(1, 2)
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


def chosen_penalties(learned: CoMoments, judged: CoMoments) -> Float[Tensor, "labeling site"]:
    """Return, for every labeling and site, the λ of `PENALTIES` whose ridge probe explains most of rows that it was not fitted to.

    For LDA too: of two classes both have the same directions but for a change of λ.

    Args:
        learned: Of the rows that are learned from.
        judged: Of other rows, with the same labelings.
    """
    spectrum = Spectrum.of(learned)
    turn = spectrum.vectors.transpose(1, 2)
    along, held = turn @ learned.cross_covariance(None), turn @ judged.cross_covariance(None)
    covariance, moved = turn @ judged.covariance @ spectrum.vectors, turn @ (judged.mean - learned.mean)[..., None]
    share, held_share = learned.counts(None) / learned.n, judged.counts(None) / judged.n
    errors = []
    for penalty in PENALTIES:
        weights = spectrum.inverse(penalty)[..., None] * along
        mean = held_share - share - (weights * moved).sum(1)
        # squared errors of the indicator of each class, less its variance
        error = (weights * (covariance @ weights - 2 * held)).sum(1) + mean**2
        errors.append(torch.stack([each.sum(-1) for each in error.split(learned.classes, dim=-1)]))
    return torch.tensor(PENALTIES, dtype=torch.float64)[torch.stack(errors).argmin(0).cpu()]


# from hardly any to the difference of means, in steps of √10
PENALTIES = tuple(10.0 ** (each / 2) for each in range(-10, 5))
_SINGULAR = "the covariance is singular, as where there are fewer rows than numbers in them: give shrinkage above 0"


def _nearest(moments: CoMoments, labeling: int, weights: Float[Tensor, "site class width"], priors: Priors = "equal") -> LinearProbe:
    """Return the probe that says the class whose mean is nearest, given the differences of means as they are weighed."""
    bias = _there(moments, labeling) - torch.einsum("skw,skw->sk", weights, moments.mean[:, None] + moments.class_deviations(labeling) / 2)
    if priors == "observed":
        bias = bias + (moments.counts(labeling) / moments.n).log()
    return LinearProbe(weights, bias)


def _there(moments: CoMoments, labeling: int) -> Float[Tensor, " class"]:
    """Return a bias by which classes without rows are never said."""
    there = moments.counts(labeling) > 0
    if int(there.sum()) < 2:
        raise DataError(
            f"labeling {labeling} has rows of {int(there.sum())} of its {len(there)} classes: a probe needs some of two at least"
        )
    return torch.where(there, 0.0, -torch.inf).double()
