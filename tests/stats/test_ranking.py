"""One score from several measures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mechscope.stats.ranking import LAYER_SCORE_COLUMNS, combined_score, layer_score


def test_the_score_is_the_mean_share_of_others_exceeded() -> None:
    # ranks: 0, ½, 1 by the first; 1, 0, ½ by the second, whose sign does not matter
    score = combined_score(np.array([[0.1, 0.2, 9.0], [-5.0, 1.0, 2.0]]))
    np.testing.assert_allclose(score, [0.5, 0.25, 0.75])


def test_units_do_not_matter() -> None:
    measures = np.random.default_rng(0).random((3, 10))
    np.testing.assert_allclose(combined_score(measures), combined_score(measures * np.array([[1e6], [1e-6], [1.0]])))


def test_a_measure_that_is_the_same_for_all_decides_nothing() -> None:
    measure = np.array([3.0, 1.0, 2.0])
    both = combined_score(np.stack([measure, np.full(3, 7.0)]))
    assert np.argsort(both).tolist() == [1, 2, 0]
    np.testing.assert_allclose(combined_score(np.zeros((2, 4))), 0.5)


def test_one_candidate_has_a_score() -> None:
    assert combined_score(np.array([[2.0], [3.0]])).tolist() == [0.5]


def test_replicates_are_ranked_each_on_its_own() -> None:
    measures = np.random.default_rng(0).random((2, 6, 5))
    measures[0, 3, 2] = np.nan
    found = combined_score(measures)
    for b in range(6):
        np.testing.assert_allclose(found[b], combined_score(measures[:, b]))
    assert np.isnan(found[3]).all()
    assert np.isfinite(np.delete(found, 3, axis=0)).all()


def test_the_layer_changed_most_by_every_measure_has_score_one() -> None:
    layers = pd.DataFrame({column: [0.1, 0.9, 0.3] for column in LAYER_SCORE_COLUMNS}, index=[7, 8, 9])
    layers["entropy_change"] *= -1
    score = layer_score(layers)
    assert score.to_dict() == pytest.approx({7: 0.0, 8: 1.0, 9: 0.5})
