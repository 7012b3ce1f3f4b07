"""Balanced accuracy of answers that come in clusters, such as the tokens of a document, with an interval that holds at its ends too.

The share right of each class is a ratio of sums over clusters, whose variance is that of its linear part (Cochran 1977, ch. 6). Answers within a cluster are
alike, so many of them tell as much as fewer independent ones: p (1 − p) / variance (Korn and Graubard 1998). With that number Wilson's interval is taken for
each class, which keeps its width where all answers are right, as a bootstrap over clusters does not; where they are, or all are wrong, each cluster counts as
one answer. Means over classes and differences are combined by MOVER with the correlations of their linear parts (Zou and Donner 2008).

Simulated (2,000 draws; clusters of one answer and of 8 on average with intra-class correlations of 0, .1 and .4; shares right from .5 to .99; two and six
classes): of 12, 20, 60 and 200 clusters it covers .93 to .99 where .95 is claimed. It falls to .92 and .91 where shares of .99 vary among clusters by such a
correlation of .4, and to .86 where classes have two clusters each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats as distributions

from mechscope.shapes import by_shape


@dataclass(frozen=True)
class Accuracy:
    """Balanced accuracies, arrays of one shape, or differences of such.

    Attributes:
        value: Mean over classes of the share that is right.
        low: Lower end of its interval; NaN where a class is seen in fewer than two clusters.
        high: Upper end.
        influence: ``(…, cluster)``: what each cluster adds to the value, to first order; they sum to zero.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    influence: Float[np.ndarray, "... cluster"]

    __repr__ = by_shape

    def minus(self, other: Accuracy) -> Accuracy:
        """Return how much larger these are than others of the same clusters, in the same order."""
        below, above = self.value - self.low, self.high - self.value
        other_below, other_above = other.value - other.low, other.high - other.value
        r = _correlation(self.influence, other.influence)
        value = self.value - other.value
        return Accuracy(
            value,
            value - np.sqrt(np.maximum(below**2 + other_above**2 - 2 * r * below * other_above, 0.0)),
            value + np.sqrt(np.maximum(above**2 + other_below**2 - 2 * r * above * other_below, 0.0)),
            self.influence - other.influence,
        )

    @property
    def p(self) -> np.ndarray:
        """Two-sided p of "it is zero", of differences: by the side of the interval that faces zero; 1 where both have no width and no difference."""
        half = np.where(self.value > 0, self.value - self.low, self.high - self.value) / distributions.norm.ppf(0.975)
        z = np.divide(np.abs(self.value), half, out=np.where(self.value == 0, 0.0, np.inf), where=half > 0)
        return np.where(np.isnan(half), np.nan, 2 * distributions.norm.sf(z))


def balanced_accuracy(
    right: Float[np.ndarray, "... cluster class"], seen: Float[np.ndarray, "... cluster class"], *, level: float = 0.95
) -> Accuracy:
    """Return the mean over classes of the share that is right.

    Args:
        right: How many of a cluster's answers of each class are right.
        seen: How many there are.
        level: Confidence, a fraction.
    """
    right, seen = np.broadcast_arrays(np.asarray(right, dtype=np.float64), np.asarray(seen, dtype=np.float64))
    total = seen.sum(-2)
    clusters = (seen > 0).sum(-2)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = right.sum(-2) / total
        # each cluster's part of a class's share, less what is expected of so many answers
        parts = (right - share[..., None, :] * seen) / total[..., None, :]
        variance = (parts**2).sum(-2) * clusters / (clusters - 1)
        worth = np.where(variance > 0, share * (1 - share) / variance, clusters)
        quantile = distributions.norm.ppf((1 + level) / 2)
        # of few clusters the variance itself is not well known
        worth = np.minimum(worth, total) * (quantile / distributions.t.ppf((1 + level) / 2, clusters - 1)) ** 2
        low, high = _wilson(share, worth, quantile)
    n = share.shape[-1]
    r = _correlation(parts[..., :, None], parts[..., None, :], axis=-3)
    r[..., range(n), range(n)] = 1.0
    value = share.mean(-1)
    below, above = (np.sqrt(np.maximum(np.einsum("...j,...jk,...k->...", each, r, each), 0.0)) / n for each in (share - low, high - share))
    return Accuracy(value, np.maximum(value - below, 0.0), np.minimum(value + above, 1.0), parts.mean(-1))


def _wilson(share: np.ndarray, n: np.ndarray, z: float) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's interval of shares of n answers, which need be no whole number."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.minimum(centre - half, share), np.maximum(centre + half, share)


def _correlation(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the correlation of linear parts, which have mean zero: 0 where one does not vary, as where all answers are right."""
    size = np.sqrt((x**2).sum(axis) * (y**2).sum(axis))
    inner = (x * y).sum(axis)
    # what rounding leaves of no part is none
    return np.divide(inner, size, out=np.zeros(np.broadcast_shapes(inner.shape, size.shape)), where=size > 1e-18)
