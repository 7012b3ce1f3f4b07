"""Percentile bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest

from mechscope.stats import bootstrap
from mechscope.stats.bootstrap import bootstrap_interval, bootstrap_two_level


def test_the_interval_of_a_mean_approaches_the_normal_one() -> None:
    x = np.random.default_rng(0).exponential(size=400)
    result = bootstrap_interval(x, n=4000)
    error = x.std(ddof=1) / 20
    assert result.value == x.mean()
    assert result.low == pytest.approx(x.mean() - 1.96 * error, abs=0.2 * error)
    assert result.high == pytest.approx(x.mean() + 1.96 * error, abs=0.2 * error)


def test_two_documents_resample_to_a_known_distribution() -> None:
    # means 0, ½, 1 with shares ¼, ½, ¼: the 2.5 % point is 0, the 40 % point ½
    result = bootstrap_interval(np.array([0.0, 1.0]), n=4000)
    assert (result.low, result.high) == (0.0, 1.0)
    narrow = bootstrap_interval(np.array([0.0, 1.0]), n=4000, level=0.2)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_the_interval_does_not_depend_on_how_resamples_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3))
    at_once = bootstrap_interval(x, np.median, n=300)
    monkeypatch.setattr(bootstrap, "_CHUNK", 1000)
    in_pieces = bootstrap_interval(x, np.median, n=300)
    np.testing.assert_array_equal(at_once.low, in_pieces.low)
    np.testing.assert_array_equal(at_once.high, in_pieces.high)


def test_columns_are_resampled_by_the_same_documents() -> None:
    x = np.random.default_rng(0).normal(size=30)
    both = bootstrap_interval(np.stack([x, 2 * x], axis=1))
    np.testing.assert_allclose(both.low[1], 2 * both.low[0], rtol=1e-12)


def test_a_seed_repeats_and_another_differs() -> None:
    x = np.random.default_rng(0).normal(size=30)
    assert bootstrap_interval(x, seed=1) == bootstrap_interval(x, seed=1)
    assert bootstrap_interval(x, seed=1).low != bootstrap_interval(x, seed=2).low


def test_one_document_has_a_value_and_no_interval() -> None:
    result = bootstrap_interval(np.array([3.0]))
    assert result.value == 3.0
    assert np.isnan([result.low, result.high]).all()
    assert np.isnan(bootstrap_interval(np.array([])).value)


def two_level_loop(values: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Resample seeds and documents by explicit loops."""
    random = np.random.default_rng(seed)
    means = []
    for _ in range(n):
        rows: np.ndarray = random.integers(len(values), size=len(values))
        columns: np.ndarray = random.integers(values.shape[1], size=(values.shape[1],))
        means.append(np.mean([[values[r, c] for c in columns] for r in rows]))
    return np.quantile(means, [0.025, 0.975])


@pytest.mark.parametrize(("between_seeds", "between_documents", "noise"), [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.3, 0.5, 1.0)])
def test_seeds_and_documents_are_both_resampled(between_seeds: float, between_documents: float, noise: float) -> None:
    random = np.random.default_rng(5)
    values = (
        between_seeds * random.normal(size=(4, 1)) + between_documents * random.normal(size=(1, 25)) + noise * random.normal(size=(4, 25))
    )
    result = bootstrap_two_level(values, n=6000)
    low, high = two_level_loop(values, 3000, seed=1)
    assert result.value == pytest.approx(values.mean())
    assert result.low == pytest.approx(low, abs=0.06 * (high - low))
    assert result.high == pytest.approx(high, abs=0.06 * (high - low))


def test_many_seeds_do_not_hide_that_documents_are_few() -> None:
    # every seed scored the same ten documents alike: fifty seeds know no more about documents than one
    documents = np.random.default_rng(0).normal(size=10)
    many, one = bootstrap_two_level(np.tile(documents, (50, 1)), n=4000), bootstrap_two_level(documents[None], n=4000)
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.08)


def test_missing_scores_are_left_out() -> None:
    values = np.array([[1.0, np.nan, 3.0], [2.0, 4.0, np.nan]])
    result = bootstrap_two_level(values)
    assert result.value == 2.5
    assert 1.0 <= result.low < 2.5 < result.high <= 4.0


def test_two_levels_in_pieces_are_still_two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(3, 40))
    at_once = bootstrap_two_level(values, n=3000)
    monkeypatch.setattr(bootstrap, "_CHUNK", 4000)
    in_pieces = bootstrap_two_level(values, n=3000)
    assert in_pieces.low == pytest.approx(at_once.low, abs=0.05)
    with pytest.raises(ValueError, match="seeds, documents"):
        bootstrap_two_level(values[0])
