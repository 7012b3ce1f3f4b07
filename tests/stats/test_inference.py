"""Intervals, tests and corrections."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mechscope.stats.inference import (
    MIN_TEXTS,
    benjamini_hochberg,
    draw_p,
    estimate,
    interval,
    p_value,
    paired_difference,
    rank_correlation,
    rank_p,
    share_interval,
    too_few,
)
from mechscope.stats.moments import Moments
from mechscope.stats.skewness import ThirdMoments
from tests.slips import slip
from tests.stats.skewed import mean_test


def test_the_interval_of_six_numbers_by_the_printed_t_table() -> None:
    # t(.975, 5) = 2.571 in every printed table; mean 3.5, se sqrt(3.5/6)
    low, high = interval(3.5, (3.5 / 6) ** 0.5, 6)
    assert float(low) == pytest.approx(3.5 - 2.5706 * 0.76376, abs=1e-4)
    assert float(high) == pytest.approx(3.5 + 2.5706 * 0.76376, abs=1e-4)


def test_below_six_texts_there_is_neither_an_interval_nor_a_test() -> None:
    for n in range(1, MIN_TEXTS):
        few = paired_difference(np.linspace(1.0, 2.0, n), np.zeros(n))
        assert np.isnan([few.low, few.high, few.p]).all()
        assert float(few.mean) == pytest.approx(np.linspace(1.0, 2.0, n).mean())
    enough = paired_difference(np.linspace(1.0, 2.0, MIN_TEXTS), np.zeros(MIN_TEXTS))
    assert not np.isnan([enough.low, enough.high, enough.p]).any()
    assert too_few(3) == "too few texts: 3 of at least 6"
    assert too_few(2, "seeds", 3) == "too few seeds: 2 of at least 3"
    # each element has its own number of texts
    ragged = np.where(np.arange(7)[:, None] < [7, 6, 5], np.linspace(1.0, 2.0, 7)[:, None], np.nan)
    assert np.isnan(paired_difference(ragged, 0 * ragged).p).tolist() == [False, False, True]
    # of trainings three have an interval
    assert not np.isnan(interval(0.1, 0.05, 3, fewest=3)).any()


def test_each_end_is_the_farther_of_students_and_halls() -> None:
    random = np.random.default_rng(4)
    columns = [random.lognormal(size=9) - 1.2, 0.6 - random.exponential(size=9), random.normal(size=9), np.arange(9.0)]
    values = np.stack(columns, axis=1)
    found = paired_difference(values, np.zeros_like(values))
    for own, expected in zip((found.low, found.high, found.p), mean_test(values), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-9, atol=1e-12)
    # symmetric values: Student's
    assert float(found.low[3]) == pytest.approx(scipy_stats.ttest_1samp(np.arange(9.0), 0.0).confidence_interval().low)


SKEWED: dict[str, tuple[Callable[[np.random.Generator, tuple[int, int]], np.ndarray], float]] = {
    "normal": (lambda random, shape: random.normal(size=shape), 0.0),
    "heavy tails": (lambda random, shape: random.standard_t(3, shape), 0.0),
    "exponential": (lambda random, shape: random.exponential(size=shape), 1.0),
    "log-normal": (lambda random, shape: random.lognormal(0.0, 0.7, shape), float(np.exp(0.245))),
    "skewed to the left": (lambda random, shape: -random.lognormal(0.0, 0.7, shape), -float(np.exp(0.245))),
}


@pytest.mark.parametrize("n", [8, 16, 64])
@pytest.mark.parametrize("world", SKEWED)
def test_means_of_skewed_effects_are_covered_as_often_as_is_said(world: str, n: int) -> None:
    # Student's t covers .895 of exponential and .89 of log-normal means of 8
    draw, mean = SKEWED[world]
    values = draw(np.random.default_rng(n), (n, 10_000))
    found = paired_difference(values, np.zeros_like(values))
    assert 0.93 <= float(((found.low <= mean) & (mean <= found.high)).mean()) <= 0.97


def test_interval_and_p_of_symmetric_values_equal_scipys_one_sample_test() -> None:
    half = np.random.default_rng(0).normal(0.0, 1.0, size=(6, 7))
    x = 0.3 + np.concatenate([half, -half])
    moments = ThirdMoments((7,))
    moments.update_many(x)
    found = estimate(moments, level=0.9)
    expected = scipy_stats.ttest_1samp(x, 0.0)
    np.testing.assert_allclose(found.p, expected.pvalue, rtol=1e-10)
    np.testing.assert_allclose(found.low, expected.confidence_interval(0.9).low, rtol=1e-10)
    np.testing.assert_allclose(found.high, expected.confidence_interval(0.9).high, rtol=1e-10)
    np.testing.assert_array_equal(found.n, np.full(7, 12))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    moments = ThirdMoments((20_000,))
    moments.update_many(random.normal(2.0, 3.0, size=(6, 20_000)))
    found = estimate(moments)
    # the farther of two ends: of normal values a little more often than Student's .950
    assert ((found.low < 2.0) & (found.high > 2.0)).mean() == pytest.approx(0.963, abs=0.006)


def test_moments_without_a_third_are_refused() -> None:
    # their interval would be Student's, which covers .89 of skewed means
    moments = Moments((3,))
    moments.update_many(np.random.default_rng(0).exponential(size=(8, 3)))
    with pytest.raises(AttributeError, match="skewness"):
        estimate(slip(moments))


def test_no_change_in_any_document_is_no_evidence() -> None:
    assert p_value(0.0, 0.0, 10) == 1.0


def test_the_same_change_in_every_document_is_certain() -> None:
    assert p_value(0.1, 0.0, 10) == 0.0


def test_one_document_says_nothing_about_another() -> None:
    assert np.isnan(p_value(0.1, np.nan, 1))
    assert np.isnan(p_value(0.1, 0.0, 1))
    assert np.isnan(interval(0.1, np.nan, 1)).all()


def test_the_sign_of_a_mean_does_not_change_its_p() -> None:
    assert p_value(-0.4, 0.2, 9) == p_value(0.4, 0.2, 9)


def test_q_values_of_a_worked_example() -> None:
    # m = 5: p·m/rank = .05, .05, .065, .05125, .6; running minimum from the largest: .05, .05, .05125, .05125, .6
    q = benjamini_hochberg([0.01, 0.6, 0.02, 0.041, 0.039])
    np.testing.assert_allclose(q, [0.05, 0.6, 0.05, 0.05125, 0.05125], rtol=1e-12)


def test_q_values_equal_a_loop_over_ranks() -> None:
    p = np.random.default_rng(0).random((6, 9)) ** 3
    flat = p.ravel()
    order = np.argsort(flat)
    expected = np.empty(flat.size)
    smallest = 1.0
    for position in reversed(range(flat.size)):
        smallest = min(smallest, flat[order[position]] * flat.size / (position + 1))
        expected[order[position]] = smallest
    np.testing.assert_allclose(benjamini_hochberg(p), expected.reshape(6, 9), rtol=1e-12)
    np.testing.assert_allclose(benjamini_hochberg(p).ravel(), scipy_stats.false_discovery_control(flat), rtol=1e-12)


def test_what_was_not_tested_does_not_count_among_the_tests() -> None:
    q = benjamini_hochberg([0.01, np.nan, 0.04, np.nan])
    np.testing.assert_allclose(q[[0, 2]], benjamini_hochberg([0.01, 0.04]))
    assert np.isnan(q[[1, 3]]).all()
    assert np.isnan(benjamini_hochberg([np.nan, np.nan])).all()


def test_under_no_effect_few_sets_of_heads_have_any_discovery() -> None:
    p = np.random.default_rng(0).random((2000, 30))
    assert np.mean([(benjamini_hochberg(row) < 0.05).any() for row in p]) < 0.065


def test_a_paired_difference_is_the_test_of_the_differences() -> None:
    random = np.random.default_rng(2)
    before = random.normal(size=30)
    after = before + random.normal(0.2, 0.1, size=30)
    found = paired_difference(after, before)
    assert float(found.mean) == pytest.approx((after - before).mean())
    assert [float(found.low), float(found.high), float(found.p)] == pytest.approx(mean_test(after - before), rel=1e-9)


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        paired_difference(np.zeros(3), np.zeros(4))


def test_wilsons_interval_of_a_worked_example() -> None:
    # 81 of 263: (.30798 + z²/526 ± z sqrt(.30798·.69202/263 + z²/(4·263²))) / (1 + z²/263)
    z, p, n = 1.959964, 81 / 263, 263
    centre, width = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n * n)) ** 0.5
    low, high = share_interval(81, 263)
    assert low == pytest.approx((centre - width) / (1 + z**2 / n), abs=1e-6)
    assert high == pytest.approx((centre + width) / (1 + z**2 / n), abs=1e-6)


def test_a_share_of_none_is_still_uncertain() -> None:
    low, high = share_interval(0, 12)
    assert low == pytest.approx(0.0, abs=1e-12)
    assert high > 0.2
    assert np.isnan(share_interval(0, 0)).all()


def test_a_rank_among_others_is_exact_whatever_their_distribution() -> None:
    assert rank_p(3.0, np.array([1.0, 2.0, 4.0])) == (2 / 4, 3 / 4)
    # ties count against it on both sides
    assert rank_p(2.0, np.array([2.0, 2.0, 2.0])) == (1.0, 1.0)
    assert np.isnan(rank_p(2.0, np.array([]))).all()
    assert np.isnan(rank_p(np.nan, np.ones(5))).all()
    random, draws = np.random.default_rng(1), 4000
    values = random.lognormal(0, 2, (draws, 20))
    p = np.array([rank_p(one[0], one[1:]) for one in values])
    for level in (0.05, 0.1, 0.5):
        assert (p <= level + 1e-12).mean(0) == pytest.approx(level, abs=3.5 * (level * (1 - level) / draws) ** 0.5)


@pytest.mark.parametrize("n", [8, 12, 48])
@pytest.mark.parametrize("true", [0.0, 0.5])
def test_rank_correlations_are_covered(n: int, true: float) -> None:
    random, draws = np.random.default_rng(n), 1500
    rho = 6 / np.pi * np.arcsin(true / 2)  # Spearman's, of a normal pair
    covered = []
    for _ in range(draws):
        x = random.normal(size=n)
        found = rank_correlation(x, true * x + (1 - true**2) ** 0.5 * random.normal(size=n))
        if not np.isnan(found.low):  # those in perfect order have no interval
            covered.append(found.low <= rho <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.99


def test_series_that_do_not_vary_have_no_rank_correlation() -> None:
    for x, y in ((np.ones(8), np.arange(8.0)), (np.array([1.0, np.nan, 2.0]), np.arange(3.0)), (np.arange(2.0), np.arange(2.0))):
        assert np.isnan(rank_correlation(x, y).rho)
    few = rank_correlation(np.arange(5.0), np.array([0.0, 2.0, 1.0, 3.0, 4.0]))
    assert few.rho == pytest.approx(0.9)
    assert np.isnan([few.low, few.high]).all()


def test_one_more_draw_is_no_surprise_and_a_far_one_is() -> None:
    random = np.random.default_rng(0)
    draws, more = random.normal(3.0, 2.0, size=(12, 4000)), random.normal(3.0, 2.0, size=4000)
    p = draw_p(more, draws)
    # uniform, as 12 draws' own spread is taken into account: .05 to four standard errors
    assert abs((p < 0.05).mean() - 0.05) < 4 * (0.05 * 0.95 / 4000) ** 0.5
    assert abs((p < 0.5).mean() - 0.5) < 4 * (0.25 / 4000) ** 0.5
    assert (draw_p(draws.mean(0) + 20.0, draws) < 1e-3).all()
    assert draw_p(np.array([1.0, 2.0]), np.ones((5, 2))).tolist() == [1.0, 0.0]
