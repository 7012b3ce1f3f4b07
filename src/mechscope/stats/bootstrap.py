"""Intervals of the mean of a skewed, bounded score such as ROUGE, by the symmetric studentised bootstrap.

Documents are resampled and each resample's mean is divided by its own standard error (Hall 1988, "On symmetric bootstrap confidence intervals"), so
the interval answers to skewness as a t interval does not, without the instability of its two-sided form.

Chosen by simulation on ROUGE-1, ROUGE-2 and ROUGE-L of first sentences against CNN/DailyMail's and SAMSum's summaries, and on paired differences of
them: it covers .93 to .98 from 8 documents up where .95 is claimed (the .98 being paired ROUGE-2, whose differences are mostly zero). Student's t falls to
.91 for ROUGE-2 at 8 and 16 documents, the percentile bootstrap to .85, BCa to .82. Nothing holds for a heavy one-sided tail: of a lognormal it covers
.95, .89 and .81 at 8 documents for σ = .5, 1 and 1.5, and .95, .93, .89 at 64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from mechscope.stats.inference import MIN_TEXTS, too_few


@dataclass(frozen=True)
class MeanInterval:
    """A mean over documents with its interval.

    Attributes:
        value: The mean; NaN without documents.
        low: Lower end; NaN where withheld.
        high: Upper end.
        withheld: Why there is no interval, in words; empty where there is one.
    """

    value: float
    low: float
    high: float
    withheld: str


def mean_interval(values: Float[np.ndarray, " n"], *, replicates: int = 2000, seed: int = 0, level: float = 0.95) -> MeanInterval:
    """Estimate a mean over documents with its symmetric studentised bootstrap interval.

    Args:
        values: One score per document.
        replicates: Number of resamples.
        seed: Seed of the resampling.
        level: Confidence, a fraction.

    Returns:
        No interval below `MIN_TEXTS` documents, or where so few of them differ that many resamples do not vary at all.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < MIN_TEXTS:
        return MeanInterval(mean, math.nan, math.nan, too_few(n, "documents"))
    centred = values - mean
    weights = _resamples(n, replicates, seed)
    means = weights @ centred
    variances = weights @ centred**2 - means**2
    # what rounding leaves of no variance is none
    errors = np.sqrt(np.where(variances > 1e-12 * values.var(), variances, 0.0) / (n - 1))
    # a resample that does not vary lies infinitely many of its standard errors away, unless it lies at the mean itself
    ratios = np.divide(np.abs(means), errors, out=np.where(np.abs(means) > 0, np.inf, 0.0), where=errors > 0)
    if np.ptp(values) == 0:
        return MeanInterval(mean, mean, mean, "")
    width = float(np.quantile(ratios, level, method="higher")) * float(values.std(ddof=1)) / math.sqrt(n)
    if not math.isfinite(width):
        return MeanInterval(mean, math.nan, math.nan, f"too few of the {n} documents differ in their score")
    return MeanInterval(mean, mean - width, mean + width, "")


@lru_cache(maxsize=4)
def _resamples(n: int, replicates: int, seed: int) -> Float[np.ndarray, "replicate n"]:
    """Return how much each document counts in each resample; tables ask for the same ones for every metric and model."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates) / n
