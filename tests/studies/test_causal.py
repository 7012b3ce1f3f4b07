"""The study's interventions: layer sets, ablation controls, rank correlations, and the verdicts drawn from them."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from mechscope.causal import Effects
from mechscope.stats.inference import rank_p
from mechscope.studies.causal import importance_table, layer_sets, layer_sets_table
from mechscope.studies.paper_2505_17073.interventions import heads_matter, layers_carry
from mechscope.studies.paper_2505_17073.judgement import Scope
from mechscope.subject import Components
from tests.stats.fieller import by_inverting_t_tests


def test_every_other_set_of_layers_is_a_control_where_there_are_few() -> None:
    sets = layer_sets(Components.of_layers([1, 3]), 5, seed=0)
    assert str(sets[0]) == "layers:1,3"
    # none of the others has neighbours either
    assert {tuple(sorted(each.layers)) for each in sets} == {(0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4)}
    many = layer_sets(Components.of_layers([0, 1, 3]), 24, seed=0)
    assert len(many) == len({str(each) for each in many}) == 41
    assert all(len(each.layers) == 3 for each in many)


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (1, 2, 3, 5), (0, 2, 3, 6), (0, 1, 5, 6), (0, 2, 4, 6)])
def test_controls_have_as_many_neighbours_as_the_selected_layers(chosen: tuple[int, ...]) -> None:
    def neighbours(layers: tuple[int, ...]) -> int:
        return sum(two - one == 1 for one, two in pairwise(layers))

    sets = [tuple(sorted(each.layers)) for each in layer_sets(Components.of_layers(chosen), 7, seed=0)]
    assert sets[0] == chosen
    assert len(set(sets)) == len(sets)
    assert set(sets) == {each for each in combinations(range(7), 4) if neighbours(each) == neighbours(chosen)}
    drawn = layer_sets(Components.of_layers(chosen), 40, seed=1)
    assert {neighbours(tuple(sorted(each.layers))) for each in drawn} == {neighbours(chosen)}


def test_the_whole_model_has_no_controls() -> None:
    assert layer_sets(Components.of_layers(range(4)), 4, seed=0) == [Components.of_layers(range(4))]


def carried(gains: list[list[float]], whole: np.ndarray) -> tuple[Effects, np.ndarray]:
    """Return effects in which the sets gain so much loss per text, of a base loss of 5 and a tuned loss of 5 − whole."""
    base = np.full(len(whole), 5.0)
    table = pd.DataFrame({"component": [f"layers:{at}" for at in range(len(gains))], "site": "set"})
    return Effects(table, base - np.array(gains), base), base - whole


WHOLE = np.array([2.0, 1.8, 2.2, 2.1, 1.9, 2.0, 2.3, 1.7])


def test_the_selected_layers_share_is_compared_text_by_text_with_the_mean_of_the_others() -> None:
    gains = np.stack([share * WHOLE + offset * np.array([1, -1] * 4) for share, offset in ((0.3, 0.1), (0.1, 0.0), (0.2, 0.05))])
    effects, tuned = carried(gains.tolist(), WHOLE)
    table = layer_sets_table(effects, tuned)
    assert table["share"].tolist() == pytest.approx((gains.mean(1) / 2).tolist())
    low, high = by_inverting_t_tests(gains[0] - gains[1:].mean(0), WHOLE)
    assert table[["more", "more_low", "more_high"]].to_numpy()[0].tolist() == pytest.approx(
        [(gains[0] - gains[1:].mean(0)).mean() / 2, low, high]
    )
    # first of three sets, itself counted
    assert table[["p_random", "p_less"]].to_numpy()[0].tolist() == pytest.approx([1 / 3, 1.0])
    assert (table["withheld"] == "").all()


def sets(selected: float, others: int = 40) -> pd.DataFrame:
    """Return layer sets of which the others carry 0 to 1, evenly, and the selected one `selected`."""
    random = np.random.default_rng(0)
    shares = [selected, *np.linspace(0, 1, others)]
    return layer_sets_table(*carried([(share * WHOLE + 0.02 * random.normal(size=8)).tolist() for share in shares], WHOLE))


@pytest.mark.parametrize(("selected", "verdict"), [(1.5, "supported"), (-0.5, "contradicted"), (0.9, "undecided")])
def test_the_layers_carry_the_improvement_only_if_they_carry_more_than_any_other_set(selected: float, verdict: str) -> None:
    # .9 of the gain surely is more than the mean of the others on these texts, and says nothing: four of the others carry more
    table = sets(selected)
    assert table["more_low"][0] > 0 or table["more_high"][0] < 0
    judgement = layers_carry({"layer_sets": table}, Scope())
    assert judgement.verdict == verdict
    assert judgement.overturn


def test_few_other_sets_cannot_decide_and_it_is_said_how_many_would() -> None:
    judgement = layers_carry({"layer_sets": sets(5.0, others=14)}, Scope())
    assert judgement.verdict == "undecided"
    assert "14 other sets cannot decide at 5\u202f% (two-sided), 40 can" in judgement.overturn


def test_nothing_carries_an_improvement_that_is_none() -> None:
    worse = layer_sets_table(*carried([(0.9 * WHOLE).tolist(), *[(0.1 * WHOLE).tolist()] * 40], -WHOLE))
    assert worse[["share", "more", "more_low", "more_high"]].isna().all(axis=None)
    judgement = layers_carry({"layer_sets": worse}, Scope())
    assert judgement.verdict == "withheld"
    assert judgement.measured.startswith("Withheld: fine-tuning did not lower the loss on these summaries: −2 (−2.17 to −1.83)")
    assert np.isnan([judgement.value, judgement.low, judgement.high]).all()
    heads = heads_matter({"ablation": ablation(3.0, [0.0] * 99).assign(withheld=["no gain", *[""] * 99])}, Scope())
    assert (heads.verdict, heads.measured) == ("withheld", "Withheld: no gain.")


def test_one_more_random_set_is_seldom_taken_for_one_that_matters() -> None:
    random, draws = np.random.default_rng(0), 2000
    verdicts = []
    for _ in range(draws):
        # a few sets hold what matters: as skewed as costs of ablation are
        costs = random.lognormal(0, 1.5, 60)
        verdicts.append(heads_matter({"ablation": ablation(costs[0], costs[1:].tolist())}, Scope()).verdict)
    decided = np.mean([one != "undecided" for one in verdicts])
    assert decided < 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


def ablation(cost: float, random: list[float]) -> pd.DataFrame:
    ranks = [list(rank_p(cost, np.array(random))), *[[np.nan, np.nan]] * len(random)]
    kinds = ["selected", *["random"] * len(random)]
    return pd.DataFrame({"kind": kinds, "effect": [cost, *random], "withheld": ""}).join(
        pd.DataFrame(ranks, columns=["p_random", "p_less"])
    )


@pytest.mark.parametrize(("cost", "verdict"), [(3.0, "supported"), (0.5, "undecided"), (-1.0, "contradicted")])
def test_selected_heads_matter_only_beyond_random_ones(cost: float, verdict: str) -> None:
    claim = heads_matter({"ablation": ablation(cost, np.linspace(0, 1, 99).tolist())}, Scope())
    assert claim.verdict == verdict
    if cost == 3.0:
        assert "rank p = 0.02" in claim.measured


def test_without_interventions_nothing_is_claimed() -> None:
    judged = [layers_carry({}, Scope()), heads_matter({}, Scope())]
    assert [judgement.verdict for judgement in judged] == ["undecided", "undecided"]
    assert [judgement.measured for judgement in judged] == ["not measured", "not measured"]


def cross(shares: dict[str, list[float]], site: str) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for into, values in shares.items():
        for at, share in enumerate(values):
            layer, head = (at, -1) if site == "layer" else divmod(at, 2)
            rows.append({"site": site, "layer": layer, "head": head, "by": "activations", "into": into, "normalised": share})
    return pd.DataFrame(rows)


def test_change_and_gain_are_correlated_by_rank_over_layers_and_heads() -> None:
    kl = [0.1, 0.5, 0.3, 0.9]
    layers = pd.DataFrame({"rows": "all", "layer": range(4), "kl_base_tuned": kl})
    heads = pd.DataFrame({"rows": "all", "layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "kl_base_tuned": kl})
    shares = {"into_base": [0.0, 0.2, 0.1, 0.4], "into_tuned": [0.3, 0.1, 0.2, 0.15]}
    both = pd.concat([cross(shares, "layer"), cross(shares, "z")])
    table = importance_table(heads, layers, both, rows="all").set_index(["level", "into"])
    for level in ("layer", "head"):
        assert table.loc[(level, "into_base"), "rho"] == pytest.approx(1.0)
        assert table.loc[(level, "into_tuned"), "rho"] == pytest.approx(spearmanr(kl, shares["into_tuned"]).statistic)
        # four parts are too few for an interval
        assert np.isnan(table.loc[(level, "into_tuned"), ["low", "high"]].to_numpy(dtype=float)).all()


def test_parts_that_do_not_differ_have_no_rank_correlation() -> None:
    layers = pd.DataFrame({"rows": "all", "layer": range(4), "kl_base_tuned": [0.0] * 4})
    table = importance_table(layers.assign(head=0), layers, cross({"into_base": [0.1, 0.2, 0.3, 0.4]}, "layer"), rows="all")
    assert table["rho"].isna().all()
