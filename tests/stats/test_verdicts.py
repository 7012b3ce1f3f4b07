"""Verdicts by size: what they say of known means, and how often they are wrong at the boundary."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from mechscope.stats.skewness import ThirdMoments
from mechscope.stats.verdicts import FEWEST, changed_p, negligible_p, verdicts

DELTA = 1.0
MANY = 20_000


def of(values: np.ndarray) -> ThirdMoments:
    moments = ThirdMoments(values.shape[1:])
    moments.update_many(values)
    return moments


def spread(means: list[float], n: int = 20, se: float = 0.01) -> ThirdMoments:
    """Return symmetric values with given means and a standard error."""
    pattern = np.linspace(-1, 1, n)
    pattern *= se * np.sqrt(n) / pattern.std(ddof=1)
    return of(np.asarray(means) + pattern[:, None])


def test_size_and_sureness_make_the_verdict() -> None:
    means = [1.5, -1.5, 0.2, -0.2, 1.001, 0.999, 0.0]
    expected = ["changed", "changed", "negligible", "negligible", "undecided", "undecided", "negligible"]
    assert verdicts(spread(means), DELTA, signed=True).tolist() == expected
    # so does a small one that surely is not zero: t = 20
    assert verdicts(spread([0.2]), DELTA, signed=True).tolist() == ["negligible"]
    assert verdicts(spread([0.2], se=1.0), DELTA, signed=True).tolist() == ["undecided"]


def test_without_skew_the_probabilities_are_students() -> None:
    moments = spread([1.02, -0.97], se=0.02)
    np.testing.assert_allclose(changed_p(moments, DELTA, signed=True), 2 * np.minimum(stats.t.sf([1.0, -1.5], 19), 0.5), rtol=1e-9)
    np.testing.assert_allclose(negligible_p(moments, DELTA, signed=True), 2 * np.minimum(stats.t.sf([-1.0, 1.5], 19), 0.5), rtol=1e-9)


def test_what_cannot_be_negative_has_one_side() -> None:
    # below zero by rounding only: a divergence is small there, a change of entropy may be large
    below = spread([-1.5])
    assert [verdicts(below, DELTA, signed=signed).tolist() for signed in (False, True)] == [["negligible"], ["changed"]]
    assert verdicts(of(np.full((12, 2), [0.0, 0.2])), DELTA, signed=False).tolist() == ["negligible", "negligible"]


def test_what_is_not_known_is_not_measured_and_few_documents_decide_nothing() -> None:
    assert verdicts(of(np.full((12, 1), np.nan)), DELTA, signed=False).tolist() == ["not measured"]
    assert verdicts(spread([5.0]), float("nan"), signed=True).tolist() == ["not measured"]
    assert verdicts(spread([5.0, 0.0], n=FEWEST - 1), DELTA, signed=True).tolist() == ["undecided", "undecided"]
    assert verdicts(spread([5.0, 0.0], n=FEWEST), DELTA, signed=True).tolist() == ["changed", "negligible"]


def test_equal_documents_and_infinite_changes_are_sure() -> None:
    assert verdicts(of(np.full((12, 4), [0.0, 0.5, 2.0, np.inf])), DELTA, signed=False).tolist() == [
        "negligible",
        "negligible",
        "changed",
        "changed",
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_many_parts_at_the_boundary_are_corrected_together(seed: int) -> None:
    random = np.random.default_rng(seed)
    wrong = [(verdicts(of(random.normal(DELTA, 0.3, (30, 100))), DELTA, signed=True) != "undecided").any() for _ in range(100)]
    # one per cent of a family's tests would be five wrong verdicts of 100 each time; together any at all is rare
    assert np.mean(wrong) <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / 100)


WORLDS: dict[str, tuple[Callable[[np.random.Generator, tuple[int, int]], np.ndarray], float]] = {
    "normal": (lambda random, shape: random.normal(1.0, 1.0, shape), 1.0),
    "heavy tails": (lambda random, shape: 1.0 + random.standard_t(3, shape), 1.0),
    "exponential": (lambda random, shape: random.exponential(1.0, shape), 1.0),
    "log-normal": (lambda random, shape: random.lognormal(0.0, 0.5, shape), float(np.exp(0.125))),
    "skewed to the left": (lambda random, shape: 3.0 - random.lognormal(0.0, 0.5, shape), float(3 - np.exp(0.125))),
}


@pytest.mark.parametrize("n", [FEWEST, 16, 32, 100])
@pytest.mark.parametrize("world", WORLDS)
def test_at_the_boundary_neither_verdict_is_given_oftener_than_claimed(world: str, n: int) -> None:
    draw, mean = WORLDS[world]
    moments = of(draw(np.random.default_rng(n), (n, MANY)))
    for p in (changed_p, negligible_p):
        rate = float((p(moments, mean, signed=True) < 0.05).mean())
        assert rate <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / MANY), (p.__name__, rate)


def skewed_heads(random: np.random.Generator, n: int, spread: float) -> np.ndarray:
    """Return values of 48 heads over documents that are long or short for all heads alike, log-normal with mean 1."""
    z = 0.6 * random.normal(size=(n, 1)) + 0.8 * random.normal(size=(n, 48))
    return np.exp(spread * z - spread**2 / 2)


@pytest.mark.parametrize("n", [FEWEST, 32])
@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_of_many_skewed_parts_at_the_boundary_hardly_ever_is_any_judged(n: int, spread: float) -> None:
    # by each part's own skewness some head is called negligible in 12 to 40 % with a spread of 1, in 5 to 18 % with .5
    random, draws = np.random.default_rng(n), 150
    wrong = {"negligible": 0, "changed to the left": 0, "far apart": 0}
    for _ in range(draws):
        values = skewed_heads(random, n, spread)
        wrong["negligible"] += (verdicts(of(values), DELTA, signed=False) != "undecided").any()
        # a quantity with a sign may be skewed to the left, and spread more than its mean
        wrong["changed to the left"] += (verdicts(of(2 - values), DELTA, signed=True) != "undecided").any()
        wrong["far apart"] += (verdicts(of(3 * values - 2), DELTA, signed=True) != "undecided").any()
    assert max(wrong.values()) / draws <= 0.05 + 2.6 * (0.05 * 0.95 / draws) ** 0.5, wrong


@pytest.mark.parametrize("n", [FEWEST, 16, 32, 100])
def test_one_skewed_part_among_symmetric_ones_is_rarely_misjudged(n: int) -> None:
    # by its own skewness as it is in 4 to 7.5 %
    own = np.exp(np.random.default_rng(n).normal(size=(n, MANY)) - 0.5)
    company = np.tile(np.linspace(0.9, 1.1, n)[:, None], (1, MANY + 1))
    for p, values in ((negligible_p, own), (changed_p, 2 - own)):
        rate = float((p(of(np.concatenate([values, company], axis=1)), DELTA, signed=True)[:MANY] < 0.05).mean())
        assert rate <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / MANY), (p.__name__, rate)


def test_students_t_alone_would_not_hold() -> None:
    drawn = np.random.default_rng(0).exponential(1.0, (8, MANY))
    t = (drawn.mean(0) - 1) / (drawn.std(0, ddof=1) / np.sqrt(8))
    assert (stats.t.cdf(t, 7) < 0.05).mean() > 0.12


def test_effects_of_twice_and_of_a_third_of_the_smallest_are_found() -> None:
    random = np.random.default_rng(3)
    found = verdicts(of(random.lognormal(np.log(2.0), 0.4, (32, 200))), DELTA, signed=False)
    assert (found == "changed").mean() > 0.95
    found = verdicts(of(random.lognormal(np.log(0.3), 0.4, (32, 200))), DELTA, signed=False)
    assert (found == "negligible").mean() > 0.95
