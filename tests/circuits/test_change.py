"""What tuning changed in a circuit: planted changes are found, equal models do not differ, and nulls are what chance gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import scipy.stats
import torch

from mechscope.circuits.attribution import attribute_edges
from mechscope.circuits.change import edge_shift, overlap_table
from mechscope.circuits.choosing import choose
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.scores import Cost, EdgeScores
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.errors import DataError, SettingsError
from mechscope.studies.calibration.circuit_change import TRUTHS
from mechscope.subject.load import load
from tests import families
from tests.stats.skewed import mean_test

GRAPH = Graph(3, 4)


def scores_of(per_text: np.ndarray, graph: Graph = GRAPH) -> EdgeScores:
    return EdgeScores(graph, per_text.mean(0), per_text, "made up", Cost(0, 0))


def random_scores(seed: int, *, texts: int = 20, noise: float = 1.0, signal: float = 0.0, graph: Graph = GRAPH) -> EdgeScores:
    """Return scores of every text: what the model has (`signal`) and what differs from text to text (`noise`)."""
    random = np.random.default_rng(seed)
    return scores_of(signal * random.standard_normal(len(graph)) + noise * random.standard_normal((texts, len(graph))), graph)


def whole() -> Circuit:
    return Circuit.full(GRAPH)


def question(n: int = 60) -> Pairs:
    """Return random texts that end alike: clean in one word, corrupt in another, with the same answers."""
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for index in range(n):
        start = torch.randint(3, families.VOCABULARY, (6,), generator=generator).tolist()
        pairs.append(PromptPair(str(index), (*start, 10, 30), (*start, 20, 30), answers=(5,), wrong_answers=(6,)))
    return Pairs(tuple(pairs), "one question")


def test_every_row_is_the_paired_test_of_an_edges_scores() -> None:
    base, tuned = random_scores(0), random_scores(1)
    assert base.per_text is not None
    assert tuned.per_text is not None
    circuits = [choose(one, fraction=fraction) for one, fraction in ((base, 0.1), (tuned, 0.3))]
    found = edge_shift(base, tuned, *circuits)
    assert tuple(found["edge"]) == GRAPH.names
    np.testing.assert_allclose(found["shift"], tuned.mean - base.mean, rtol=0, atol=1e-12)
    low, high, p = mean_test(tuned.per_text - base.per_text)
    for column, expected in (("p", p), ("low", low), ("high", high)):
        np.testing.assert_allclose(found[column], expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found["q"], scipy.stats.false_discovery_control(p), rtol=0, atol=1e-9)
    for column, one in (("base", base), ("tuned", tuned)):
        np.testing.assert_array_equal(found[column], one.mean)
    for column, circuit in zip(("in_base", "in_tuned"), circuits, strict=True):
        assert tuple(found.loc[found[column], "edge"]) == circuit.names
    row: Any = found.set_index("edge").loc["m0->a2.h1<q>"]
    assert row[["sender", "receiver", "sender_layer", "receiver_layer"]].tolist() == ["m0", "a2.h1<q>", 0, 2]


def test_an_edge_without_a_score_has_no_shift_and_does_not_count_among_the_tests() -> None:
    base, tuned = random_scores(0), random_scores(1)
    assert base.per_text is not None
    scored = np.arange(len(GRAPH)) % 2 == 0
    some = scores_of(np.where(scored, base.per_text, np.nan))
    found, every = edge_shift(some, tuned, whole(), whole()), edge_shift(base, tuned, whole(), whole())
    assert found.loc[~scored, ["base", "shift", "p", "q"]].isna().all(axis=None)
    np.testing.assert_array_equal(found.loc[scored, "p"], every.loc[scored, "p"])
    np.testing.assert_allclose(found.loc[scored, "q"], scipy.stats.false_discovery_control(every.loc[scored, "p"]), rtol=0, atol=1e-12)


def nearly_linear(family: str) -> Any:
    """Return a model whose blocks write so little that one head's change hardly reaches what other parts do."""
    model = families.build(family, torch.float64)
    with torch.no_grad():
        for block in load(model).anatomy.blocks:
            for module in (block.output.module, block.mlp_down):
                cast(torch.Tensor, module.weight).mul_(0.01)
    return model


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_a_head_that_writes_more_than_before_shows_at_its_own_edges(family: str) -> None:
    base, tuned = (load(nearly_linear(family)) for _ in range(2))
    with torch.no_grad():
        tuned.anatomy.blocks[1].output.weight(2).mul_(10)
    before, after = (attribute_edges(subject, question(), method="eap") for subject in (base, tuned))
    empty = Circuit.empty(before.graph)
    found = edge_shift(before, after, empty, empty)
    own = (found["sender"] == "a1.h2") | found["receiver"].str.startswith("a1.h2<")
    size, strongest = found["shift"].abs(), found["shift"].abs().nlargest(3).index
    assert own[strongest].all()
    assert found.loc[strongest, "q"].min() < 1e-9
    assert size[own].max() > 10 * size[~own].max()
    assert size[own].median() > 10 * size[~own].median()
    # ten times as much is written, so to first order its edges are worth ten times as much
    first = found.set_index("edge").loc["embed->a1.h2<v>"]
    assert first["tuned"] == pytest.approx(10 * first["base"], rel=0.1)
    assert first["shift"] == pytest.approx(9 * first["base"], rel=0.1)
    assert first["q"] < 1e-9


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equal_models_have_shifts_of_exactly_zero_and_equal_circuits(family: str) -> None:
    subjects = [load(families.build(family, torch.float64)) for _ in range(2)]
    base, tuned = (attribute_edges(subject, question(9), method="eap") for subject in subjects)
    circuits = [choose(one, fraction=0.1) for one in (base, tuned)]
    found = edge_shift(base, tuned, *circuits)
    assert (found["shift"] == 0).all()
    assert (found["p"] == 1).all()
    assert (found["q"] == 1).all()
    assert found["in_base"].equals(found["in_tuned"].rename("in_base"))
    table = overlap_table(base, tuned, (0.05, 0.2), exchanges=10, draws=20)
    assert (table[["jaccard", "exchanged", "p"]] == 1).all(axis=None)
    assert (table["change"] == 0).all()


def test_unrelated_circuits_share_what_chance_gives() -> None:
    inside = []
    for seed in range(40):
        table = overlap_table(random_scores(seed), random_scores(1000 + seed), (0.2,), exchanges=1, prune=False)
        row = table[table["what"] == "edges"].iloc[0]
        inside.append(row["null_low"] <= row["jaccard"] <= row["null_high"])
        assert row["base_size"] == row["tuned_size"] == round(0.2 * len(GRAPH))
    assert np.mean(inside) >= 0.9  # 95 % by construction, of 40


def test_chance_keeps_to_the_layers_that_both_circuits_are_in() -> None:
    into = np.array([name.partition("->")[2] for name in GRAPH.names])
    late = 1.0 + 99.0 * np.array([name.startswith("a2.") for name in into])
    inside, above = [], []
    for seed in range(20):
        # both look at the last layer's heads, but at edges of their own there
        one, other = (scores_of(late * random_scores(at).mean[None].repeat(4, 0)) for at in (seed, 1000 + seed))
        row = overlap_table(one, other, (0.2,), exchanges=1, prune=False).iloc[0]
        inside.append(row["null_low"] <= row["jaccard"] <= row["null_high"])
        above.append(row["null"])
    assert np.mean(inside) >= 0.9
    # a fifth of all edges, drawn twice from all, would share 1 in 9
    assert min(above) > 1.5 / 9


def found_changed(draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]], worlds: int) -> float:
    """Return the share of worlds in which the two models' circuits are said to differ."""
    found = []
    for seed in range(worlds):
        base, tuned = (scores_of(scores) for scores in draw(np.random.default_rng(seed)))
        row: Any = overlap_table(base, tuned, (0.1,), exchanges=39, draws=1, seed=seed, prune=False).iloc[0]
        found.append(row["p"] <= 0.05 and row["change"] > 0)
    return float(np.mean(found))


@pytest.mark.parametrize(("louder", "noisier", "shared"), [(1.0, 1.0, 0.0), (1.0, 1.0, 0.9), (2.0, 1.0, 0.5), (1.0, 3.0, 0.5)])
def test_models_that_differ_in_noise_or_size_alone_are_seldom_said_to_differ(louder: float, noisier: float, shared: float) -> None:
    """The old measure, overlap of halves, called this a change by the mean of both models' own overlaps, and hid changes by the smaller."""

    def same_circuit(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        signal, common = 0.3 * random.standard_t(3, len(GRAPH)), random.standard_normal((16, len(GRAPH)))
        own = random.standard_normal((2, 16, len(GRAPH)))
        base, tuned = (signal + size * shared * common + size * one for size, one in zip((1.0, noisier), own, strict=True))
        return base, louder * tuned

    assert found_changed(same_circuit, 80) < 0.05 + 2 * (0.05 * 0.95 / 80) ** 0.5


def test_a_planted_change_of_two_fifths_of_the_edges_is_found() -> None:
    def changed(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        before, common = random.standard_t(3, len(GRAPH)), random.standard_normal((16, len(GRAPH)))
        after = np.where(random.random(len(GRAPH)) < 0.4, random.standard_t(3, len(GRAPH)), before)
        base, tuned = (signal + common + random.standard_normal((16, len(GRAPH))) for signal in (before, after))
        return base, tuned

    assert found_changed(changed, 40) > 0.8


def test_a_circuit_that_moved_shares_less_than_its_exchanges() -> None:
    moved = overlap_table(random_scores(7, signal=10.0), random_scores(8, signal=10.0), (0.1, 0.3), exchanges=39, prune=False)
    moved = moved[moved["what"] == "edges"]
    assert (moved["p"] == 1 / 40).all()
    assert (moved["change"] > 0.1).all()
    np.testing.assert_allclose(moved["exchanged"] - moved["jaccard"], moved["change"], rtol=0, atol=1e-12)


def test_scores_without_a_sign_are_not_compared_by_what_helps() -> None:
    base = replace(random_scores(0), method="flow-routes")
    with pytest.raises(SettingsError, match="'flow-routes' only say how important"):
        overlap_table(base, base, (0.1,), sign="helpful", higher_is_better=True)


def test_an_exchange_gives_each_text_to_one_of_the_models() -> None:
    """Every overlap with labels exchanged is one of the 16 that four texts allow, and all of them come."""
    base, tuned = random_scores(10, texts=4, signal=1.0), random_scores(11, texts=4, signal=1.0)
    assert base.per_text is not None
    assert tuned.per_text is not None
    number = round(0.3 * len(GRAPH))

    def strongest(per_text: np.ndarray) -> set[int]:
        return set(np.argsort(-np.abs(per_text.mean(0)))[:number].tolist())

    possible = []
    for at in range(16):
        swapped = np.array([at >> text & 1 for text in range(4)], dtype=bool)[:, None]
        one, other = (strongest(np.where(swapped, *two)) for two in ((tuned.per_text, base.per_text), (base.per_text, tuned.per_text)))
        possible.append(len(one & other) / len(one | other))
    row: Any = overlap_table(base, tuned, (0.3,), exchanges=2000, draws=1, prune=False).iloc[0]
    assert row["jaccard"] == possible[0]
    assert row["exchanged"] == pytest.approx(np.mean(possible), abs=0.01)
    assert row["p"] == pytest.approx(np.mean(np.array(possible) <= possible[0]), abs=0.03)
    assert (row["exchanged_low"], row["exchanged_high"]) == pytest.approx((min(possible), max(possible)), abs=0.05)


def test_options_of_the_choice_are_handed_on_and_nodes_are_counted_too() -> None:
    base, tuned = random_scores(12, signal=1.0), random_scores(13, signal=1.0)
    table = overlap_table(base, tuned, (0.2,), exchanges=2, draws=10, rule="greedy")
    chosen = [choose(one, fraction=0.2, rule="greedy") for one in (base, tuned)]
    sizes: Any = table.set_index("what")[["base_size", "tuned_size"]]
    assert sizes.loc["edges"].tolist() == [len(one) for one in chosen]
    assert sizes.loc["nodes"].tolist() == [int(one.nodes[1:].sum()) for one in chosen]
    assert (table["n"] == 20).all()


def made(change: dict[str, Any]) -> EdgeScores:
    return replace(random_scores(0), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_text": None}, "keep none of every text"),
        ({"per_text": np.zeros((19, len(GRAPH)))}, "base was scored on 20 texts and tuned on 19: score both on the same pairs"),
        ({"method": "eap"}, "base was scored with method 'made up' and tuned with 'eap'"),
        ({"notes": {"metric": "loss"}}, "base was scored with metric None and tuned with 'loss'"),
        ({"notes": {"steps": 5}}, "base was scored with steps None and tuned with 5"),
        ({"notes": {"points": "midpoint"}}, "base was scored with points None and tuned with 'midpoint'"),
        ({"notes": {"source": "zero"}}, "base was scored with source None and tuned with 'zero'"),
    ],
)
def test_scores_that_have_no_difference_are_refused(change: dict[str, Any], message: str) -> None:
    base, other = random_scores(0), made(change)
    with pytest.raises(DataError, match=message):
        edge_shift(base, other, whole(), whole())
    with pytest.raises(DataError, match=message):
        overlap_table(base, other, (0.1,))


def test_other_graphs_and_too_few_texts_are_refused() -> None:
    base = random_scores(0)
    for graph in (Graph(3, 4, parallel=True), Graph(2, 4)):
        with pytest.raises(DataError, match="both models need one architecture"):
            edge_shift(base, random_scores(1, graph=graph), whole(), Circuit.full(graph))
    few = random_scores(0, texts=3)
    with pytest.raises(DataError, match="3 texts are too few to exchange models in: at least 4"):
        overlap_table(few, few, (0.1,))


def test_a_model_that_is_louder_and_cleaner_has_not_changed_its_circuit() -> None:
    # pruned circuits, slower by far, tell nothing more of the sizes
    worlds = [truth for truth in TRUTHS if "as large and" in truth.world and "pruned" not in truth.world]
    assert len(worlds) == 2
    for truth in worlds:
        # without bringing both to one size, 55 to 78 % of these draws were called a change
        assert sum(truth.draw(seed) in truth.wrong for seed in range(30)) <= 4
