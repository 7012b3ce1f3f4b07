"""Streaming moments: mean and variance over documents in one pass, mergeable, in constant memory.

The unit of statistics is the document: each brings one array of per-document means (per head, per layer…), and NaN where it has nothing
to say, so every element keeps its own count. `Moments` merges by Chan, Golub & LeVeque (1983), "Algorithms for computing the sample
variance"; the same object is summed over batches, processes and resumed runs. `Resampled` carries the Poisson bootstrap beside it (Hanley
& MacGibbon 2006; Chamandy et al. 2012, "Estimating uncertainty for massive data streams"): each document enters replicate b with a weight
Poisson(1) drawn from its id, which for many documents is resampling with replacement, done online.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from mechscope.stats.chance import poisson_weights


class Moments:
    """Count, mean and sum of squared deviations of arrays of one shape, elementwise.

    NaN means "no value here" and is skipped. An infinite value is a value: it makes the mean of its element infinite or NaN, and the
    variance NaN, rather than being dropped.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        """Start with no documents, each of which brings an array of this shape."""
        self.count: Int[np.ndarray, "*shape"] = np.zeros(shape, dtype=np.int64)
        self._mean: Float[np.ndarray, "*shape"] = np.zeros(shape)
        self._m2: Float[np.ndarray, "*shape"] = np.zeros(shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one document's array."""
        return self.count.shape

    def update(self, x: Float[np.ndarray, "*shape"]) -> None:
        """Add one document's array."""
        self.update_many(np.asarray(x)[None])

    def update_many(self, x: Float[np.ndarray, "n ..."]) -> None:
        """Add a batch of documents, stacked along the first axis.

        Raises:
            ValueError: The arrays are of another shape.
        """
        x = _stacked(x, self.shape)
        valid = ~np.isnan(x)
        count = valid.sum(axis=0)
        mean = np.where(valid, x, 0.0).sum(axis=0) / np.maximum(count, 1)
        with np.errstate(invalid="ignore"):
            m2 = np.where(valid, (x - mean) ** 2, 0.0).sum(axis=0)
        self._combine(count, mean, m2)

    def merge(self, other: Moments) -> None:
        """Add all of another object's documents to this one.

        Raises:
            ValueError: The other object is of another shape.
        """
        _same_shape(self.shape, other.shape)
        self._combine(other.count, other._mean, other._m2)

    def _combine(self, count: np.ndarray, mean: np.ndarray, m2: np.ndarray) -> None:
        total = self.count + count
        share = count / np.maximum(total, 1)
        with np.errstate(invalid="ignore"):
            delta = mean - self._mean
            # an empty side leaves the other untouched to the last bit, also where that is infinite
            self._mean = np.where(self.count == 0, mean, np.where(count == 0, self._mean, self._mean + delta * share))
            both = (self.count > 0) & (count > 0)
            self._m2 = self._m2 + m2 + np.where(both, delta**2 * self.count * share, 0.0)
        self.count = total

    @property
    def mean(self) -> Float[np.ndarray, "*shape"]:
        """Mean over documents; NaN where there is none."""
        return np.where(self.count > 0, self._mean, np.nan)

    @property
    def variance(self) -> Float[np.ndarray, "*shape"]:
        """Unbiased variance over documents; NaN where there are fewer than two."""
        return np.where(self.count > 1, self._m2 / np.maximum(self.count - 1, 1), np.nan)

    @property
    def standard_error(self) -> Float[np.ndarray, "*shape"]:
        """Standard error of the mean over documents; NaN where there are fewer than two."""
        return np.sqrt(self.variance / np.maximum(self.count, 1))

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays that `from_state` needs to continue to the last bit."""
        return {"count": self.count.copy(), "mean": self._mean.copy(), "m2": self._m2.copy()}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Moments:
        """Restore an object from what `state` returned."""
        moments = cls(np.shape(state["count"]))
        moments.count = np.array(state["count"], dtype=np.int64)
        moments._mean = np.array(state["mean"], dtype=np.float64)
        moments._m2 = np.array(state["m2"], dtype=np.float64)
        return moments


class Resampled:
    """Means of arrays under a Poisson bootstrap over documents, elementwise and NaN-aware.

    A document's weights depend on the seed and its id only, so all objects with one seed resample the same documents together: replicate
    b of the KL and replicate b of the entropy change belong to the same imaginary sample.
    """

    def __init__(self, shape: tuple[int, ...] = (), replicates: int = 200, seed: int = 0) -> None:
        """Start with no documents, each of which brings an array of this shape; the seed is that of the resampling."""
        self.seed = seed
        self._weight: Float[np.ndarray, "replicates ..."] = np.zeros((replicates, *shape))
        self._total: Float[np.ndarray, "replicates ..."] = np.zeros((replicates, *shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one document's array."""
        return self._weight.shape[1:]

    @property
    def replicates(self) -> int:
        """Number of bootstrap replicates."""
        return self._weight.shape[0]

    def update(self, name: str, x: Float[np.ndarray, "*shape"]) -> None:
        """Add one document's array under the document's id."""
        self.update_many([name], np.asarray(x)[None])

    def update_many(self, names: Sequence[str], x: Float[np.ndarray, "n ..."]) -> None:
        """Add a batch of documents, stacked along the first axis, with their ids.

        Raises:
            ValueError: The arrays are of another shape, or there are not as many ids as arrays.
        """
        x = _stacked(x, self.shape)
        if len(names) != len(x):
            raise ValueError(f"{len(names)} document ids for {len(x)} arrays: give one id per array")
        if not names:
            return
        weights = np.stack([poisson_weights(self.seed, name, self.replicates) for name in names], axis=1).astype(np.float64)
        valid = ~np.isnan(x)
        self._weight += np.tensordot(weights, valid.astype(np.float64), axes=1)
        self._total += np.tensordot(weights, np.where(valid, x, 0.0), axes=1)

    def merge(self, other: Resampled) -> None:
        """Add all of another object's documents to this one.

        Raises:
            ValueError: The other object has another shape, seed or number of replicates.
        """
        _same_shape(self._weight.shape, other._weight.shape)
        if self.seed != other.seed:
            raise ValueError(f"resampled with seed {other.seed}, this with {self.seed}: replicates of different seeds cannot be summed")
        self._weight += other._weight
        self._total += other._total

    def replicates_mean(self) -> Float[np.ndarray, "replicates ..."]:
        """Return the mean over documents in each replicate; NaN in a replicate that drew no document with a value."""
        return np.where(self._weight > 0, self._total / np.where(self._weight > 0, self._weight, 1.0), np.nan)

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays that `from_state` needs to continue to the last bit."""
        return {"seed": np.array(self.seed), "weight": self._weight.copy(), "total": self._total.copy()}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Resampled:
        """Restore an object from what `state` returned."""
        replicates, *shape = np.shape(state["weight"])
        resampled = cls(tuple(shape), replicates, int(state["seed"]))
        resampled._weight = np.array(state["weight"], dtype=np.float64)
        resampled._total = np.array(state["total"], dtype=np.float64)
        return resampled


def _stacked(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    _same_shape(shape, x.shape[1:])
    return x


def _same_shape(expected: tuple[int, ...], actual: tuple[int, ...]) -> None:
    if expected != actual:
        raise ValueError(f"statistics of shape {expected} cannot take arrays of shape {actual}")
