"""Tables of roles: means, intervals and q against formulas by hand and scipy, and who is said to have a role."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from mechscope.errors import DataError
from mechscope.heads.roles import Role, RoleScores, role_changes, roles_table
from tests.stats.skewed import mean_test

ROLE = Role("looking", "How much it looks.", "a paper", "Nothing.", 0.3)
TEXTS = tuple(f"text {at}" for at in range(12))


def scores(seed: int = 0, mean: float = 0.6, null: float = 0.2, role: Role = ROLE, noise: float = 0.1) -> RoleScores:
    random = np.random.default_rng(seed)
    score, below = (centre + noise * random.standard_normal((12, 2, 3)) for centre in (mean, null))
    # turned heads' means over eight texts
    return RoleScores(role, TEXTS, score, below, noise * 0.5 * random.standard_normal((20, 2, 3)))


def test_score_and_excess_are_means_over_texts_with_their_intervals() -> None:
    given = scores()
    table = roles_table([given], model="base").set_index("component")
    assert list(table.index) == ["a0.h0", "a0.h1", "a0.h2", "a1.h0", "a1.h1", "a1.h2"]
    assert set(table["model"]) == {"base"}
    row = table.loc["a1.h2"]
    own, chance = given.score[:, 1, 2], given.null[:, 1, 2]
    assert (row["layer"], row["head"], row["n"]) == (1, 2, 12)
    assert row["score"] == pytest.approx(own.mean())
    assert [row["low"], row["high"]] == pytest.approx(mean_test(own)[:2])
    assert row["null"] == pytest.approx(chance.mean())
    assert row["excess"] == pytest.approx(own.mean() - chance.mean())
    assert [row["excess_low"], row["excess_high"]] == pytest.approx(mean_test(own - chance)[:2])


def test_q_counts_turned_heads_of_one_role_alone() -> None:
    """Two heads lie above all 60 turned ones: (1 + 0) / 21 / 2; the third above all but one: (1 + 1) / 21 / 3."""
    turned = np.linspace(0, 0.31, 60).reshape(20, 1, 3)
    score = np.tile([0.6, 0.5, 0.305], (12, 1, 1)) + np.linspace(-0.001, 0.001, 12)[:, None, None]
    role = replace(ROLE, least=0.1)
    one = RoleScores(role, TEXTS, score, np.zeros_like(score), turned)
    two = RoleScores(replace(role, name="other"), TEXTS, score, np.zeros_like(score), turned - 1)
    table = roles_table([one, two])
    np.testing.assert_allclose(table["q"], [1 / 42, 1 / 42, 2 / 63, 1 / 63, 1 / 63, 1 / 63], rtol=1e-12)
    # with three named, two turned heads may lie above
    np.testing.assert_allclose(table["threshold"], [turned.ravel()[-3]] * 3 + [0.1] * 3, rtol=1e-12)
    assert table["has_role"].all()


def test_without_turned_heads_no_head_is_given_a_role() -> None:
    table = roles_table([replace(scores(), turned=None)])
    assert table[["q", "threshold"]].isna().all(axis=None)
    assert not table["has_role"].any()


def test_a_text_that_is_silent_on_either_side_counts_for_nothing() -> None:
    given = scores()
    given.score[3, 0, 1] = given.null[5, 0, 1] = np.nan
    given.score[:, 1, 1] = np.nan
    kept = [at for at in range(12) if at not in (3, 5)]
    table = roles_table([given]).set_index("component")
    assert list(table["n"]) == [12, 10, 12, 12, 0, 12]
    assert table.loc["a0.h1", "score"] == pytest.approx(given.score[kept, 0, 1].mean())
    assert table.loc["a0.h1", "null"] == pytest.approx(given.null[kept, 0, 1].mean())
    silent = table.loc["a1.h1"]
    assert silent[["score", "null", "excess", "q"]].isna().all()
    assert not silent["has_role"]


@pytest.mark.parametrize(
    ("mean", "null", "least", "reached", "has"),
    [
        (0.6, 0.2, 0.3, 0.1, True),
        (0.45, 0.2, 0.3, 0.1, False),  # above what turned heads reach, but too little for the name
        (0.45, 0.2, 0.1, 0.1, True),  # a fixed threshold of the score would miss it
        (0.6, 0.2, 0.3, 0.5, False),  # turned heads reach more
        (0.6, 0.9, 0.1, 0.1, False),
        (0.6, 0.2, None, 0.1, False),  # measured, never ascribed
    ],
)
def test_a_head_has_a_role_above_what_turned_heads_reach(mean: float, null: float, least: float | None, reached: float, has: bool) -> None:
    given = scores(mean=mean, null=null, role=replace(ROLE, least=least), noise=0.02)
    table = roles_table([replace(given, turned=np.full((20, 2, 3), reached))])
    assert list(table["has_role"]) == [has] * 6
    expected = np.nan if least is None else max(least, reached)
    np.testing.assert_equal(table["threshold"].to_numpy(), [expected] * 6)


def test_one_text_is_no_evidence() -> None:
    given = scores()
    table = roles_table([replace(given, texts=TEXTS[:1], score=given.score[:1], null=given.null[:1])])
    assert table["score"].notna().all()
    assert table[["low", "high"]].isna().all(axis=None)
    assert not table["has_role"].any()


def test_false_roles_are_rare_where_heads_prefer_something_for_certain_but_no_more_than_turned_ones() -> None:
    """400 draws of 6 heads, each with a preference of its own in every text: tests over texts would call half of them in every draw."""
    false = []
    for seed in range(400):
        random = np.random.default_rng(seed)
        lasting = random.standard_normal((21, 2, 3))
        score = lasting[0] + 0.01 * random.standard_normal((12, 2, 3))
        table = roles_table([RoleScores(replace(ROLE, least=0.0), TEXTS, score, np.zeros_like(score), lasting[1:])])
        false.append(bool(table["has_role"].any()))
    assert 0 < np.mean(false) < 0.05 + 2 * (0.05 * 0.95 / 400) ** 0.5


def test_changes_are_paired_over_texts() -> None:
    base = scores()
    tuned = replace(base, score=base.score + np.linspace(0.05, 0.15, 12)[:, None, None])
    table = role_changes([base], [tuned]).set_index("component")
    for name in table.index:
        row = table.loc[name]
        assert row["change"] == pytest.approx(0.1)
        low, high, p = mean_test(np.linspace(0.05, 0.15, 12))
        assert (row["low"], row["high"], row["p"]) == pytest.approx((low, high, p))
        assert row["tuned"] - row["base"] == pytest.approx(row["change"])
    # unpaired, the noise of the texts would drown it
    unpaired = stats.ttest_ind(tuned.score[:, 0, 0], base.score[:, 0, 0])
    assert table["p"].iloc[0] < unpaired.pvalue / 10


def test_q_of_changes_is_over_the_heads_and_that_of_all_heads_over_the_roles() -> None:
    roles = [replace(ROLE, name=name) for name in ("one", "two", "three")]
    base, tuned = ([scores(seed + at, role=role) for at, role in enumerate(roles)] for seed in (0, 10))
    table = role_changes(base, tuned)
    heads, whole = table[table["component"] != "all"], table[table["component"] == "all"]
    for _, part in heads.groupby("role"):
        np.testing.assert_allclose(part["q"], stats.false_discovery_control(part["p"]))
    assert list(whole["role"]) == ["one", "two", "three"]
    np.testing.assert_allclose(whole["q"], stats.false_discovery_control(whole["p"]))


def test_the_row_of_all_heads_is_the_mean_over_heads_with_an_interval_over_texts() -> None:
    base, tuned = scores(0), scores(1)
    tuned.score[2, 0, 0] = np.nan
    base.score[7] = np.nan
    row = role_changes([base], [tuned]).set_index("component").loc["all"]
    change = tuned.score - base.score
    per_text = [np.nanmean(change[at]) for at in range(12) if at != 7]
    assert (row["layer"], row["head"], row["n"]) == (-1, -1, 11)
    assert row["change"] == pytest.approx(np.mean(per_text))
    assert [row["low"], row["high"]] == pytest.approx(mean_test(np.array(per_text))[:2])
    assert row["tuned"] - row["base"] == pytest.approx(row["change"])


def test_gained_and_lost_are_the_heads_that_have_the_role_on_one_side_alone() -> None:
    base, tuned = scores(0, noise=0.02), scores(1, noise=0.02)
    base.score[:, 0, 1] -= 0.3
    tuned.score[:, 1, 2] -= 0.3
    table = role_changes([base], [tuned]).set_index("component")
    assert list(table.index[table["gained"]]) == ["a0.h1"]
    assert list(table.index[table["lost"]]) == ["a1.h2"]


def test_a_head_at_the_threshold_gains_no_role_by_noise() -> None:
    base = scores(0, mean=0.5, noise=0.02)
    base.score[:] += 0.299 - base.excess.mean(0)
    tuned = replace(base, score=base.score + 0.002 + 0.01 * np.random.default_rng(1).standard_normal(base.score.shape))
    before, after = (roles_table([one])["has_role"] for one in (base, tuned))
    assert after.any()
    assert not before.any()
    assert not role_changes([base], [tuned])[["gained", "lost"]].any(axis=None)


def test_a_model_compared_with_itself_shows_no_change() -> None:
    table = role_changes([scores()], [scores()])
    assert (table["change"] == 0).all()
    assert (table["p"] == 1).all()
    assert not table[["gained", "lost"]].any(axis=None)


def test_nothing_gives_empty_tables_with_their_columns() -> None:
    assert list(roles_table([]).columns) == list(roles_table([scores()]).columns)
    assert list(role_changes([], []).columns) == list(role_changes([scores()], [scores()]).columns)


def test_what_does_not_fit_is_refused_by_name() -> None:
    given = scores()
    with pytest.raises(DataError, match=r"role 'looking': scores .* for 11 texts"):
        RoleScores(ROLE, TEXTS[:11], given.score, given.null)
    with pytest.raises(DataError, match=r"role 'looking': base has .* on the same texts"):
        role_changes([given], [RoleScores(ROLE, TEXTS[::-1], given.score, given.null)])
    with pytest.raises(DataError, match=r"base is scored for the roles \['looking'\], tuned for \['other'\]"):
        role_changes([given], [replace(given, role=replace(ROLE, name="other"))])
