"""A planted jump is found where it was planted, and courses without one are called changed no more often than stated."""

from __future__ import annotations

import numpy as np
import pytest

from mechscope.stats.change_points import NULL_CORRELATION, change_points, separate

RANDOM = np.random.default_rng(7)


def autoregressive(shape: tuple[int, int], correlation: float) -> np.ndarray:
    noise = RANDOM.standard_normal(shape)
    for step in range(1, shape[1]):
        noise[:, step] = correlation * noise[:, step - 1] + (1 - correlation**2) ** 0.5 * noise[:, step]
    return noise


def test_split_jump_and_bic_are_those_of_least_squares_over_all_splits() -> None:
    curves = RANDOM.standard_normal((6, 13)).cumsum(axis=1) * 1e-4 + 5
    found = change_points(curves, replicates=2)
    steps = np.arange(13.0)
    for row, curve in enumerate(curves):
        line = np.stack([np.ones(13), steps], axis=1)
        one = np.linalg.lstsq(line, curve, rcond=None)[1][0]
        fits = {}
        for split in range(2, 12):
            coefficients, error, *_ = np.linalg.lstsq(np.column_stack([line, steps >= split]), curve, rcond=None)
            fits[split] = (float(error[0]), coefficients[2])
        best = min(fits, key=lambda split: fits[split][0])
        assert found.at[row] == best
        assert found.jump[row] == pytest.approx(fits[best][1], rel=1e-6)
        assert found.bic[row] == pytest.approx(13 * np.log(one / fits[best][0]) - 2 * np.log(13), rel=1e-6)


@pytest.mark.parametrize("steps", [8, 11, 30])
@pytest.mark.parametrize("correlation", [0.0, 0.4, NULL_CORRELATION])
def test_drifting_courses_without_a_jump_are_called_changed_no_more_often_than_stated(steps: int, correlation: float) -> None:
    curves = 40 + 3 * np.arange(steps) + autoregressive((3000, steps), correlation)
    found = change_points(curves, replicates=2)
    assert (found.p <= 0.05).mean() <= 0.05 + 3 * (0.05 * 0.95 / 3000) ** 0.5
    if correlation == NULL_CORRELATION:  # and the level is used up where the null is met
        assert (found.p <= 0.05).mean() >= 0.035


def test_bic_alone_would_find_a_change_in_most_courses_of_noise() -> None:
    assert (change_points(autoregressive((500, 11), 0.5), replicates=2).bic > 0).mean() > 0.5


@pytest.mark.parametrize(("jump", "power"), [(8.0, 0.85), (-8.0, 0.85)])
def test_a_planted_jump_is_found_at_its_step_and_its_interval_holds_it(jump: float, power: float) -> None:
    steps = 12
    places = RANDOM.integers(2, steps - 1, 600)
    curves = 0.5 * np.arange(steps) + jump * (np.arange(steps) >= places[:, None]) + autoregressive((600, steps), 0.3)
    found = change_points(curves, replicates=200)
    hit = (found.p <= 0.05) & (found.bic > 0)
    assert hit.mean() > power
    assert (found.at == places)[hit].mean() > 0.97
    assert ((found.low <= places) & (places <= found.high)).mean() > 0.93
    assert found.jump[hit].mean() == pytest.approx(jump, abs=0.3)


def test_intervals_hold_the_place_of_small_jumps_too_and_are_wider_there() -> None:
    places = RANDOM.integers(3, 13, 500)
    small, large = (
        change_points(jump * (np.arange(15) >= places[:, None]) + autoregressive((500, 15), 0.0), replicates=200) for jump in (2.0, 8.0)
    )
    assert ((small.low <= places) & (places <= small.high)).mean() > 0.88
    assert (small.high - small.low).mean() > 3 * (large.high - large.low).mean() + 0.5


def test_nothing_is_said_of_few_steps_or_missing_values_and_a_constant_does_not_change() -> None:
    assert np.isnan(change_points(RANDOM.standard_normal((2, 7))).p).all()
    curves = np.stack([np.full(9, 0.1), np.arange(9.0), np.where(np.arange(9) == 3, np.nan, 1.0), np.repeat([0.0, 1.0], [4, 5])])
    found = change_points(curves)
    assert found.p[:2] == pytest.approx([1, 1])
    assert np.isnan(found.p[2])
    assert found.at.tolist()[0::2] == [-1, -1]
    assert (found.at[3], found.low[3], found.high[3]) == (4, 4, 4)
    assert found.p[3] < 0.001
    assert found.jump[3] == pytest.approx(1)


def test_neighbouring_intervals_are_apart_where_they_do_not_overlap() -> None:
    low = np.array([[0.0, 0.9], [0.0, 0.4], [0.8, 0.1], [np.nan, 0.5]])
    high = np.array([[0.5, 1.0], [0.5, 0.9], [0.9, 0.2], [np.nan, 0.6]])
    assert separate(low, high, np.ones(4, dtype=int)).tolist() == [True, False, True, False]
