"""Streaming moments with the third: mean, variance and skewness over documents in one pass, mergeable; and what skewness does to a t.

Means of skewed values (a divergence is never negative) over few documents are not Student's: intervals, tests and verdicts correct them by the
skewness kept here, through Hall's transformation. Merged by Pébay (2008), "Formulas for robust, one-pass parallel computation of covariances and
arbitrary-order statistical moments"; transformed by Hall (1992), "On the removal of skewness by transformation".
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from mechscope.stats.moments import Moments


def hall(t: np.ndarray, skewness: np.ndarray) -> np.ndarray:
    """Return Hall's monotone transformation of (mean − truth) / standard error, nearly normal where values are skewed; infinity stays.

    Args:
        t: How many standard errors the mean lies above the truth.
        skewness: Of the mean: that of the values over √n.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        bent = t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6
    return np.where(np.isfinite(t), bent, t)


def hall_inverse(bent: np.ndarray, skewness: np.ndarray) -> np.ndarray:
    """Return the t of which `hall` makes this."""
    # a skewness so small changes nothing that is not rounding
    some = np.abs(skewness) > 1e-9
    by = np.where(some, skewness, 1.0)
    return np.where(some, 3 / by * (np.cbrt(1 + by * (bent - by / 6)) - 1), bent)


class ThirdMoments(Moments):
    """`Moments` that also keep the sum of cubed deviations; NaN is skipped as there."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        """Start with no documents, each of which brings an array of this shape."""
        super().__init__(shape)
        self._m3: Float[np.ndarray, "*shape"] = np.zeros(shape)

    def update_many(self, x: Float[np.ndarray, "n ..."]) -> None:
        """Add a batch of documents, stacked along the first axis; `ValueError` where the arrays are of another shape."""
        x = np.asarray(x, dtype=np.float64)
        part = Moments(self.shape)
        part.update_many(x)
        with np.errstate(invalid="ignore"):
            cubes = np.where(np.isnan(x), 0.0, (x - np.nan_to_num(part.mean)) ** 3).sum(axis=0)
        self._join(part, cubes)

    def merge(self, other: Moments) -> None:
        """Add all of another object's documents to this one; `ValueError` where it is of another shape."""
        assert isinstance(other, ThirdMoments)
        self._join(other, other._m3)

    def _join(self, other: Moments, cubes: np.ndarray) -> None:
        n, m, total = self.count, other.count, np.maximum(self.count + other.count, 1)
        with np.errstate(invalid="ignore"):
            delta = np.where((n > 0) & (m > 0), other._mean - self._mean, 0.0)
            between = delta**3 * n * m * (n - m) / total**2 + 3 * delta * (n * other._m2 - m * self._m2) / total
            self._m3 = self._m3 + cubes + between
        super().merge(other)

    @property
    def skewness(self) -> Float[np.ndarray, "*shape"]:
        """Skewness over documents, adjusted for their number as the variance is; 0 where there are fewer than three, or they are all alike."""
        n, variance = self.count, self.variance
        with np.errstate(invalid="ignore", divide="ignore"):
            adjusted = n * self._m3 / (np.maximum(n - 1.0, 1) * np.maximum(n - 2.0, 1)) / variance**1.5
        # what differs by rounding only has no shape
        return np.where((n > 2) & (variance > (1e-9 * self._mean) ** 2), adjusted, 0.0)

    def part(self, index: tuple[int, ...]) -> ThirdMoments:
        """Return the moments of a part of the arrays, such as one measure's: those behind an index of the first axes."""
        return ThirdMoments.from_state({name: array[index] for name, array in self.state().items()})

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays that `from_state` needs to continue to the last bit."""
        return {**super().state(), "m3": self._m3.copy()}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> ThirdMoments:
        """Restore an object from what `state` returned."""
        moments = super().from_state(state)
        assert isinstance(moments, ThirdMoments)
        moments._m3 = np.array(state["m3"], dtype=np.float64)
        return moments
