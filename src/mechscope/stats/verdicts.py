"""Verdicts on effects by their size: changed, negligible, undecided.

With enough documents every effect differs from zero, so an effect is held against the smallest one of interest, δ. *Changed* is what a minimum-effect
test shows, that |θ| > δ (Murphy and Myors 1999); *negligible* is what an equivalence test shows, that |θ| < δ, by two one-sided tests (Schuirmann 1987;
Lakens 2017); neither is *undecided*. What cannot be negative, a divergence or a norm, can never be shown to be zero and is not tested against it.

Assumptions: documents are independent. Their values may be skewed, as divergences are: each tail probability is the larger of Student's and of the one
by Hall's (1992) monotone transformation for skewed populations, and a verdict asks for 2.5 % in its tail, so that it says what the 95 % interval says:
beyond δ, or inside. Simulated at the boundary θ = δ (20,000 draws each; the rate of "negligible", which right skew favours; 8 and 32 documents):
Student's t at 5 % is wrong in 14 and 10 % of draws of exponential values and in 21 and 15 % of log-normal ones (σ = 1); as done here in 5.0 and 3.2 %,
in 8.6 and 5.8 %, for t-distributed values (3 degrees) in 1.5 and 2.1 %, and for log-normal ones with σ = 0.5 (a spread over documents of half the mean;
seen were .2 to .7) in 4.8 and 3.5 %. Below `FEWEST` documents there is no verdict. The probabilities of many parts are corrected together
(Benjamini–Hochberg).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats as distributions

from mechscope.stats.inference import benjamini_hochberg
from mechscope.stats.skewness import ThirdMoments

Verdict = Literal["changed", "negligible", "undecided", "not measured"]
CHANGED, NEGLIGIBLE, UNDECIDED, NOT_MEASURED = VERDICTS = get_args(Verdict)

FEWEST = 8
"""Documents without which nothing is decided."""
LEVEL = 0.05
"""The largest q of a verdict: the expected share of wrong ones among those of a kind."""


def verdicts(moments: ThirdMoments, smallest: float, *, signed: bool) -> np.ndarray:
    """Decide of some means over documents whether they are larger or smaller than what matters; all of them are one family of tests.

    Args:
        moments: The values over documents.
        smallest: The smallest effect of interest, above zero; NaN where none is known, and then nothing is measured.
        signed: Whether values may be negative; otherwise zero is not a possibility that is tested.

    Returns:
        A `Verdict` of each mean, as objects.
    """
    changed = benjamini_hochberg(changed_p(moments, smallest, signed=signed))
    negligible = benjamini_hochberg(negligible_p(moments, smallest, signed=signed))
    measured = ~np.isnan(moments.mean) & ~np.isnan(smallest)
    found = np.where(changed < LEVEL, CHANGED, np.where(negligible < LEVEL, NEGLIGIBLE, UNDECIDED))
    return np.where(measured, found, NOT_MEASURED).astype(object)


def changed_p(moments: ThirdMoments, smallest: float, *, signed: bool) -> Float[np.ndarray, "*shape"]:
    """Return the p of "the mean is no larger than δ", in absolute value where it has a sign; NaN below `FEWEST` documents."""
    # of the side on which the mean lies; the other one is farther away
    side = np.where(moments.mean < 0, -1.0, 1.0) if signed else np.ones(moments.shape)
    return 2 * _tail(side * moments.mean - smallest, side * moments.skewness, moments)


def negligible_p(moments: ThirdMoments, smallest: float, *, signed: bool) -> Float[np.ndarray, "*shape"]:
    """Return the p of "the mean is at least δ", in absolute value where it has a sign; NaN below `FEWEST` documents."""
    below = _tail(smallest - moments.mean, -moments.skewness, moments)
    if not signed:
        return 2 * below
    return 2 * np.maximum(below, _tail(smallest + moments.mean, moments.skewness, moments))


def _tail(distance: ArrayLike, skewness: np.ndarray, moments: ThirdMoments) -> np.ndarray:
    """Return the probability of a mean this far above its bound where it is at the bound: the larger of Student's and Hall's, at most a half."""
    distance, n, error = np.asarray(distance, dtype=np.float64), moments.count, moments.standard_error
    root = np.sqrt(np.maximum(n, 1))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        t = np.divide(distance, error, out=np.where(distance > 0, np.inf, -np.inf), where=error > 0)
        bent = t + skewness * t**2 / (3 * root) + skewness**2 * t**3 / (27 * root**2) + skewness / (6 * root)
        corrected = np.where(np.isfinite(t), bent, t)
        p = np.maximum(distributions.t.sf(t, n - 1), distributions.t.sf(corrected, n - 1))
    return np.where((n >= FEWEST) & ~np.isnan(distance), np.minimum(p, 0.5), np.nan)
