"""The mean of a skewed score: its interval, and when there is none."""

from __future__ import annotations

import numpy as np
import pytest

from mechscope.stats.bootstrap import mean_interval


def test_the_interval_of_many_is_the_normal_one() -> None:
    x = np.random.default_rng(0).exponential(size=400)
    found = mean_interval(x, replicates=4000)
    error = x.std(ddof=1) / 20
    assert found.value == pytest.approx(x.mean())
    assert [found.low, found.high] == pytest.approx([x.mean() - 1.96 * error, x.mean() + 1.96 * error], abs=0.15 * error)
    # symmetric by construction
    assert found.high - found.value == pytest.approx(found.value - found.low)


def test_it_is_what_resampling_by_a_loop_gives() -> None:
    x, random = np.random.default_rng(3).exponential(size=10), np.random.default_rng(8)
    ratios = []
    for _ in range(6000):
        drawn = x[random.integers(0, 10, 10)]
        ratios.append(abs(drawn.mean() - x.mean()) / (drawn.std(ddof=1) / 10**0.5))
    width = np.quantile(ratios, 0.95) * x.std(ddof=1) / 10**0.5
    found = mean_interval(x, replicates=6000)
    assert found.high - found.value == pytest.approx(width, rel=0.08)


@pytest.mark.parametrize("n", [8, 16, 64])
def test_a_skewed_score_is_covered(n: int) -> None:
    # like ROUGE-2: a third is zero; the percentile bootstrap that was here covered .85 at 8 documents
    random, draws = np.random.default_rng(n), 800
    scores = random.gamma(1.0, 0.1, (draws, n)) * (random.random((draws, n)) > 1 / 3)
    found = [mean_interval(one, replicates=500) for one in scores]
    covered = np.mean([one.low <= 0.1 * 2 / 3 <= one.high for one in found if not one.withheld])
    assert 0.91 <= covered <= 0.98


def test_a_seed_repeats_and_another_differs() -> None:
    x = np.random.default_rng(0).normal(size=30)
    assert mean_interval(x, seed=1) == mean_interval(x, seed=1)
    assert mean_interval(x, seed=1).low != mean_interval(x, seed=2).low


def test_few_documents_have_a_mean_and_no_interval() -> None:
    found = mean_interval(np.array([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert found.value == pytest.approx(0.3)
    assert np.isnan([found.low, found.high]).all()
    assert found.withheld == "too few documents: 5 of at least 6"
    assert np.isnan(mean_interval(np.array([])).value)
    # one document in seven scores at all: a third of the resamples do not vary
    lone = mean_interval(np.array([0.3, 0, 0, 0, 0, 0, 0]))
    assert lone.withheld == "too few of the 7 documents differ in their score"
    assert np.isnan(lone.low)
    equal = mean_interval(np.full(8, 0.2))
    assert (equal.low, equal.high, equal.withheld) == (equal.value, equal.value, "")


def test_equal_scores_have_an_interval_whatever_rounding_leaves() -> None:
    for n in (6, 10):
        equal = mean_interval(np.full(n, 0.1))
        assert (equal.low, equal.high, equal.withheld) == (equal.value, equal.value, "")
