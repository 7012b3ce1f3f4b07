"""Fieller's interval without its algebra: the shares that a t test does not exclude, found by bisection."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.stats import ttest_1samp


def by_inverting_t_tests(part: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """Return the ends of the 95 % interval of mean(part) / mean(whole)."""
    share = float(part.mean() / whole.mean())

    def excess(r: float) -> float:
        return float(ttest_1samp(part - r * whole, 0.0).pvalue) - 0.05

    ends = []
    for side in (-1, 1):
        step = 1e-3
        while excess(share + side * step) > 0:
            step *= 2
        ends.append(brentq(excess, share + side * step / 2 if step > 1e-3 else share, share + side * step, xtol=1e-12))
    return ends[0], ends[1]
