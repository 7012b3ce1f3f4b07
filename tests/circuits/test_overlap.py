"""Overlap is judged beside what chance and resampling give."""

from __future__ import annotations

import itertools
from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import pytest
from scipy.stats import hypergeom, spearmanr

from mechscope.circuits.choosing import choose
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.overlap import (
    cells,
    compare_seeds,
    jaccard,
    node_jaccard,
    overlap,
    random_circuits,
    random_like,
    robustness,
    score_correlation,
)
from mechscope.circuits.scores import Cost, EdgeScores
from mechscope.errors import DataError, SettingsError

SMALL, MEDIUM = Graph(1, 1), Graph(2, 2)


def cell_of(graph: Graph, edge: str) -> tuple[int, int, str]:
    """Work out an edge's cell from its name."""
    sender, _, receiver = edge.partition("->")
    kind = receiver[-2] if "<" in receiver else receiver[0]
    return graph.layer_of([sender])[0], graph.layer_of([receiver])[0], kind


def row(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


def noisy(graph: Graph, noise: float, texts: int, seed: int = 0) -> EdgeScores:
    random = np.random.default_rng(seed)
    per_text = random.normal(size=len(graph)) + noise * random.normal(size=(texts, len(graph)))
    return EdgeScores(graph, per_text.mean(0), per_text, "exact", Cost(1, 0))


def test_jaccard_is_what_is_shared_of_what_is_in_either() -> None:
    a = Circuit.of(SMALL, ["embed->m0", "m0->logits", "embed->logits"])
    b = Circuit.of(SMALL, ["embed->logits", "m0->logits", "embed->a0.h0<v>", "a0.h0->logits"])
    assert jaccard(a, b) == 2 / 5
    # m0 in both, the head in one; the input counts for nothing
    assert node_jaccard(a, b) == 1 / 2
    assert jaccard(a, a) == node_jaccard(a, a) == 1.0
    none, only_input = Circuit.empty(SMALL), Circuit.of(SMALL, ["embed->logits"])
    assert jaccard(none, none) == node_jaccard(none, only_input) == 1.0
    assert jaccard(none, a) == node_jaccard(none, a) == 0.0


def test_the_uniform_null_equals_going_through_all_circuits() -> None:
    a, b = (
        choose((SMALL, np.array(order, dtype=float)), number=size, prune=False)
        for order, size in (([8, 7, 6, *[1] * 5], 3), ([1, *[9] * 7], 5))
    )
    table = overlap(a, b).table
    pairs = [(set(first), set(second)) for first in combinations(range(8), 3) for second in combinations(range(8), 5)]
    values = np.sort([len(first & second) / len(first | second) for first, second in pairs])
    found = row(table, of="edges", null="uniform")
    assert (found.jaccard, found.shared, found["first"], found.second) == (2 / 6, 2, 3, 5)
    assert found.expected == pytest.approx(values.mean(), abs=1e-12)
    assert found.p == pytest.approx((values >= 2 / 6).mean(), abs=1e-12)
    assert found.low == pytest.approx(values[int(0.025 * len(values))], abs=1e-12)
    assert found.high == pytest.approx(values[int(0.975 * len(values))], abs=1e-12)


def test_the_uniform_null_agrees_with_random_circuits_and_with_scipy() -> None:
    graph = Graph(3, 4)
    a, b = random_circuits(graph, 90, number=1, seed=1)[0], random_circuits(graph, 60, number=1, seed=2)[0]
    found = row(overlap(a, b).table, of="edges", null="uniform")
    drawn = [
        jaccard(*pair)
        for pair in zip(random_circuits(graph, 90, number=3000, seed=3), random_circuits(graph, 60, number=3000, seed=4), strict=True)
    ]
    assert found.expected == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / np.sqrt(3000))
    law = hypergeom(len(graph), 90, 60)
    shared = np.arange(61)
    assert found.expected == pytest.approx(law.pmf(shared) @ (shared / (150 - shared)), rel=1e-9)
    assert found.p == pytest.approx(law.sf(found.shared - 1), rel=1e-9)
    assert [found.low, found.high] == pytest.approx([n / (150 - n) for n in law.ppf([0.025, 0.975])], rel=1e-12)


def test_chance_of_a_complete_overlap_of_two_edges() -> None:
    a = Circuit.of(SMALL, ["embed->m0", "m0->logits"])
    table = overlap(a, a, draws=4000).table
    assert row(table, of="edges", null="uniform").p == pytest.approx(1 / comb(8, 2), abs=1e-12)
    # each edge is alone in its cell but m0->logits, which could be a0.h0->logits in either
    matched = row(table, of="edges", null="layer-matched")
    assert matched.p == pytest.approx(1 / 2, abs=0.03)
    assert matched.expected == pytest.approx((1 + 1 / 3) / 2, abs=0.03)
    # m0 touched in both: of two nodes one, or the only MLP of its layer
    assert row(table, of="nodes", null="uniform").p == pytest.approx(1 / 2, abs=1e-12)
    assert row(table, of="nodes", null="layer-matched").p == 1.0


def test_cells_are_sender_layer_receiver_layer_and_what_is_read() -> None:
    for graph in (MEDIUM, Graph(3, 2, parallel=True)):
        by_number: dict[int, set[tuple[int, int, str]]] = {}
        for number, edge in zip(cells(graph), graph.names, strict=True):
            by_number.setdefault(int(number), set()).add(cell_of(graph, edge))
        assert all(len(found) == 1 for found in by_number.values())
        assert len(by_number) == len({cell_of(graph, edge) for edge in graph.names})


def test_layer_matched_circuits_keep_the_count_of_every_cell_and_nothing_else() -> None:
    graph = Graph(3, 4)
    circuit = choose((graph, np.random.default_rng(0).normal(size=len(graph))), number=80, prune=False)
    wanted = Counter(cell_of(graph, edge) for edge in circuit.names)
    drawn = random_like(circuit, number=400, seed=0)
    assert all(Counter(cell_of(graph, edge) for edge in one.names) == wanted for one in drawn)
    # within a cell every edge is as likely as any other: its share of the circuit's edges there
    size = Counter(cell_of(graph, edge) for edge in graph.names)
    expected = np.array([wanted[cell_of(graph, edge)] / size[cell_of(graph, edge)] for edge in graph.names])
    found = np.mean([one.edges for one in drawn], axis=0)
    assert np.abs(found - expected).max() < 4.5 * 0.5 / np.sqrt(400)
    np.testing.assert_array_equal(found[expected == 1], 1.0)
    np.testing.assert_array_equal(found[expected == 0], 0.0)


def test_the_layer_matched_null_is_that_of_layer_matched_circuits() -> None:
    graph = Graph(3, 4)
    random = np.random.default_rng(5)
    a, b = (choose((graph, random.normal(size=len(graph))), number=80, prune=False) for _ in range(2))
    found = row(overlap(a, b, draws=4000).table, of="edges", null="layer-matched")
    drawn = np.array(
        [jaccard(*pair) for pair in zip(random_like(a, number=2000, seed=1), random_like(b, number=2000, seed=2), strict=True)]
    )
    error = 4 * drawn.std() * np.sqrt(1 / 2000 + 1 / 4000)
    assert found.expected == pytest.approx(drawn.mean(), abs=error)
    assert found.p == pytest.approx((drawn >= found.jaccard).mean(), abs=4 * 0.5 * np.sqrt(1 / 2000 + 1 / 4000))
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.3 * drawn.std())


def test_circuits_that_prefer_the_same_layers_overlap_more_than_uniform_chance_only() -> None:
    # both are drawn at random from what leads from layer 1 to layer 2: nothing but the layers is shared
    graph = Graph(4, 4)
    places = [place for place, edge in enumerate(graph.names) if cell_of(graph, edge)[:2] == (1, 2)]
    assert (len(places), len(graph)) == (65, 479)
    random = np.random.default_rng(0)
    a, b = Circuit.empty(graph), Circuit.empty(graph)
    for circuit in (a, b):
        circuit.edges[random.choice(places, 30, replace=False)] = True
    table = overlap(a, b).table
    assert row(table, of="edges", null="uniform").p < 1e-3
    assert row(table, of="edges", null="layer-matched").p > 0.05


def test_the_observed_overlap_counts_among_the_draws() -> None:
    graph = Graph(3, 4)
    a = choose((graph, np.random.default_rng(0).normal(size=len(graph))), number=60, prune=False)
    assert row(overlap(a, a, draws=99).table, of="edges", null="layer-matched").p == 1 / 100


def test_the_null_of_nodes_redraws_heads_within_their_layer() -> None:
    # two of four heads of layer 1 in each circuit, and both MLPs: two shared at least, of six at most
    graph = Graph(2, 4)
    a, b = (Circuit.of(graph, ["m0->m1", *(f"m0->a1.h{head}<q>" for head in heads)]) for heads in ((0, 1), (1, 2)))
    found = row(overlap(a, b, draws=8000).table, of="nodes", null="layer-matched")
    chances = {2 / 6: 1 / 6, 3 / 5: 4 / 6, 1.0: 1 / 6}
    assert found.jaccard == 3 / 5
    assert found.expected == pytest.approx(sum(value * chance for value, chance in chances.items()), abs=0.01)
    assert found.p == pytest.approx(5 / 6, abs=0.02)


def test_random_circuits_have_their_size_and_every_edge_is_as_likely() -> None:
    drawn = random_circuits(MEDIUM, 10, number=2000, seed=0)
    assert {len(circuit) for circuit in drawn} == {10}
    share = np.mean([circuit.edges for circuit in drawn], axis=0)
    np.testing.assert_allclose(share, 10 / 46, atol=4.5 * np.sqrt(10 / 46 * 36 / 46 / 2000))


def test_a_seed_repeats_and_another_differs() -> None:
    a = random_circuits(MEDIUM, 20, number=1, seed=0)[0]
    b = random_circuits(MEDIUM, 20, number=1, seed=1)[0]
    assert random_circuits(MEDIUM, 20, number=3, seed=7) == random_circuits(MEDIUM, 20, number=3, seed=7)
    assert random_like(a, number=3, seed=7) == random_like(a, number=3, seed=7)
    assert random_like(a, number=1, seed=7) != random_like(a, number=1, seed=8)
    assert overlap(a, b, seed=3).table.equals(overlap(a, b, seed=3).table)
    assert not overlap(a, b, seed=3).table.equals(overlap(a, b, seed=4).table)
    scores = noisy(MEDIUM, 1.0, 20)
    first, same, other = (robustness(scores, number=12, resamples=20, seed=seed) for seed in (0, 0, 1))
    assert first.table.equals(same.table)
    assert not np.array_equal(first.inclusion, other.inclusion)


def test_without_noise_every_resample_finds_the_same_circuit() -> None:
    found = robustness(noisy(MEDIUM, 0.0, 12), number=14, rule="greedy", resamples=25)
    assert (found.table[["mean", "low", "high"]] == 1.0).all(axis=None)
    assert found.circuit == choose(noisy(MEDIUM, 0.0, 12), number=14, rule="greedy")
    np.testing.assert_array_equal(found.inclusion, found.circuit.edges)
    assert len(found.circuit) > 5
    # a threshold is in units of the metric, so half the texts must not halve the scores
    above = robustness(noisy(MEDIUM, 0.0, 13), rule="threshold", threshold=0.7, prune=False, resamples=5)
    assert (above.table["mean"] == 1.0).all()
    assert above.circuit == choose(noisy(MEDIUM, 0.0, 13), rule="threshold", threshold=0.7, prune=False)


def test_circuits_of_pure_noise_agree_between_halves_as_much_as_chance() -> None:
    graph = Graph(3, 4)
    per_text = np.random.default_rng(0).normal(size=(40, len(graph)))
    scores = EdgeScores(graph, per_text.mean(0), per_text, "noise", Cost(1, 0))
    table = robustness(scores, number=80, prune=False, resamples=60).table
    halves, whole = (row(table, comparison=name, of="edges") for name in ("half with half", "resample with whole"))
    # the halves of one sample repel each other a little: what one has by luck beyond the mean the other lacks
    assert halves["mean"] == pytest.approx(halves["null"], abs=0.04)
    assert halves.low < halves["null"] < halves.high
    # a resample shares texts with the whole: noise repeats itself
    assert whole["mean"] > halves["mean"] + 0.2
    # the same chance as `overlap` gives, not that of circuits drawn from all edges
    drawn = random_circuits(graph, 80, number=40, seed=1)
    tables = [overlap(*two, draws=50).table for two in itertools.pairwise(drawn)]
    matched = np.mean([row(table, of="edges", null="layer-matched")["expected"] for table in tables])
    assert halves["null"] == pytest.approx(matched, abs=0.01)


def test_more_noise_makes_circuits_less_alike() -> None:
    graph = Graph(3, 4)
    means = [
        row(robustness(noisy(graph, noise, 30), fraction=0.2, resamples=30).table, comparison="half with half", of="edges")
        for noise in (0.3, 3)
    ]
    assert 1 > means[0]["mean"] > means[1]["mean"] + 0.2 > means[1]["null"] + 0.2


def test_the_inclusion_of_an_edge_is_the_share_of_resamples_that_have_it() -> None:
    # embed->logits leads or trails with one text of two: it wins unless that text is never drawn
    graph = SMALL
    per_text = np.zeros((2, len(graph)))
    per_text[:, graph.index("embed->m0")] = per_text[:, graph.index("m0->logits")] = 1.0
    per_text[0, graph.index("embed->logits")] = 9.0
    found = robustness(EdgeScores(graph, per_text.mean(0), per_text, "exact", Cost(1, 0)), number=2, prune=False, resamples=800)
    assert found.inclusion[graph.index("embed->logits")] == pytest.approx(3 / 4, abs=0.06)
    assert found.inclusion[graph.index("embed->m0")] == 1.0
    assert found.inclusion[graph.index("m0->logits")] == pytest.approx(1 / 4, abs=0.06)
    # the two halves are the two texts: they share one edge of three, always
    np.testing.assert_array_equal(found.halves[:, 0], 1 / 3)


def test_seeds_are_compared_in_pairs_beside_chance() -> None:
    circuits = [
        Circuit.of(SMALL, names) for names in (["embed->m0", "m0->logits"], ["embed->m0", "embed->logits"], ["m0->logits", "embed->m0"])
    ]
    table = compare_seeds(circuits)
    assert table[["first", "second"]].to_numpy().tolist() == [[0, 1], [0, 2], [1, 2]]
    assert table.edges.tolist() == [1 / 3, 1.0, 1 / 3]
    assert table.nodes.tolist() == [1.0, 1.0, 1.0]
    for at, (first, second) in enumerate(((0, 1), (0, 2), (1, 2))):
        exact = overlap(circuits[first], circuits[second], draws=2000).table
        for of in ("edges", "nodes"):
            expected = row(exact, of=of, null="layer-matched")["expected"]
            assert table[f"{of}_null"].iloc[at] == pytest.approx(expected, abs=0.15)


def test_scores_are_correlated_by_rank_with_signs_over_edges_that_both_have() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, len(MEDIUM)))
    x[3], y[7] = np.nan, np.nan
    x[10:14] = 0.5
    both = ~np.isnan(x + y)
    assert score_correlation((MEDIUM, x), (MEDIUM, y)) == pytest.approx(spearmanr(x[both], y[both]).statistic, abs=1e-12)
    assert score_correlation((MEDIUM, x), (MEDIUM, np.exp(x))) == pytest.approx(1.0, abs=1e-12)
    assert score_correlation(EdgeScores(MEDIUM, -x, None, "eap", Cost(2, 1)), (MEDIUM, x)) == pytest.approx(-1.0, abs=1e-12)
    assert np.isnan(score_correlation((MEDIUM, x), (MEDIUM, np.ones(46))))
    assert np.isnan(score_correlation((MEDIUM, x), (MEDIUM, np.full(46, np.nan))))


def test_what_cannot_be_compared_is_refused_with_what_to_do() -> None:
    a, b = Circuit.full(SMALL), Circuit.full(MEDIUM)
    for compare in (jaccard, node_jaccard, overlap):
        with pytest.raises(SettingsError, match=r"circuits of Graph\(n_layers=1.*cannot be compared: both need one architecture"):
            compare(a, b)
    with pytest.raises(SettingsError, match="cannot be compared"):
        compare_seeds([a, b])
    with pytest.raises(SettingsError, match=r"scores of Graph.*cannot be compared"):
        score_correlation((SMALL, np.ones(8)), (MEDIUM, np.ones(46)))
    with pytest.raises(SettingsError, match="a null of 0 draws: give at least 1"):
        overlap(a, a, draws=0)
    with pytest.raises(SettingsError, match="1 circuits cannot be compared: give those of at least two seeds"):
        compare_seeds([a])
    with pytest.raises(SettingsError, match="random circuits of 9 edges: this graph has 8"):
        random_circuits(SMALL, 9, number=1, seed=0)


def test_robustness_needs_texts_and_resamples() -> None:
    with pytest.raises(DataError, match="the scores of 'pruning' keep none of every text"):
        robustness(EdgeScores(SMALL, np.ones(8), None, "pruning", Cost(1, 1)), number=2)
    with pytest.raises(DataError, match="found on 1 text: at least 2 are needed"):
        robustness(noisy(SMALL, 1.0, 1), number=2)
    with pytest.raises(SettingsError, match="over 0 resamples: give at least 1"):
        robustness(noisy(SMALL, 1.0, 4), number=2, resamples=0)
    with pytest.raises(SettingsError, match="a circuit of 9 edges"):
        robustness(noisy(SMALL, 1.0, 4), number=9)
