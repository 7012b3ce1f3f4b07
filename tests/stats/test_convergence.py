"""Convergence: flat is told from falling, also through noise, and what cannot be told does not count as converged."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter

from mechscope.errors import DataError
from mechscope.stats.convergence import TOLERANCE, convergence


def curve(rate: float, noise: float, kind: str, *, n: int, linear: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a loss that falls by 1 as exp(−rate · way) does, with noise, and its learning rates."""
    draw = np.random.default_rng(seed)
    pace = 1 - np.arange(n) / n if linear else np.ones(n)
    way = (pace.cumsum() - pace / 2) / pace.sum()
    made = {
        "gaussian": draw.standard_normal(n),
        "heavy tails": draw.standard_t(3, n) / np.sqrt(3),
        "autocorrelated": np.sqrt(0.75) * lfilter([1], [1, -0.5], draw.standard_normal(n)),
    }[kind]
    return np.exp(-rate * way) / (1 - np.exp(-rate)) + noise * made, pace


KINDS = pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "autocorrelated"])
SCHEDULES = pytest.mark.parametrize("linear", [False, True])


@KINDS
@SCHEDULES
@pytest.mark.parametrize(("n", "noise"), [(20, 0.02), (50, 0.05), (250, 0.1), (250, 0.2)])
def test_a_loss_that_still_falls_has_not_converged(kind: str, linear: bool, n: int, noise: float) -> None:
    # an exponential of rate 1 brings 16 % of its fall in the last quarter
    said = [
        convergence(y, pace=pace).converged for y, pace in (curve(1, noise, kind, n=n, linear=linear, seed=seed) for seed in range(200))
    ]
    assert np.mean(said) <= 0.05


@KINDS
@SCHEDULES
@pytest.mark.parametrize(("n", "noise"), [(50, 0.005), (250, 0.02), (1000, 0.04)])
def test_a_flat_noisy_loss_has_converged(kind: str, linear: bool, n: int, noise: float) -> None:
    said = [
        convergence(y, pace=pace).converged for y, pace in (curve(40, noise, kind, n=n, linear=linear, seed=seed) for seed in range(200))
    ]
    assert np.mean(said) >= 0.95


def test_a_loss_that_was_noise_alone_has_converged_where_there_are_enough_points() -> None:
    draw = np.random.default_rng(0)
    assert np.mean([convergence(draw.standard_normal(4000)).converged for _ in range(100)]) >= 0.95
    assert not any(convergence(draw.standard_normal(16)).converged for _ in range(100))


def test_a_falling_rate_flattens_a_curve_that_has_not_arrived() -> None:
    # the same training, seen by its steps alone
    y, pace = curve(1.5, 0.0, "gaussian", n=200, linear=True, seed=0)
    assert not convergence(y, pace=pace).converged
    assert convergence(y).late_share < TOLERANCE < convergence(y, pace=pace).late_share


def test_a_loss_that_rises_at_the_end_has_not_arrived() -> None:
    found = convergence([*np.linspace(5, 1, 30), *np.linspace(1, 3, 30)])
    assert not found.converged
    assert found.late_share < 0
    assert "raised the loss" in found.reason


def test_the_share_is_of_the_whole_change() -> None:
    found = convergence(np.linspace(3, 1, 400))
    assert found.late_share == pytest.approx(0.25, abs=0.01)
    assert found.reason == "its last quarter still lowered the loss by 26\u202f% of the whole change"
    assert convergence(np.linspace(3, 1, 400), whole=20).late_share == pytest.approx(0.025, abs=0.001)
    assert convergence(np.linspace(3, 1, 400), whole=20).converged


@pytest.mark.parametrize("n", [0, 2, 6, 12])
def test_of_few_points_nothing_is_said(n: int) -> None:
    found = convergence(np.exp(-np.arange(n, dtype=float)))
    assert not found.converged
    # a training of the length n has a quarter of its points at the end
    points = {0: "0 points", 2: "0 points", 6: "1 point", 12: "3 points"}[n]
    assert found.reason == f"its last quarter has {points}, too few to tell whether it arrived"


def test_a_constant_loss_has_nothing_before_it() -> None:
    assert convergence(np.ones(50)).converged
    assert convergence([5.0] + [1.0] * 50).converged


def test_what_is_no_curve_is_refused() -> None:
    with pytest.raises(DataError, match="NaN or infinite"):
        convergence([1.0, float("nan"), 0.5])
    with pytest.raises(DataError, match="give one of each per point"):
        convergence([1.0, 2.0], pace=[1.0])


def test_nothing_to_learn_and_a_rate_of_nothing_say_so() -> None:
    assert "nothing to learn" in convergence(np.linspace(1, 0, 40), whole=0.0).reason
    ended = convergence(np.linspace(1, 0, 8), pace=[1.0, *[0.0] * 7])
    assert not ended.converged
    assert "its learning rate was zero" in ended.reason
