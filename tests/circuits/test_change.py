"""What tuning changed in a circuit: planted changes are found, equal models do not differ, and nulls are what chance gives."""

from __future__ import annotations

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
from mechscope.subject.load import load
from tests import families

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


def test_every_row_is_the_paired_t_test_of_an_edges_scores() -> None:
    base, tuned = random_scores(0), random_scores(1)
    assert base.per_text is not None
    assert tuned.per_text is not None
    circuits = [choose(one, fraction=fraction) for one, fraction in ((base, 0.1), (tuned, 0.3))]
    found = edge_shift(base, tuned, *circuits)
    assert tuple(found["edge"]) == GRAPH.names
    np.testing.assert_allclose(found["shift"], tuned.mean - base.mean, rtol=0, atol=1e-12)
    by_hand = scipy.stats.ttest_rel(tuned.per_text, base.per_text)
    interval = by_hand.confidence_interval(0.95)
    for column, expected in (("p", by_hand.pvalue), ("low", interval.low), ("high", interval.high)):
        np.testing.assert_allclose(found[column], expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found["q"], scipy.stats.false_discovery_control(by_hand.pvalue), rtol=0, atol=1e-9)
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
    table = overlap_table(base, tuned, (0.05, 0.2), resamples=10, draws=20)
    assert (table["jaccard"] == 1).all()


def test_a_model_differs_from_itself_by_nothing_beyond_its_own_noise() -> None:
    base = random_scores(3, signal=1.0, texts=9)
    table = overlap_table(base, replace(base), (0.05, 0.3), resamples=20, draws=20)
    for column in ("change", "change_low", "change_high"):
        assert (table[column] == 0).all()
    for column in ("self_base", "self_tuned"):
        np.testing.assert_array_equal(table["across"], table[column])
    # circuits of disjoint halves of the texts are not equal
    assert (table.loc[table["what"] == "edges", "across"] < 0.9).all()
    assert (table["jaccard"] == 1).all()


def test_unrelated_circuits_share_what_chance_gives() -> None:
    inside = []
    for seed in range(40):
        table = overlap_table(random_scores(seed), random_scores(1000 + seed), (0.2,), resamples=1, prune=False)
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
        row = overlap_table(one, other, (0.2,), resamples=1, prune=False).iloc[0]
        inside.append(row["null_low"] <= row["jaccard"] <= row["null_high"])
        above.append(row["null"])
    assert np.mean(inside) >= 0.9
    # a fifth of all edges, drawn twice from all, would share 1 in 9
    assert min(above) > 1.5 / 9


def test_between_pure_noise_there_is_no_change() -> None:
    table = overlap_table(random_scores(5), random_scores(6), (0.1, 0.3), resamples=60, prune=False)
    table = table[table["what"] == "edges"]
    assert ((table["change_low"] < 0) & (table["change_high"] > 0)).all()
    # and each model's own halves agree no more than two models do
    for column in ("self_base", "self_tuned", "across"):
        np.testing.assert_allclose(table[column], table["null"], rtol=0, atol=0.05)


def test_a_circuit_that_moved_differs_by_more_than_the_models_own_noise() -> None:
    moved = overlap_table(random_scores(7, signal=10.0), random_scores(8, signal=10.0), (0.1, 0.3), resamples=20, prune=False)
    moved = moved[moved["what"] == "edges"]
    assert (moved["change_low"] > 0.5).all()
    assert (moved[["self_base", "self_tuned"]] > 0.8).all(axis=None)
    np.testing.assert_allclose(moved["across"], moved["jaccard"], rtol=0, atol=0.05)
    # the same signal read through other noise is the same circuit
    random = np.random.default_rng(9)
    signal, noise = 10 * random.standard_normal(len(GRAPH)), random.standard_normal((2, 20, len(GRAPH)))
    kept = overlap_table(scores_of(signal + noise[0]), scores_of(signal + noise[1]), (0.1, 0.3), resamples=20, prune=False)
    assert (kept.loc[kept["what"] == "edges", "across"] > 0.8).all()
    assert (kept.loc[kept["what"] == "edges", "change"].abs() < 0.05).all()


def test_models_that_differ_in_noise_alone_show_no_change() -> None:
    quiet_alone = []
    for seed in range(8):
        random = np.random.default_rng(seed)
        signal = random.standard_t(3, len(GRAPH))
        quiet, noisy = (scores_of(signal + sd * random.standard_normal((16, len(GRAPH)))) for sd in (0.3, 3.0))
        row: Any = overlap_table(quiet, noisy, (0.2,), resamples=30, draws=2, seed=seed).iloc[0]
        assert row["change_low"] <= 0
        # what the quiet one shares with itself it cannot share with the noisy one, so the mean of both would speak of change
        quiet_alone.append((row["self_base"] + row["self_tuned"]) / 2 - row["across"])
    assert np.mean(quiet_alone) > 0.1


def test_scores_without_a_sign_are_not_compared_by_what_helps() -> None:
    base = replace(random_scores(0), method="flow-routes")
    with pytest.raises(SettingsError, match="'flow-routes' only say how important"):
        overlap_table(base, base, (0.1,), sign="helpful", higher_is_better=True)


def by_hand(base: np.ndarray, tuned: np.ndarray, side: np.ndarray, number: int) -> tuple[float, float, float]:
    """Return the overlap across models and within each, of the strongest edges on two halves of the texts."""

    def strongest(per_text: np.ndarray, texts: np.ndarray) -> set[int]:
        return set(np.argsort(-np.abs(per_text[texts].mean(0)))[:number].tolist())

    def shared(one: set[int], other: set[int]) -> float:
        return len(one & other) / len(one | other)

    one, other = ([strongest(per_text, texts) for texts in (side, ~side)] for per_text in (base, tuned))
    across = (shared(one[0], other[1]) + shared(one[1], other[0])) / 2
    return across, shared(*one), shared(*other)


def test_a_halving_compares_base_on_one_half_with_tuned_on_the_other() -> None:
    base, tuned = random_scores(10, texts=4, signal=1.0), random_scores(11, texts=4, signal=1.0)
    assert base.per_text is not None
    assert tuned.per_text is not None
    tuned = scores_of(0.5 * tuned.per_text + 0.5 * base.per_text)
    assert tuned.per_text is not None
    number = round(0.3 * len(GRAPH))
    # four texts have three halvings
    sides = [np.array(side) for side in ([True, True, False, False], [True, False, True, False], [True, False, False, True])]
    possible = [by_hand(base.per_text, tuned.per_text, side, number) for side in sides]
    drawn = set()
    for seed in range(12):
        table = overlap_table(base, tuned, (0.3,), resamples=1, draws=5, seed=seed, prune=False)
        row: Any = table[table["what"] == "edges"].iloc[0]
        found = row[["across", "self_base", "self_tuned"]].astype(float).to_numpy()
        assert row["change"] == pytest.approx(min(found[1], found[2]) - found[0], abs=1e-12)
        place = int(np.argmin([np.abs(found - one).sum() for one in possible]))
        np.testing.assert_allclose(found, possible[place], rtol=0, atol=1e-12)
        drawn.add(place)
    assert drawn == {0, 1, 2}


def test_options_of_the_choice_are_handed_on_and_nodes_are_counted_too() -> None:
    base, tuned = random_scores(12, signal=1.0), random_scores(13, signal=1.0)
    table = overlap_table(base, tuned, (0.2,), resamples=2, draws=10, rule="greedy")
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
    with pytest.raises(DataError, match=r"3 texts cannot be halved .* at least 4"):
        overlap_table(few, few, (0.1,))
