"""The interval and test of a skewed mean without their algebra: ends found by bisection on the larger of Student's and Hall's tails."""

from __future__ import annotations

import numpy as np
from scipy import special, stats


def tail(t: np.ndarray, a: np.ndarray, n: int) -> np.ndarray:
    """Return the probability of means so many standard errors above the truth, where means of n values have this skewness."""
    with np.errstate(divide="ignore", invalid="ignore"):
        # Hall's (1992) polynomial, written as the cube that it is
        bent = np.where(np.abs(a) > 1e-12, ((1 + a * t / 3) ** 3 - 1) / a + a / 6, t)
    return np.maximum(special.stdtr(n - 1, -t), special.stdtr(n - 1, -bent))


def mean_test(values: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Return lower ends, upper ends and two-sided p of a mean of zero, ``(3, ...)``, of values ``(text, ...)``."""
    values = np.asarray(values, dtype=np.float64)
    n, mean = len(values), values.mean(0)
    alike = np.ptp(values, axis=0) == 0
    error = np.where(alike, 1.0, stats.sem(values))
    a = np.where(alike, 0.0, stats.skew(np.where(alike, np.arange(n).reshape(-1, *[1] * mean.ndim), values), bias=False)) / n**0.5
    # mirrored, the upper end is a lower one
    low, high = mean - error * _reach(a, n, level), mean + error * _reach(-a, n, level)
    side = np.where(mean >= 0, 1.0, -1.0)
    p = np.minimum(1.0, 2 * tail(side * mean / error, side * a, n))
    return np.array([np.where(alike, values[0], low), np.where(alike, values[0], high), np.where(alike, values[0] == 0, p)])


def _reach(a: np.ndarray, n: int, level: float) -> np.ndarray:
    """Return how many standard errors below the mean the truth's tail comes down to (1 − level) / 2."""
    near, far = np.zeros_like(a), np.full_like(a, 1e4)
    for _ in range(64):
        middle = (near + far) / 2
        likely = tail(middle, a, n) > (1 - level) / 2
        near, far = np.where(likely, middle, near), np.where(likely, far, middle)
    return near
