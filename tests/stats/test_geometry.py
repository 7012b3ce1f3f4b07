"""CKA, RSA and the sample of documents they are computed from."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import pytest
from scipy.stats import spearmanr

from mechscope.stats.chance import stable_hash
from mechscope.stats.geometry import BottomK, cka, rsa


def vectors(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def rotation(d: int, seed: int) -> np.ndarray:
    return np.linalg.qr(vectors(d, d, seed))[0]


def hsic_by_quadruples(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased HSIC as the mean of Song et al.'s kernel over all ordered quadruples of distinct documents."""
    k, l = x @ x.T, y @ y.T  # noqa: E741  (K and L are the paper's names)
    n = len(x)
    total = 0.0
    for i, j, q, r in itertools.permutations(range(n), 4):
        total += k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


@pytest.mark.parametrize(("d1", "d2"), [(2, 3), (40, 3), (2, 50), (40, 50)])
def test_cka_equals_the_mean_over_quadruples_of_documents(d1: int, d2: int) -> None:
    x, y = vectors(8, d1, 0) + 3.0, vectors(8, d2, 1) - 1.0
    y[:, 0] += x[:, 0]
    expected = hsic_by_quadruples(x, y) / np.sqrt(hsic_by_quadruples(x, x) * hsic_by_quadruples(y, y))
    assert cka(x, y) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("d", [3, 60])
def test_a_model_is_as_similar_to_itself_as_can_be(d: int) -> None:
    x = vectors(20, d, 0)
    assert cka(x, x) == pytest.approx(1.0, abs=1e-12)
    assert rsa(x, x) == pytest.approx(1.0, abs=1e-12)
    assert rsa(x, x, distance="euclidean") == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("d", [5, 60])
def test_cka_ignores_rotation_scale_and_shift(d: int) -> None:
    x, y = vectors(20, d, 0), vectors(20, 7, 1)
    y[:, :3] += x[:, :3]
    moved = 1e-3 * x @ rotation(d, 2) + vectors(1, d, 3)
    assert cka(x, moved) == pytest.approx(1.0, abs=1e-9)
    assert cka(moved, y) == pytest.approx(cka(x, y), abs=1e-9)


def test_cka_does_not_ignore_a_stretch_along_one_direction() -> None:
    x = vectors(50, 10, 0)
    assert cka(x, x * np.array([10.0] + [1.0] * 9)) < 0.6


def test_cka_of_independent_vectors_is_zero_on_average_even_with_more_dimensions_than_documents() -> None:
    values = [cka(vectors(12, 200, seed), vectors(12, 200, seed + 1000)) for seed in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    # the biased estimator is far from zero on the same data
    x, y = vectors(12, 200, 0), vectors(12, 200, 1000)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    biased = np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert biased > 0.8


def test_cka_is_symmetric() -> None:
    x, y = vectors(15, 4, 0), vectors(15, 30, 1)
    assert cka(x, y) == pytest.approx(cka(y, x), abs=1e-12)


def test_cka_survives_the_huge_and_the_tiny() -> None:
    x, y = vectors(15, 4, 0), vectors(15, 4, 1)
    assert cka(x * 1e120, y * 1e-120) == pytest.approx(cka(x, y), abs=1e-9)


def test_too_few_or_equal_documents_have_no_geometry() -> None:
    assert np.isnan(cka(vectors(3, 5, 0), vectors(3, 5, 1)))
    assert np.isnan(rsa(vectors(3, 5, 0), vectors(3, 5, 1)))
    constant = np.full((10, 5), 0.1)
    assert np.isnan(cka(constant, vectors(10, 5, 1)))
    assert np.isnan(rsa(constant, vectors(10, 5, 1)))
    assert np.isfinite(cka(vectors(4, 5, 0), vectors(4, 5, 1)))


def test_documents_without_a_vector_are_left_out_of_both() -> None:
    x, y = vectors(20, 5, 0), vectors(20, 5, 1)
    with_gap = x.copy()
    with_gap[7] = np.nan
    kept = np.arange(20) != 7
    assert cka(with_gap, y) == pytest.approx(cka(x[kept], y[kept]), abs=1e-12)
    assert rsa(with_gap, y) == pytest.approx(rsa(x[kept], y[kept]), abs=1e-12)


def test_vectors_must_be_of_the_same_documents() -> None:
    with pytest.raises(ValueError, match="same documents"):
        cka(vectors(5, 3, 0), vectors(6, 3, 0))


@pytest.mark.parametrize("distance", ["correlation", "euclidean"])
def test_rsa_equals_spearman_over_a_loop_of_pairs(distance: Literal["correlation", "euclidean"]) -> None:
    x, y = vectors(9, 6, 0), vectors(9, 4, 1)
    y[:, :2] += 2 * x[:, :2]

    def between(a: np.ndarray, b: np.ndarray) -> float:
        return 1 - np.corrcoef(a, b)[0, 1] if distance == "correlation" else float(np.sqrt(((a - b) ** 2).sum()))

    pairs = list(itertools.combinations(range(9), 2))
    expected = spearmanr([between(x[i], x[j]) for i, j in pairs], [between(y[i], y[j]) for i, j in pairs]).statistic
    assert rsa(x, y, distance=distance) == pytest.approx(expected, abs=1e-12)


def test_correlation_distance_ignores_each_documents_length_and_euclidean_does_not() -> None:
    x = vectors(20, 6, 0)
    longer = x * np.random.default_rng(1).uniform(0.2, 5.0, size=(20, 1))
    assert rsa(x, longer) == pytest.approx(1.0, abs=1e-9)
    assert rsa(x, longer, distance="euclidean") < 0.9


NAMES = [f"doc-{i}" for i in range(60)]


def filled(k: int, order: list[int], seed: int = 0) -> BottomK:
    sample = BottomK(k, seed)
    for i in order:
        sample.update(NAMES[i], np.array([float(i), -float(i)]))
    return sample


def test_the_sample_is_the_documents_with_the_smallest_hashes() -> None:
    expected = sorted(range(60), key=lambda i: stable_hash(0, NAMES[i]))[:10]
    assert filled(10, list(range(60))).arrays()[:, 0].tolist() == expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 10, 60, 100])
def test_which_documents_a_sample_ends_up_with_is_known_beforehand(k: int, seed: int) -> None:
    chosen = BottomK.chosen((NAMES[i] for i in [*range(60), *range(20)]), k, seed)
    assert {NAMES[int(i)] for i in filled(k, list(range(60)), seed).arrays()[:, 0]} == chosen


@pytest.mark.parametrize("seed", range(5))
def test_the_sample_does_not_depend_on_order_grouping_or_repetition(seed: int) -> None:
    order = np.random.default_rng(seed).permutation(60).tolist()
    left, right = filled(10, order[:35] + order[:4]), filled(10, order[20:])
    left.merge(right)
    np.testing.assert_array_equal(left.arrays(), filled(10, list(range(60))).arrays())


def test_the_sample_never_holds_more_than_k() -> None:
    assert len(filled(10, list(range(60)))) == 10
    assert len(filled(10, list(range(7)))) == 7


def test_a_larger_sample_begins_with_the_smaller() -> None:
    np.testing.assert_array_equal(filled(20, list(range(60))).arrays()[:10], filled(10, list(range(60))).arrays())


def test_a_part_of_every_array_can_be_had_without_the_rest() -> None:
    sample = filled(10, list(range(60)))
    np.testing.assert_array_equal(sample.arrays((0,)), sample.arrays()[:, 0])


def test_every_document_is_as_likely_to_be_sampled() -> None:
    counts = np.zeros(60)
    for seed in range(600):
        counts[filled(6, list(range(60)), seed).arrays()[:, 0].astype(int)] += 1
    # expected 60 each with a standard deviation of 7.3
    assert counts.min() > 30
    assert counts.max() < 90


def test_a_resumed_sample_equals_an_undisturbed_one_and_keeps_its_dtype() -> None:
    before = BottomK(10, seed=3)
    for i in range(30):
        before.update(NAMES[i], np.array([float(i)], dtype=np.float32))
    after = BottomK.from_state(before.state())
    for sample in (before, after):
        for i in range(30, 60):
            sample.update(NAMES[i], np.array([float(i)], dtype=np.float32))
    np.testing.assert_array_equal(after.arrays(), before.arrays())
    assert after.arrays().dtype == np.float32
    assert len(BottomK.from_state(BottomK(4).state())) == 0


def test_a_sampled_array_does_not_follow_the_buffer_it_came_from() -> None:
    sample, buffer = BottomK(2), np.array([1.0])
    sample.update("a", buffer)
    buffer[0] = 9.0
    assert sample.arrays()[0, 0] == 1.0


def test_samples_of_different_settings_or_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="k=3, seed=0 cannot be merged into one with k=2, seed=0"):
        BottomK(2).merge(BottomK(3))
    with pytest.raises(ValueError, match="keep at least 1"):
        BottomK(0)
    sample = BottomK(2)
    sample.update("a", np.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        sample.update("b", np.zeros(4))
