"""Percentile bootstrap intervals over documents, and over seeds and documents at once.

A ROUGE score has no textbook distribution, so its interval comes from resampling the documents (Efron 1979; Koehn 2004 for paired text
metrics). Where the same documents were scored after training with several seeds, a difference varies for both reasons. Seeds and
documents are then *crossed*: every seed saw the same documents, so a resample draws seeds and, independently, one set of documents shared
by all of them (the "pigeonhole bootstrap", Owen 2007). Resampling documents anew inside each seed would average their luck away and make
the interval too narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import bootstrap

# resampled values held at a time: 2^22 float64 are 32 MiB
_CHUNK = 2**22


@dataclass(frozen=True)
class BootstrapInterval:
    """A statistic and its percentile interval; floats for plain values, arrays where documents carry arrays."""

    value: Any
    low: Any
    high: Any


def bootstrap_interval(
    values: Float[np.ndarray, "n ..."], statistic: Callable[..., Any] = np.mean, *, n: int = 2000, seed: int = 0, level: float = 0.95
) -> BootstrapInterval:
    """Estimate a statistic over documents with its percentile interval.

    Args:
        values: One value or array per document; a NaN makes a mean over it NaN.
        statistic: Reduces one axis, called as `statistic(values, axis=axis)`, such as `numpy.mean` or `numpy.median`.
        n: Number of resamples.
        seed: Seed of the resampling.
        level: Confidence, a fraction.

    Returns:
        All NaN where there is no document; an interval of NaN where there is one.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        empty = np.full(values.shape[1:], np.nan)[()]
        return BootstrapInterval(empty, empty, empty)
    value = np.asarray(statistic(values, axis=0))
    if len(values) == 1:
        unknown = np.full(value.shape, np.nan)[()]
        return BootstrapInterval(value[()], unknown, unknown)

    def reduced(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(statistic(drawn, axis=axis))

    ends = bootstrap(
        (values,),
        reduced,
        n_resamples=n,
        batch=max(1, _CHUNK // values.size),
        vectorized=True,
        axis=0,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return BootstrapInterval(value[()], ends.low, ends.high)


def bootstrap_two_level(
    values: Float[np.ndarray, "seeds documents"], *, n: int = 2000, seed: int = 0, level: float = 0.95
) -> BootstrapInterval:
    """Estimate the mean over seeds and documents, both resampled.

    With one seed only documents are resampled, and the interval says nothing about other seeds. With very few seeds it is still too narrow:
    resampling s seeds shows (s − 1)/s of the variance between them.

    Args:
        values: Entry [s, d] is document d scored with seed s; NaN where it was not. For a paired difference pass the differences.
        n: Number of resamples.
        seed: Seed of the resampling.
        level: Confidence, a fraction.

    Returns:
        NaN where there is no value; an interval of NaN where there is but one.

    Raises:
        ValueError: The values are not a table of seeds by documents.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"values of shape {values.shape}: give a table of shape (seeds, documents)")
    valid = ~np.isnan(values)
    if valid.sum() < 2:
        value = float(values[valid][0]) if valid.any() else float("nan")
        return BootstrapInterval(value, float("nan"), float("nan"))
    random = np.random.default_rng(seed)
    seeds, documents = values.shape
    filled = np.where(valid, values, 0.0)
    replicates = []
    step = max(1, _CHUNK // max(seeds, documents))
    for start in range(0, n, step):
        size = min(step, n - start)
        by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=size).astype(np.float64)
        by_document = random.multinomial(documents, np.full(documents, 1 / documents), size=size).astype(np.float64)
        total = np.einsum("bs,sd,bd->b", by_seed, filled, by_document, optimize=True)
        weight = np.einsum("bs,sd,bd->b", by_seed, valid.astype(np.float64), by_document, optimize=True)
        # a resample may meet only missing entries; it has no mean
        replicates.append(np.divide(total, weight, out=np.full(size, np.nan), where=weight > 0))
    means = np.concatenate(replicates)
    return _percentiles(np.asarray(values[valid].mean()), means[~np.isnan(means)], level)


def _percentiles(value: np.ndarray, replicates: np.ndarray, level: float) -> BootstrapInterval:
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return BootstrapInterval(value[()], low[()], high[()])
