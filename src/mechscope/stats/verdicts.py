"""Verdicts on effects by their size: changed, negligible, undecided.

With enough documents every effect differs from zero, so an effect is held against the smallest one of interest, δ. *Changed* is what a minimum-effect
test shows, that |θ| > δ (Murphy and Myors 1999); *negligible* is what an equivalence test shows, that |θ| < δ, by two one-sided tests (Schuirmann 1987;
Lakens 2017); neither is *undecided*. What cannot be negative, a divergence or a norm, can never be shown to be zero and is not tested against it.

Assumptions: documents are independent. Their values may be skewed, as divergences are: each tail probability is the larger of Student's and of the one
by Hall's (1992) monotone transformation for skewed populations, and a verdict asks for 2.5 % in its tail. A sample of skewed values looks less skewed than
they are, most of all where its mean is far off, and with many parts one is; so the skewness is taken as half as much again as the part's own, or as the
median over the parts of its kind, whichever speaks more against the verdict. The probabilities of many parts are corrected together
(Benjamini–Hochberg). Below `FEWEST` documents there is no verdict.

Simulated at the boundary θ = δ with 48 dependent parts all there, one wrong verdict among them counting as one (12, 16, 32 and 100 documents; in brackets
with each part's own skewness alone): exponential values 0.0, .3, .3 and 1.0 % (18, 10, 8 and 3 %), log-normal ones with σ = .7 0.0, .3, 1.3 and 1.3 % (21
to 6 %), with σ = 1 (a spread over documents of 1.3 times the mean; seen were .2 to .7) 3.3, .5, 0.0 and .7 % (39, 31, 18 and 12 %). One part at the
boundary among others whose values are symmetric: exponential 2.7, 2.6, 2.1 and 1.8 %, σ = .7 4.0, 3.9, 3.1 and 2.5 %, σ = 1 4.9, 4.1, 3.4 and 2.4 % (7.5,
6.6, 5.9 and 4.0 %). Quantities with a sign whose values are skewed either way, three times as far spread, err no more. With 8 and 10 documents σ = 1 gives
10 and 6 %.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats as distributions

from mechscope.stats.inference import benjamini_hochberg
from mechscope.stats.skewness import ThirdMoments, hall

Verdict = Literal["changed", "negligible", "undecided", "not measured"]
CHANGED, NEGLIGIBLE, UNDECIDED, NOT_MEASURED = VERDICTS = get_args(Verdict)

FEWEST = 12
"""Documents without which nothing is decided."""
LEVEL = 0.05
"""The largest q of a verdict: the expected share of wrong ones among those of a kind."""
# chosen by simulation, see above
_SKEW = 1.5


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
    return 2 * _tail(side * moments.mean - smallest, _adverse(side * moments.skewness, moments), moments)


def negligible_p(moments: ThirdMoments, smallest: float, *, signed: bool) -> Float[np.ndarray, "*shape"]:
    """Return the p of "the mean is at least δ", in absolute value where it has a sign; NaN below `FEWEST` documents."""
    side = np.where(moments.mean < 0, -1.0, 1.0) if signed else np.ones(moments.shape)
    below = _tail(smallest - side * moments.mean, _adverse(-side * moments.skewness, moments), moments)
    if not signed:
        return 2 * below
    # from the bound on the other side, which is farther away
    return 2 * np.maximum(below, _tail(smallest + side * moments.mean, side * moments.skewness, moments))


def _adverse(skewness: np.ndarray, moments: ThirdMoments) -> np.ndarray:
    """Return the skewness that a tail is judged by: the lower it is, the rarer values are on the side on which the mean would have to lie."""
    counted = (moments.count >= FEWEST) & ~np.isnan(skewness)
    typical = np.median(skewness[counted]) if counted.any() else 0.0
    return np.minimum(np.minimum(skewness, _SKEW * skewness), typical)


def _tail(distance: ArrayLike, skewness: np.ndarray, moments: ThirdMoments) -> np.ndarray:
    """Return the probability of a mean this far above its bound where it is at the bound: the larger of Student's and Hall's, at most a half."""
    distance, n, error = np.asarray(distance, dtype=np.float64), moments.count, moments.standard_error
    with np.errstate(invalid="ignore"):
        t = np.divide(distance, error, out=np.where(distance > 0, np.inf, -np.inf), where=error > 0)
        p = distributions.t.sf(np.minimum(t, hall(t, skewness / np.sqrt(np.maximum(n, 1)))), n - 1)
    return np.where((n >= FEWEST) & ~np.isnan(distance), np.minimum(p, 0.5), np.nan)
