"""Rules that pick layers and heads, and how stable their picks are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from mechscope.difference.selection import RULES, default_number, select, selection_table, stability
from mechscope.errors import SettingsError
from mechscope.stats.ranking import LAYER_SCORE_COLUMNS
from mechscope.studies.paper_2505_17073.attention import PAPER_KL
from mechscope.subject.components import Components

N_LAYERS, N_HEADS = 8, 4


def tables(seed: int = 0, n_layers: int = N_LAYERS, n_heads: int = N_HEADS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return heads and layers tables of a model whose parts all changed a little, at random, in shuffled row order."""
    random = np.random.default_rng(seed)
    heads = pd.DataFrame([(rows, i, j) for rows in ("all", "summary") for i in range(n_layers) for j in range(n_heads)])
    heads.columns = pd.Index(["rows", "layer", "head"])
    for column in ("kl_base_tuned", "z_cosine_distance", "write_change", "weight_change"):
        heads[column] = random.uniform(0.01, 0.02, len(heads))
    heads["entropy_change"] = random.uniform(-0.02, 0.02, len(heads))
    layers = heads.groupby(["rows", "layer"], as_index=False)[["kl_base_tuned", "entropy_change", "write_change", "weight_change"]].mean()
    for column in ("cosine_distance", "mlp_write_change", "write_change_own", "mlp_write_change_own"):
        layers[column] = random.uniform(0.01, 0.02, len(layers))
    return heads.sample(frac=1, random_state=seed), layers.sample(frac=1, random_state=seed)


def at(table: pd.DataFrame, layer: int, head: int | None = None, rows: str = "all") -> pd.Series:
    chosen = (table["rows"] == rows) & (table["layer"] == layer)
    return chosen if head is None else chosen & (table["head"] == head)


def test_the_papers_chart_gives_the_papers_layers() -> None:
    heads, layers = tables(n_layers=12, n_heads=12)
    for layer, kl in enumerate(PAPER_KL):
        layers.loc[at(layers, layer), "kl_base_tuned"] = kl
    assert str(select("layers_by_kl", heads, layers).components) == "layers:2,3,5"


@pytest.mark.parametrize(
    ("rule", "column"),
    [
        ("heads_by_kl", "kl_base_tuned"),
        ("heads_by_entropy", "entropy_change"),
        ("heads_by_write", "write_change"),
        ("heads_by_score", "z_cosine_distance"),
    ],
)
def test_a_planted_head_is_ranked_first(rule: str, column: str) -> None:
    heads, layers = tables()
    heads.loc[at(heads, 6, 1), ["kl_base_tuned", "z_cosine_distance", "write_change", "weight_change"]] = 0.5
    heads.loc[at(heads, 6, 1), "entropy_change"] = -0.5
    heads.loc[at(heads, 6, 1), column] *= 2
    selection = select(rule, heads, layers, number=1)
    assert selection.components == Components.of_heads([(6, 1)])
    assert selection.table.iloc[0][["component", "kind", "layer", "head", "rank", "chosen"]].tolist() == ["a6.h1", "head", 6, 1, 1, True]


@pytest.mark.parametrize("rule", ["layers_by_kl", "layers_by_write", "layers_by_score"])
def test_a_planted_layer_is_ranked_first(rule: str) -> None:
    heads, layers = tables()
    layers.loc[at(layers, 5), [*LAYER_SCORE_COLUMNS, "write_change", "mlp_write_change"]] = 0.5
    selection = select(rule, heads, layers)
    assert selection.table.iloc[0][["component", "kind", "layer", "head", "rank", "chosen"]].tolist() == [
        "layers:5",
        "layer",
        5,
        -1,
        1,
        True,
    ]
    assert 5 in selection.components.layers


def test_a_large_fall_and_a_large_rise_of_entropy_count_alike() -> None:
    heads, layers = tables()
    heads.loc[at(heads, 2, 3), "entropy_change"] = -0.9
    heads.loc[at(heads, 7, 0), "entropy_change"] = 0.8
    assert str(select("heads_by_entropy", heads, layers, number=2).components) == "a2.h3,a7.h0"


def test_ranks_follow_scores_and_the_first_k_are_chosen() -> None:
    heads, layers = tables()
    selection = select("heads_by_kl", heads, layers, number=7)
    by_hand = heads[heads["rows"] == "all"].sort_values("kl_base_tuned", ascending=False)
    assert list(zip(selection.table["layer"], selection.table["head"], strict=True)) == list(
        zip(by_hand["layer"], by_hand["head"], strict=True)
    )
    np.testing.assert_array_equal(selection.table["score"], by_hand["kl_base_tuned"])
    assert selection.table["rank"].tolist() == list(range(1, 33))
    assert selection.table["chosen"].tolist() == [True] * 7 + [False] * 25
    assert Components.parse(",".join(selection.table["component"][:7])) == selection.components


def test_query_rows_are_chosen_by_name() -> None:
    heads, layers = tables()
    layers.loc[at(layers, 1, rows="summary"), "kl_base_tuned"] = 9.0
    layers.loc[at(layers, 4, rows="all"), "kl_base_tuned"] = 9.0
    assert select("layers_by_kl", heads, layers, number=1).components.layers == (4,)
    assert select("layers_by_kl", heads, layers, number=1, rows="summary").components.layers == (1,)


@pytest.mark.parametrize(("n_layers", "number"), [(1, 1), (2, 1), (4, 1), (6, 2), (8, 2), (12, 3), (24, 6), (32, 8)])
def test_a_quarter_of_the_layers_is_the_default(n_layers: int, number: int) -> None:
    heads, layers = tables(n_layers=n_layers)
    assert default_number(n_layers) == number
    assert len(select("layers_by_kl", heads, layers).components.layers) == number
    assert len(select("heads_by_kl", heads, layers).components.heads) == number * N_HEADS


def test_the_last_layers_are_the_last() -> None:
    assert select("last_layers", *tables(), number=3).components.layers == (5, 6, 7)


def test_ties_go_to_the_lower_layer_and_head() -> None:
    heads, layers = tables()
    heads["kl_base_tuned"] = 0.0
    layers["kl_base_tuned"] = 0.0
    assert str(select("heads_by_kl", heads, layers, number=5).components) == "a0.h0,a0.h1,a0.h2,a0.h3,a1.h0"
    assert str(select("layers_by_kl", heads, layers).components) == "layers:0,1"


def test_random_choices_repeat_with_their_seed_and_cover_all_layers_over_seeds() -> None:
    heads, layers = tables()
    counts = np.zeros(N_LAYERS)
    for seed in range(100):
        counts[list(select("random_layers", heads, layers, number=2, seed=seed).components.layers)] += 1
    # expected 25 each, standard deviation 4.3
    assert counts.min() > 8
    assert counts.max() < 42
    once, again = (select("random_layers", heads, layers, seed=5).components for _ in range(2))
    assert once == again


def test_random_choices_do_not_depend_on_what_was_measured() -> None:
    first, second = select("random_heads", *tables(0), seed=3), select("random_heads", *tables(1), seed=3)
    assert first.components == second.components


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, y: select("layers_by_luck", h, y), "'layers_by_luck' is not known: use one of layers_by_kl"),
        (lambda h, y: select("heads_by_kl", h, y, rows="document"), "heads table has no rows='document': use one of all, summary"),
        (lambda h, y: select("heads_by_kl", h.drop(columns="kl_base_tuned"), y), "heads table has no column 'kl_base_tuned'"),
        (lambda h, y: select("heads_by_kl", h.drop(columns="rows"), y), "heads table has no column rows"),
        (lambda h, y: select("layers_by_kl", h, y, number=9), "9 layers to select by layers_by_kl: the model has 8"),
        (lambda h, y: select("heads_by_kl", h, y, number=0), "0 heads to select"),
        (lambda h, y: select("heads_by_kl", h[~at(h, 3, 2)], y), "31 heads and 8 layers"),
        (lambda h, y: select("heads_by_kl", h.assign(kl_base_tuned=h["kl_base_tuned"].where(~at(h, 3, 2))), y), "is NaN for a3.h2"),
        (
            lambda h, y: stability("heads_by_kl", h, y, {"kl_base_tuned": np.zeros((5, 4, 8))}),
            r"shape \(5, 4, 8\): give \(replicates, 8, 4\)",
        ),
    ],
)
def test_what_cannot_be_ranked_is_refused_by_name(change: Callable[[pd.DataFrame, pd.DataFrame], object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        change(*tables())


def replicates(heads: pd.DataFrame, n: int, noise: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Return resampled means scattered around the table's."""
    ordered = heads[heads["rows"] == "all"].sort_values(["layer", "head"])
    random = np.random.default_rng(seed)
    return {
        column: ordered[column].to_numpy().reshape(1, N_LAYERS, N_HEADS) + noise * random.normal(size=(n, N_LAYERS, N_HEADS))
        for column in ("kl_base_tuned", "entropy_change", "write_change")
    }


@pytest.mark.parametrize("rule", RULES)
def test_without_noise_every_resample_repeats_the_choice(rule: str) -> None:
    heads, layers = tables()
    table = selection_table(heads, layers, replicates(heads, 20, noise=0.0), rules=[rule])
    np.testing.assert_array_equal(table["frequency"], table["chosen"].astype(float))
    assert (table["n_resamples"] == 20).all()


def test_a_head_far_above_all_others_is_chosen_in_every_resample() -> None:
    heads, layers = tables()
    heads.loc[at(heads, 6, 1), "kl_base_tuned"] = 5.0
    table = selection_table(heads, layers, replicates(heads, 200, noise=0.1), rules=["heads_by_kl"]).set_index("component")
    assert table.loc["a6.h1", "frequency"] == 1.0
    # the other 31 share the seven remaining places and no one of them is sure
    assert table["frequency"].sum() == pytest.approx(8.0)
    assert table["frequency"].drop("a6.h1").max() < 0.6


def test_frequencies_equal_selecting_on_every_replicate() -> None:
    heads, layers = tables()
    resampled = replicates(heads, 12, noise=0.01)
    for rule in RULES:
        count: dict[str, int] = {}
        for b in range(12):
            one_heads = heads[heads["rows"] == "all"].sort_values(["layer", "head"]).copy()
            for column, array in resampled.items():
                one_heads[column] = array[b].ravel()
            one_layers = layers[layers["rows"] == "all"].sort_values("layer").copy()
            for column, array in resampled.items():
                one_layers[column] = array[b].mean(axis=1)
            chosen = select(rule, one_heads, one_layers).table
            for component in chosen.loc[chosen["chosen"], "component"]:
                count[component] = count.get(component, 0) + 1
        table = selection_table(heads, layers, resampled, rules=[rule])
        assert dict(zip(table["component"], table["frequency"], strict=True)) == pytest.approx(
            {component: count.get(component, 0) / 12 for component in table["component"]}
        )


def test_a_resample_without_documents_says_nothing() -> None:
    heads, layers = tables()
    resampled = replicates(heads, 10, noise=0.0)
    resampled["kl_base_tuned"][3, 2, 1] = np.nan
    frequency, used = stability("heads_by_kl", heads, layers, resampled)
    assert used == 9
    assert sorted(set(frequency)) == [0.0, 1.0]
    resampled["kl_base_tuned"][:] = np.nan
    frequency, used = stability("heads_by_kl", heads, layers, resampled)
    assert used == 0
    assert np.isnan(frequency).all()


def test_the_table_has_every_candidate_once_per_rule() -> None:
    heads, layers = tables()
    table = selection_table(heads, layers, n_selected_layers=3, n_selected_heads=5)
    assert list(table.columns) == ["rule", "component", "kind", "layer", "head", "rank", "score", "chosen", "frequency", "n_resamples"]
    for rule, rows in table.groupby("rule"):
        candidates, chosen = (N_LAYERS, 3) if "layers" in str(rule) else (N_LAYERS * N_HEADS, 5)
        assert rows["component"].nunique() == len(rows) == candidates
        assert rows["chosen"].sum() == chosen
    assert table["frequency"].isna().all()
    assert (table["n_resamples"] == 0).all()
