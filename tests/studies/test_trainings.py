"""Groups of trainings compared: the intervals are scipy's on the probit scale, and they err as seldom as they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mechscope.studies.calibration.trainings import TRUTHS, World, verdict_of
from mechscope.studies.paper_2505_17073.trainings import beyond, compare

TUNED, CONTROLS = np.array([0.62, 0.7, 0.8]), np.array([0.5, 0.42, 0.55, 0.47, 0.51])


@pytest.mark.parametrize(
    ("tuned", "controls"), [(TUNED, CONTROLS), (CONTROLS, TUNED), (TUNED, CONTROLS[:3]), (np.array([0.1, 0.5, 0.9]), CONTROLS)]
)
def test_two_groups_have_the_wider_of_scipys_intervals(tuned: np.ndarray, controls: np.ndarray) -> None:
    ours, theirs = stats.norm.ppf(tuned), stats.norm.ppf(controls)
    bounds = [stats.ttest_ind(ours, theirs, equal_var=equal).confidence_interval(0.98) for equal in (True, False)]
    wider = max(bounds, key=lambda each: float(each.high - each.low))
    ends = stats.norm.cdf(theirs.mean() + np.array([wider.low, wider.high])) - stats.norm.cdf(theirs.mean())
    found = compare(tuned, controls)
    assert (found.low, found.high) == pytest.approx(tuple(ends))
    assert found.difference == pytest.approx(stats.norm.cdf(ours.mean()) - stats.norm.cdf(theirs.mean()))


def test_a_draw_from_the_same_null_lies_inside_the_prediction_interval_as_often_as_is_said() -> None:
    random = np.random.default_rng(0)
    shares = stats.norm.cdf(0.3 + 0.8 * random.standard_normal((3000, 9)))
    outside = [found.low > 0 or found.high < 0 for found in (beyond(row[0], row[1:]) for row in shares)]
    assert np.mean(outside) == pytest.approx(0.02, abs=0.008)


@pytest.mark.parametrize("odds", [0.75, 0.88])
def test_draws_in_two_clusters_are_not_told_apart_oftener(odds: float) -> None:
    # of five draws, by the interval of Student's t with 2 % on each side, 6.5 and 8.2 %
    random, draws = np.random.default_rng(1), 2500
    shares = stats.norm.cdf(np.where(random.random((draws, 9)) < odds, 1.2, -1.2) + 0.15 * random.standard_normal((draws, 9)))
    outside = [found.low > 0 or found.high < 0 for found in (beyond(row[0], row[1:]) for row in shares)]
    assert np.mean(outside) <= 0.05 + 2.6 * (0.05 * 0.95 / draws) ** 0.5


def test_no_draw_lies_outside_the_prediction_interval() -> None:
    draws = np.array([0.5] * 19 + [0.9])
    assert beyond(0.9, draws).low <= 0
    assert beyond(0.95, draws).low > 0


@pytest.mark.parametrize(("tuned", "controls"), [(3, 8), (5, 5)])
@pytest.mark.parametrize("wide", [2.0, 10.0])
def test_groups_of_equal_mean_of_which_one_varies_ten_times_as_much_are_told_apart_in_one_of_twenty(
    tuned: int, controls: int, wide: float
) -> None:
    # up to 19 % where shares at none and all are taken as they are, and 2 % stand on each side
    random, draws = np.random.default_rng(2), 800
    common = np.repeat([wide, wide / 10], [tuned, controls])
    wrong = 0
    for _ in range(draws):
        heads = 0.5 * random.standard_normal(48) + (common * random.standard_normal(tuned + controls))[:, None]
        shares = (heads + random.standard_normal((tuned + controls, 48)) < 0).mean(1)
        found = compare(shares[:tuned], shares[tuned:], grain=1 / 48)
        wrong += found.low > 0 or found.high < 0
    assert wrong / draws <= 0.05 + 2.6 * (0.05 * 0.95 / draws) ** 0.5


def test_few_trainings_at_an_end_have_no_spread_that_could_be_seen() -> None:
    for at_an_end in (np.ones(5), np.zeros(3), np.array([1.0, 1.0, 1 - 1 / 48])):
        assert np.isnan(compare(at_an_end, CONTROLS, grain=1 / 48).low)
        assert np.isnan(compare(CONTROLS, at_an_end, grain=1 / 48).low)
    assert compare(np.ones(6), CONTROLS, grain=1 / 48).low > 0
    assert compare(np.array([1.0, 0.97, 0.94]), CONTROLS, grain=1 / 48).low > 0


def test_too_few_trainings_or_draws_are_not_compared() -> None:
    for found in (compare(TUNED[:2], CONTROLS), compare(TUNED, CONTROLS[:2]), beyond(0.9, np.append(CONTROLS, [0.45, 0.52]))):
        assert np.isnan([found.difference, found.low, found.high]).all()


def test_equal_shares_hide_half_a_step() -> None:
    # 7 of 10 heads in every tuned training, 6 of 10 in every control: no spread is seen, and one head is no evidence
    one_head = compare(np.full(3, 0.7), np.full(3, 0.6), grain=0.1)
    assert one_head.low < 0 < one_head.high
    many_heads = compare(np.full(3, 0.8), np.full(3, 0.2), grain=0.1)
    assert many_heads.low > 0


@pytest.mark.parametrize("claim", ["heads_focused_all", "heads_focused_selected", "change_concentrated"])
@pytest.mark.parametrize(
    "world",
    [World(), World(swapped=True), World(tuned=1, controls=8, common=3.0), World(tuned=2, controls=8)],
    ids=["alone", "swapped", "1v8", "2v8"],
)
def test_one_or_two_trainings_never_decide(claim: str, world: World) -> None:
    assert {verdict_of(claim, world, seed) for seed in range(25)} == {"undecided"}


def test_exchangeable_trainings_are_told_apart_in_at_most_one_of_twenty() -> None:
    random = np.random.default_rng(1)
    for common in (0.3, 1.0, 3.0):
        for tuned, controls in ((3, 3), (3, 8), (5, 5)):
            wrong = 0
            for _ in range(800):
                heads = 0.5 * random.standard_normal(48) + common * random.standard_normal((tuned + controls, 1))
                shares = (heads + random.standard_normal((tuned + controls, 48)) < 0).mean(1)
                found = compare(shares[:tuned], shares[tuned:], grain=1 / 48)
                wrong += found.low > 0 or found.high < 0
            # .05 and two and a half binomial errors
            assert wrong / 800 <= 0.05 + 2.5 * 0.0077, (common, tuned, controls)


def test_a_planted_effect_is_found() -> None:
    found = [verdict_of("heads_focused_all", World(tuned=5, controls=5, effect=2.0, common=0.5), seed) for seed in range(20)]
    assert found.count("supported") >= 15
    assert "contradicted" not in found


def test_the_suite_of_known_truths_holds_every_claim_of_attention() -> None:
    judged = {truth.claim for truth in TRUTHS if truth.kind == "null"}
    assert {"heads_focused_all", "heads_focused_selected", "change_concentrated", "most_changed_layers"} <= judged
    assert {"heads_focused_all.noise", "change_concentrated.noise"} <= judged
    assert len({(truth.claim, truth.world, truth.size) for truth in TRUTHS}) == len(TRUTHS)


def test_shares_that_do_not_vary_or_are_cut_off_are_not_compared() -> None:
    assert np.isnan(beyond(0.5, np.full(8, 0.5 + 1e-12)).low)
    assert np.isnan(compare(np.full(3, 0.9995), np.full(3, 0.99995)).low)
    assert np.isnan(compare(np.array([0.5, 0.6, np.nan]), np.array([0.1, 0.2, 0.15])).low)
    # of heads that can be counted a step is hidden
    assert beyond(0.5, np.full(8, 0.25), grain=0.25).low < 0.25
