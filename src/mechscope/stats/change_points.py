"""Change points: whether a curve over checkpoints jumps, and between which two.

One segment is a straight line over the steps in their order; two segments are parallel lines, so that a steady drift alone is no change. The split with
the least squared error is taken, each side of at least two steps, and the two are compared by BIC (Schwarz 1978), the place of the split counted as a
parameter. BIC alone is no test: the split is searched for, and checkpoints of one training are alike. So p is the share of null curves that gain as much
from their best split: stationary autoregressive ones whose neighbours correlate by `NULL_CORRELATION` (white noise gains less). The gain does not change
with level, slope or scale, so one simulated null serves all curves of as many steps. The interval of the place is a parametric bootstrap
around the two segments, with the correlation of their residuals.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int

MIN_STEPS = 8
"""Fewer steps leave less than four degrees of freedom beside two segments: nothing is said of a change point then."""
NULL_CORRELATION = 0.7
"""Correlation of neighbouring steps under the null. What holds for it holds for less, white noise included; a random walk is beyond it."""
_EDGE = 2
_DRAWS = 19_999


@dataclass(frozen=True)
class ChangePoints:
    """Of every curve its best split, and what speaks for it; NaN, or −1 for places, where there are too few steps or values are missing.

    Attributes:
        at: The first step behind the change, by its place from 0.
        low: Earliest place that the interval (95 %) holds.
        high: Latest.
        jump: How much the curve lies higher behind it, beyond the common slope.
        bic: BIC of one segment less that of two: above zero two describe it better.
        p: Share of null curves that gain as much from their best split.
    """

    at: Int[np.ndarray, " curve"]
    low: Int[np.ndarray, " curve"]
    high: Int[np.ndarray, " curve"]
    jump: Float[np.ndarray, " curve"]
    bic: Float[np.ndarray, " curve"]
    p: Float[np.ndarray, " curve"]


def change_points(values: Float[np.ndarray, "curve step"], *, replicates: int = 400, seed: int = 0) -> ChangePoints:
    """Find the change point of every curve.

    Args:
        values: One curve per row, at the same steps; rows with a missing value are left out.
        replicates: Bootstrap replicates of the interval of the place.
        seed: Of the null and the bootstrap.

    Returns:
        The best split of each curve with what speaks for it.

    Source:
        Schwarz 1978 for the criterion; Bai and Perron 1998 for breaks at unknown places.
    """
    values = np.atleast_2d(np.asarray(values, dtype=float))
    n_curves, n_steps = values.shape
    at, low, high = (np.full(n_curves, -1) for _ in range(3))
    jump, bic, p = (np.full(n_curves, np.nan) for _ in range(3))
    whole = np.isfinite(values).all(axis=1)
    if n_steps >= MIN_STEPS and whole.any():
        lines, splits, lengths = _design(n_steps)
        curves = values[whole]
        scale = np.abs(curves - curves.mean(axis=1, keepdims=True)).max(axis=1, keepdims=True)
        level = scale[:, 0] <= 1e-12 * np.maximum(np.abs(curves).max(axis=1), 1e-300)  # rounding is no course
        unit = np.where(level[:, None], 0.0, (curves - curves.mean(axis=1, keepdims=True)) / np.where(scale > 0, scale, 1.0))
        best, explained, whole_error = _best(unit, lines, splits)
        level |= whole_error <= 1e-20  # a straight line, of a scale of 1
        left = np.maximum(whole_error - explained, 1e-20)
        gain = np.where(level, 0.0, explained / left)
        at[whole] = best + _EDGE
        jump[whole] = np.einsum("cs,cs->c", unit, splits[best]) / lengths[best] * scale[:, 0]
        bic[whole] = n_steps * np.log1p(gain) - 2 * np.log(n_steps)
        null = _null(n_steps, seed)
        p[whole] = (1 + len(null) - np.searchsorted(null, gain, side="left")) / (1 + len(null))
        low[whole], high[whole] = _interval(unit, best, left, lines, splits, replicates, seed)
        for column in (at, low, high):
            column[np.flatnonzero(whole)[level]] = -1
    return ChangePoints(at, low, high, jump, bic, p)


def separate(
    low: Float[np.ndarray, "curve step"], high: Float[np.ndarray, "curve step"], step: Int[np.ndarray, " curve"]
) -> Bool[np.ndarray, " curve"]:
    """Tell of every curve whether the intervals at a step and at the one before do not overlap; False where one is missing."""
    rows = np.arange(len(step))
    with np.errstate(invalid="ignore"):
        return np.asarray((low[rows, step] > high[rows, step - 1]) | (high[rows, step] < low[rows, step - 1]))


@lru_cache
def _design(n_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an orthonormal basis of lines (step, 2), for each split the unit vector of its jump beside lines (split, step), and the jump's length there."""
    lines, _ = np.linalg.qr(np.stack([np.ones(n_steps), np.arange(n_steps) - (n_steps - 1) / 2], axis=1))
    behind = (np.arange(n_steps) >= np.arange(_EDGE, n_steps - _EDGE + 1)[:, None]).astype(float)
    beside = behind - behind @ lines @ lines.T
    lengths = np.linalg.norm(beside, axis=1)
    return lines, beside / lengths[:, None], lengths


def _best(curves: np.ndarray, lines: np.ndarray, splits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each curve's best split, the squares it explains beside a line, and those that the line leaves."""
    error = np.square(curves - curves @ lines @ lines.T).sum(axis=-1)
    explained = np.square(curves @ splits.T)
    best = explained.argmax(axis=-1)
    return best, np.take_along_axis(explained, best[..., None], -1)[..., 0], error


def _noise(shape: tuple[int, ...], correlation: np.ndarray | float, random: np.random.Generator) -> np.ndarray:
    """Draw stationary autoregressive noise of variance 1 along the last axis."""
    noise = random.standard_normal(shape)
    fresh = np.sqrt(1 - np.square(correlation))
    for step in range(1, shape[-1]):
        noise[..., step] = correlation * noise[..., step - 1] + fresh * noise[..., step]
    return noise


@lru_cache
def _null(n_steps: int, seed: int) -> np.ndarray:
    """Return the gains of null curves from their best splits, sorted."""
    lines, splits, _ = _design(n_steps)
    _, explained, error = _best(_noise((_DRAWS, n_steps), NULL_CORRELATION, np.random.default_rng(seed)), lines, splits)
    return np.sort(explained / np.maximum(error - explained, 1e-300))


def _interval(
    curves: np.ndarray, best: np.ndarray, left: np.ndarray, lines: np.ndarray, splits: np.ndarray, replicates: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval of each curve's place of change, over curves that are its two segments and noise like its residuals."""
    n_steps = curves.shape[1]
    fitted = curves @ lines @ lines.T + np.einsum("cs,cs->c", curves, splits[best])[:, None] * splits[best]
    residuals = curves - fitted
    squares = np.maximum(np.square(residuals).sum(axis=1), 1e-300)
    correlation = np.clip((residuals[:, 1:] * residuals[:, :-1]).sum(axis=1) / squares, 0.0, NULL_CORRELATION)
    spread = np.sqrt(left / (n_steps - 4))
    random = np.random.default_rng(seed)
    ends = np.empty((2, len(curves)), dtype=int)
    for start in range(0, len(curves), 256):  # memory: 256 curves of all replicates at a time
        part = slice(start, start + 256)
        noise = _noise((replicates, len(fitted[part]), n_steps), correlation[part], random) * spread[part, None]
        places = _best(fitted[part] + noise, lines, splits)[0] + _EDGE
        ends[:, part] = np.quantile(places, (0.025, 0.975), axis=0, method="nearest")
    return ends[0], ends[1]
