"""The study's interventions: layer sets, ablation controls, rank correlations, and the verdicts drawn from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from mechscope.causal import Effects
from mechscope.studies.causal import importance_table, layer_sets, layer_sets_table
from mechscope.studies.paper_2505_17073.interventions import heads_matter, layers_carry
from mechscope.studies.paper_2505_17073.judgement import Scope
from mechscope.subject import Components


def test_every_other_set_of_layers_is_a_control_where_there_are_few() -> None:
    sets = layer_sets(Components.of_layers([1, 3]), 5, seed=0)
    assert str(sets[0]) == "layers:1,3"
    assert len(sets) == len({str(each) for each in sets}) == 10  # 5 choose 2
    many = layer_sets(Components.of_layers([0, 1, 2]), 24, seed=0)
    assert len(many) == len({str(each) for each in many}) == 41
    assert all(len(each.layers) == 3 for each in many)
    assert layer_sets(Components.of_layers(range(4)), 4, seed=0) == [Components.of_layers(range(4))]


def carried(gains: list[list[float]], whole: float = 1.0) -> tuple[Effects, np.ndarray]:
    """Return effects in which the sets gain so much loss per text, of a base loss of 5 and a tuned loss of 5 − whole."""
    texts = len(gains[0])
    base = np.full(texts, 5.0)
    table = pd.DataFrame({"component": [f"layers:{at}" for at in range(len(gains))], "site": "set"})
    return Effects(table, base - np.array(gains), base), base - whole


def test_the_selected_layers_share_is_compared_text_by_text_with_the_mean_of_the_others() -> None:
    effects, tuned = carried([[0.5, 0.7, 0.6, 0.6], [0.1, 0.2, 0.1, 0.2], [0.3, 0.2, 0.3, 0.2]], whole=2.0)
    table = layer_sets_table(effects, tuned)
    assert table["share"].tolist() == pytest.approx([0.3, 0.075, 0.125])
    more = np.array([0.5, 0.7, 0.6, 0.6]) - np.array([0.2, 0.2, 0.2, 0.2])
    error = more.std(ddof=1) / 2
    assert table["more"][0] == pytest.approx(more.mean() / 2)
    assert table["more_low"][0] == pytest.approx((more.mean() - 3.1824463 * error) / 2)  # t of 3 degrees of freedom
    assert table["more_high"][0] == pytest.approx((more.mean() + 3.1824463 * error) / 2)


@pytest.mark.parametrize(
    ("selected", "verdict"),
    [([0.6, 0.7, 0.6, 0.65], "supported"), ([0.0, 0.1, 0.0, 0.05], "contradicted"), ([0.1, 0.4, 0.0, 0.3], "undecided")],
)
def test_the_layers_carry_the_improvement_only_if_they_carry_more_than_others(selected: list[float], verdict: str) -> None:
    effects, tuned = carried([selected, [0.2, 0.2, 0.2, 0.2], [0.25, 0.2, 0.2, 0.15]])
    assert layers_carry({"layer_sets": layer_sets_table(effects, tuned)}, Scope()).verdict == verdict


def ablation(cost: float, random: list[float]) -> pd.DataFrame:
    costs = np.array([cost, *random])
    p = (1 + int((costs[1:] >= cost).sum())) / len(costs)
    return pd.DataFrame({"kind": ["selected", *["random"] * len(random)], "effect": costs, "p_random": [p, *[np.nan] * len(random)]})


@pytest.mark.parametrize(("cost", "verdict"), [(3.0, "supported"), (0.5, "undecided"), (-1.0, "contradicted")])
def test_selected_heads_matter_only_beyond_random_ones(cost: float, verdict: str) -> None:
    claim = heads_matter({"ablation": ablation(cost, np.linspace(0, 1, 99).tolist())}, Scope())
    assert claim.verdict == verdict
    if cost == 3.0:
        assert "p = 0.01" in claim.measured


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
    table = importance_table(heads, layers, both, rows="all", seed=0).set_index(["level", "into"])
    for level in ("layer", "head"):
        assert table.loc[(level, "into_base"), "rho"] == pytest.approx(1.0)
        assert table.loc[(level, "into_tuned"), "rho"] == pytest.approx(spearmanr(kl, shares["into_tuned"]).statistic)
        low, rho = table.loc[(level, "into_tuned"), ["low", "rho"]].to_numpy(dtype=float)
        assert low <= rho


def test_parts_that_do_not_differ_have_no_rank_correlation() -> None:
    layers = pd.DataFrame({"rows": "all", "layer": range(4), "kl_base_tuned": [0.0] * 4})
    table = importance_table(layers.assign(head=0), layers, cross({"into_base": [0.1, 0.2, 0.3, 0.4]}, "layer"), rows="all", seed=0)
    assert table["rho"].isna().all()
