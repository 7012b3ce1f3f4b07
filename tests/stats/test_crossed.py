"""Means over trainings and documents: right under nulls in which trainings, documents, both or neither make the difference."""

from __future__ import annotations

import numpy as np
import pytest

from mechscope.stats.crossed import MIN_DOCUMENTS, crossed_mean, trainings_for


def differences(
    random: np.random.Generator, trainings: int, documents: int, *, between: float, documentwise: float, rest: float
) -> np.ndarray:
    of_trainings, of_documents = between * random.normal(size=(trainings, 1)), documentwise * random.standard_t(4, size=(1, documents))
    return of_trainings + of_documents + rest * random.normal(size=(trainings, documents))


@pytest.mark.parametrize("trainings", [3, 5, 12])
@pytest.mark.parametrize(
    ("between", "documentwise"),
    [(0.01, 0.0), (0.0, 0.0), (0.001, 0.1), (0.01, 0.1), (0.05, 0.08)],
    ids=["trainings", "neither", "documents", "both", "mostly trainings"],
)
def test_no_difference_is_taken_for_one_in_a_twentieth_of_bake_offs(trainings: int, between: float, documentwise: float) -> None:
    # a two-level percentile bootstrap does so in 27 % at three trainings of exchangeable arms, Satterthwaite's degrees of freedom in 8 % of `mostly trainings`
    random, draws = np.random.default_rng(0), 1500
    found = [
        crossed_mean(differences(random, trainings, MIN_DOCUMENTS, between=between, documentwise=documentwise, rest=0.1))
        for _ in range(draws)
    ]
    wrong = np.mean([one.low > 0 or one.high < 0 for one in found])
    assert 0.02 < wrong < 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


EFFECTS = {
    "exponential": lambda random, shape: random.exponential(size=shape) - 1,
    "log-normal": lambda random, shape: (random.lognormal(0.0, 1.0, shape) - np.exp(0.5)) / 2.16,
    "heavy tails": lambda random, shape: random.standard_t(3, shape) / 3**0.5,
    "on one document in ten": lambda random, shape: ((random.random(shape) < 0.1) - 0.1) / 0.3,
    "on one document in twenty": lambda random, shape: ((random.random(shape) < 0.05) - 0.05) / 0.218,
    "exponential on one document in ten": lambda random, shape: random.exponential(size=shape) * (random.random(shape) < 0.1) - 0.1,
}


@pytest.mark.parametrize("trainings", [3, 12])
@pytest.mark.parametrize("effects", EFFECTS)
def test_placements_that_suit_few_documents_very_well_are_not_better(effects: str, trainings: int) -> None:
    # over 20 documents a sample without the rare ones shows no skewness: 12 to 36 % of those on few documents were said to be better
    random, draws, documents = np.random.default_rng(3), 600, MIN_DOCUMENTS
    wrong = 0
    for _ in range(draws):
        values = EFFECTS[effects](random, (1, documents)) + 0.1 * random.normal(size=(trainings, documents))
        found = crossed_mean(values + 0.02 * random.normal(size=(trainings, 1)))
        wrong += found.low > 0 or found.high < 0
    assert wrong / draws <= 0.05 + 2.6 * (0.05 * 0.95 / draws) ** 0.5


def test_few_documents_say_nothing_of_others() -> None:
    drawn = np.random.default_rng(0).normal(size=(5, MIN_DOCUMENTS))
    assert np.isnan(crossed_mean(drawn[:, 1:]).low)
    assert not np.isnan(crossed_mean(drawn).low)


def test_where_documents_do_not_matter_it_is_the_t_interval_of_the_trainings() -> None:
    means = np.array([0.1, 0.4, 0.2, 0.3])
    found = crossed_mean(np.tile(means[:, None], (1, MIN_DOCUMENTS)))
    half = 3.1824463 * means.std(ddof=1) / 2
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25 - half, 0.25 + half), rel=1e-6)
    assert found.sd == pytest.approx(means.std(ddof=1))


def test_where_trainings_do_not_matter_it_is_the_t_interval_of_the_documents() -> None:
    documents = np.linspace(0.0, 0.4, 101)
    found = crossed_mean(np.tile(documents, (3, 1)))
    half = 1.9839715 * documents.std(ddof=1) / 101**0.5
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-6)


def test_skewed_documents_reach_farther_on_the_side_of_their_tail() -> None:
    documents = np.random.default_rng(1).exponential(size=(1, MIN_DOCUMENTS))
    found, mirrored = crossed_mean(np.tile(documents, (4, 1))), crossed_mean(np.tile(-documents, (4, 1)))
    assert found.high - found.value > 1.2 * (found.value - found.low)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_two_trainings_say_nothing_of_a_third() -> None:
    for trainings in (1, 2):
        found = crossed_mean(np.random.default_rng(0).normal(size=(trainings, MIN_DOCUMENTS)))
        assert np.isnan([found.low, found.high]).all()
        assert np.isnan(found.sd) == (trainings == 1)
        assert found.trainings == trainings
    same = crossed_mean(np.full((3, MIN_DOCUMENTS), 0.2))
    assert (same.low, same.high) == pytest.approx((0.2, 0.2))


def test_a_table_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="without gaps"):
        crossed_mean(np.array([[0.1, np.nan], [0.2, 0.3], [0.1, 0.2]]))


def test_so_many_trainings_give_so_narrow_an_interval() -> None:
    # t(.975, 4) · 1 / √5 = 1.24, t(.975, 5) / √6 = 1.05, t(.975, 6) / √7 = .925
    assert trainings_for(1.0, 1.0) == 7
    assert trainings_for(1.1, 1.0) == 6
    assert trainings_for(10.0, 1.0) == 3
    assert trainings_for(0.001, 1.0) is None
