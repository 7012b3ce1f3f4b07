"""Balanced accuracy over clusters: its value, its interval where answers are independent, alike, or all right, and differences on the same clusters."""

from __future__ import annotations

import numpy as np
import pytest

from mechscope.stats.inference import share_interval
from mechscope.stats.recalls import balanced_accuracy


def one_each(right: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return right and seen of clusters of one answer each."""
    seen = np.eye(kind.max() + 1)[kind]
    return seen * right[:, None], seen


def test_the_value_is_the_mean_of_each_class_share_by_hand() -> None:
    # class 0: 3 of 4 and 0 of 2, so 3 of 6; class 1: 1 of 1, 4 of 4
    found = balanced_accuracy(np.array([[3, 1], [0, 4]]), np.array([[4, 1], [2, 4]]))
    assert found.value == pytest.approx((0.5 + 1.0) / 2)
    # 3 − ½·4 and 0 − ½·2 of six answers, halved for two classes; the other class has no deviations
    np.testing.assert_allclose(found.influence, [1 / 12, -1 / 12])


def test_of_many_single_answers_the_interval_is_wilsons_of_each_class_combined() -> None:
    random = np.random.default_rng(0)
    kind = np.repeat([0, 1], [700, 300])
    right = random.random(1000) < 0.8
    found = balanced_accuracy(*one_each(right, kind))
    shares = [right[kind == each].mean() for each in (0, 1)]
    ends = [share_interval(int(right[kind == each].sum()), n) for each, n in ((0, 700), (1, 300))]
    low = np.mean(shares) - np.hypot(*(share - end[0] for share, end in zip(shares, ends, strict=True))) / 2
    high = np.mean(shares) + np.hypot(*(end[1] - share for share, end in zip(shares, ends, strict=True))) / 2
    # of n clusters the variance is divided by n − 1, and Student's quantile is a little wider
    assert (float(found.low), float(found.high)) == pytest.approx((low, high), abs=5e-4)


def test_answers_that_are_copies_of_one_another_count_once() -> None:
    random = np.random.default_rng(1)
    right, seen = one_each(random.random(60) < 0.7, np.arange(60) % 2)
    once, often = balanced_accuracy(right, seen), balanced_accuracy(20 * right, 20 * seen)
    np.testing.assert_allclose([often.low, often.high], [once.low, once.high], rtol=1e-12)


def test_where_all_answers_are_right_the_interval_has_the_width_of_so_many_clusters() -> None:
    few, many = (balanced_accuracy(*one_each(np.ones(n), np.arange(n) % 2)) for n in (20, 400))
    assert few.value == few.high == 1.0
    # of 10 answers of a class, all right, Wilson's lower end is 0.722; two classes narrow it, Student's quantile widens it
    assert 0.75 < few.low < 0.8
    assert few.low < many.low < 1.0


@pytest.mark.parametrize(("docs", "rows", "rho"), [(20, 8, 0.1), (60, 1, 0.0), (60, 8, 0.4)])
def test_intervals_cover_the_truth_of_alike_answers(docs: int, rows: int, rho: float) -> None:
    random, shares = np.random.default_rng(2), np.array([0.9, 0.6])
    own = random.beta(shares * (1 / max(rho, 1e-9) - 1), (1 - shares) * (1 / max(rho, 1e-9) - 1), size=(2000, docs, 2))
    seen = random.poisson(rows, size=own.shape) if rows > 1 else np.eye(2)[random.integers(2, size=own.shape[:2])]
    right = random.binomial(seen.astype(int), own)
    found = balanced_accuracy(right, seen)
    covered = np.mean((found.low <= shares.mean()) & (shares.mean() <= found.high))
    # 2,000 draws tell .95 to ±.01
    assert 0.93 <= covered <= 0.985


def test_a_difference_on_the_same_clusters_has_only_the_noise_of_what_differs() -> None:
    random = np.random.default_rng(3)
    kind = np.arange(400) % 2
    first = random.random(400) < 0.7
    second = np.where(random.random(400) < 0.02, ~first, first)
    one, other = (balanced_accuracy(*one_each(each, kind)) for each in (first, second))
    alike = one.minus(other)
    apart = one.minus(balanced_accuracy(*one_each(random.permutation(second), kind)))
    assert alike.value == pytest.approx(float(one.value - other.value))
    assert alike.high - alike.low < (apart.high - apart.low) / 3
    same = one.minus(one)
    # intervals of shares lean towards a half, so a little is left of their ends where they face one another
    assert same.value == 0.0
    assert same.low <= 0.0 <= same.high
    assert same.high - same.low < (apart.high - apart.low) / 5
    assert same.p == 1.0


def test_p_values_of_no_difference_are_uniform_and_those_of_a_large_one_small() -> None:
    random = np.random.default_rng(4)
    seen = np.broadcast_to(np.eye(2)[np.arange(80) % 2], (2000, 80, 2))
    one, other = (balanced_accuracy(random.binomial(1, 0.7, seen.shape) * seen, seen) for _ in range(2))
    rate = np.mean(one.minus(other).p < 0.05)
    assert 0.03 < rate < 0.065
    assert balanced_accuracy(seen[0], seen[0]).minus(one).p.max() < 0.01


def test_a_class_of_one_cluster_has_no_interval() -> None:
    found = balanced_accuracy(*one_each(np.ones(9), np.array([0] * 8 + [1])))
    assert found.value == 1.0
    assert np.isnan(found.low)
    assert np.isnan(found.high)
