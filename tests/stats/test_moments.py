"""Streaming moments and resampled means."""

from __future__ import annotations

import numpy as np
import pytest

from mechscope.stats.chance import poisson_weights
from mechscope.stats.moments import Moments, Resampled


@pytest.fixture
def documents() -> np.ndarray:
    """Return 23 documents of (3, 2) values with an offset that would ruin a naive sum of squares, and some missing."""
    random = np.random.default_rng(0)
    x = 1e6 + random.normal(size=(23, 3, 2)) * np.array([1.0, 1e-3])
    x[random.random(x.shape) < 0.3] = np.nan
    x[:, 2, 1] = np.nan
    x[1:, 2, 0] = np.nan
    x[0, 2, 0] = 5.0
    return x


def whole(x: np.ndarray) -> Moments:
    moments = Moments(x.shape[1:])
    moments.update_many(x)
    return moments


def assert_same(a: Moments, b: Moments) -> None:
    np.testing.assert_array_equal(a.count, b.count)
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-12)
    # values 1e6 with a spread of 1e-3 have a variance known to 1e-7 at best, whatever the algorithm
    np.testing.assert_allclose(a.variance, b.variance, rtol=1e-6)


def test_moments_equal_numpy_with_missing_values_left_out(documents: np.ndarray) -> None:
    moments = whole(documents)
    for index in np.ndindex(3, 2):
        present = [x for x in documents[(slice(None), *index)] if x == x]
        assert moments.count[index] == len(present)
        if len(present) == 0:
            assert np.isnan(moments.mean[index])
        else:
            assert moments.mean[index] == pytest.approx(np.mean(present), rel=1e-14)
        if len(present) < 2:
            assert np.isnan(moments.variance[index])
            assert np.isnan(moments.standard_error[index])
        else:
            assert moments.variance[index] == pytest.approx(np.var(present, ddof=1), rel=1e-6)
            assert moments.standard_error[index] == pytest.approx(np.std(present, ddof=1) / len(present) ** 0.5, rel=1e-6)


def test_moments_of_three_numbers_by_hand() -> None:
    moments = Moments()
    for x in (1.0, 2.0, 6.0):
        moments.update(np.array(x))
    assert [float(x) for x in (moments.count, moments.mean, moments.variance)] == [3.0, 3.0, 7.0]
    assert moments.standard_error == pytest.approx((7 / 3) ** 0.5)


def test_document_by_document_equals_one_batch(documents: np.ndarray) -> None:
    moments = Moments((3, 2))
    for x in documents:
        moments.update(x)
    assert_same(moments, whole(documents))


@pytest.mark.parametrize("cut", range(24))
def test_merging_two_parts_equals_one_pass(documents: np.ndarray, cut: int) -> None:
    left, right = whole(documents[:cut]), whole(documents[cut:])
    left.merge(right)
    assert_same(left, whole(documents))


@pytest.mark.parametrize("seed", range(10))
def test_merging_in_any_grouping_equals_one_pass_to_1e_12(seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.normal(3.0, 2.0, size=(40, 5))
    x[random.random(x.shape) < 0.3] = np.nan
    parts = [whole(part) for part in np.array_split(random.permutation(x), random.integers(2, 30))]
    while len(parts) > 1:
        taken = parts.pop(random.integers(len(parts)))
        parts[random.integers(len(parts))].merge(taken)
    np.testing.assert_array_equal(parts[0].count, (~np.isnan(x)).sum(axis=0))
    np.testing.assert_allclose(parts[0].mean, np.nanmean(x, axis=0), rtol=1e-12)
    np.testing.assert_allclose(parts[0].variance, np.nanvar(x, axis=0, ddof=1), rtol=1e-12)


def test_merging_an_empty_part_changes_no_bit(documents: np.ndarray) -> None:
    moments = whole(documents)
    moments.merge(Moments((3, 2)))
    for name, array in moments.state().items():
        np.testing.assert_array_equal(array, whole(documents).state()[name])


def test_a_resumed_pass_equals_an_undisturbed_one_to_the_last_bit(documents: np.ndarray) -> None:
    undisturbed, before = Moments((3, 2)), Moments((3, 2))
    for x in documents:
        undisturbed.update(x)
    for x in documents[:11]:
        before.update(x)
    after = Moments.from_state({name: array.copy() for name, array in before.state().items()})
    for x in documents[11:]:
        after.update(x)
    for name, array in undisturbed.state().items():
        np.testing.assert_array_equal(after.state()[name], array)


def test_a_saved_state_does_not_follow_later_documents(documents: np.ndarray) -> None:
    moments = whole(documents[:5])
    saved = moments.state()
    count = saved["count"].copy()
    moments.update_many(documents[5:])
    np.testing.assert_array_equal(saved["count"], count)


def test_values_that_never_vary_have_no_variance() -> None:
    moments = Moments((1,))
    for _ in range(1000):
        moments.update(np.array([0.1]))
    assert moments.variance[0] == 0.0


def test_an_infinite_value_is_not_dropped() -> None:
    moments = whole(np.array([[1.0, 1.0], [np.inf, 2.0]]))
    assert moments.count.tolist() == [2, 2]
    assert not np.isfinite(moments.mean[0])
    assert moments.mean[1] == 1.5


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) cannot take arrays of shape \(4,\)"):
        Moments((3,)).update(np.zeros(4))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Moments((3,)).merge(Moments((2,)))


NAMES = [f"doc-{i}" for i in range(23)]


def test_replicate_means_are_means_weighted_by_the_documents_own_weights(documents: np.ndarray) -> None:
    resampled = Resampled((3, 2), replicates=40, seed=9)
    resampled.update_many(NAMES, documents)
    found = resampled.replicates_mean()
    weights = {name: poisson_weights(9, name, 40) for name in NAMES}
    for b in range(40):
        for index in np.ndindex(3, 2):
            pairs = [(weights[name][b], x[index]) for name, x in zip(NAMES, documents, strict=True) if x[index] == x[index]]
            total = sum(w for w, _ in pairs)
            if total == 0:
                assert np.isnan(found[(b, *index)])
            else:
                assert found[(b, *index)] == pytest.approx(sum(w * x for w, x in pairs) / total, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_replicate_means_do_not_depend_on_order_or_grouping(documents: np.ndarray, seed: int) -> None:
    random = np.random.default_rng(seed)
    one = Resampled((3, 2), replicates=30, seed=1)
    one.update_many(NAMES, documents)
    order = random.permutation(23)
    parts = []
    for part in np.array_split(order, 6):
        resampled = Resampled((3, 2), replicates=30, seed=1)
        for i in part:
            resampled.update(NAMES[i], documents[i])
        parts.append(resampled)
    for other in parts[1:]:
        parts[0].merge(other)
    np.testing.assert_allclose(parts[0].replicates_mean(), one.replicates_mean(), rtol=1e-12)


def test_the_spread_of_replicate_means_is_the_standard_error() -> None:
    x = np.random.default_rng(0).normal(size=(2000, 1))
    resampled = Resampled((1,), replicates=2000)
    resampled.update_many([str(i) for i in range(2000)], x)
    expected = x.std(ddof=1) / 2000**0.5
    # the standard deviation of 2,000 replicates is itself known to 1.6 %
    assert resampled.replicates_mean().std(ddof=1) == pytest.approx(expected, rel=0.06)
    assert resampled.replicates_mean().mean() == pytest.approx(x.mean(), abs=4 * expected / 2000**0.5)


def test_a_resumed_resampling_continues_to_the_last_bit(documents: np.ndarray) -> None:
    undisturbed, before = (Resampled((3, 2), replicates=20, seed=4) for _ in range(2))
    undisturbed.update_many(NAMES[:9], documents[:9])
    undisturbed.update_many(NAMES[9:], documents[9:])
    before.update_many(NAMES[:9], documents[:9])
    after = Resampled.from_state(before.state())
    after.update_many(NAMES[9:], documents[9:])
    np.testing.assert_array_equal(after.replicates_mean(), undisturbed.replicates_mean())
    assert (after.seed, after.replicates, after.shape) == (4, 20, (3, 2))


def test_two_quantities_of_one_seed_resample_the_same_documents(documents: np.ndarray) -> None:
    a, b = (Resampled((3, 2), replicates=50, seed=2) for _ in range(2))
    a.update_many(NAMES, documents)
    b.update_many(NAMES, 2 * documents)
    np.testing.assert_allclose(b.replicates_mean(), 2 * a.replicates_mean(), rtol=1e-14)


def test_replicates_of_different_seeds_are_not_summed() -> None:
    with pytest.raises(ValueError, match="seed 1, this with 0"):
        Resampled((2,), seed=0).merge(Resampled((2,), seed=1))


def test_every_array_needs_its_document_id() -> None:
    with pytest.raises(ValueError, match="1 document ids for 2 arrays"):
        Resampled((2,)).update_many(["a"], np.zeros((2, 2)))
