"""Circuits are the edges that the rule says, ties, signs, dead ends and budgets included."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mechscope.circuits.choosing import MIB_FRACTIONS, choose, fractions_curve
from mechscope.circuits.graph import Circuit, Graph, edges_at
from mechscope.circuits.overlap import robustness
from mechscope.circuits.scores import Cost, EdgeScores
from mechscope.errors import DataError, SettingsError
from tests.slips import slip

SMALL, MEDIUM = Graph(1, 1), Graph(2, 2)


def by_name(graph: Graph, scores: dict[str, float]) -> tuple[Graph, np.ndarray]:
    """Score some edges, and all others 0."""
    values = np.zeros(len(graph))
    for name, value in scores.items():
        values[graph.index(name)] = value
    return graph, values


def naive_greedy(graph: Graph, strength: np.ndarray, number: int) -> list[int]:
    """Look at every edge again before each step."""
    inside, taken = {len(graph.senders)}, []
    for _ in range(number):
        open_ = [edge for edge in range(len(graph)) if edge not in taken and graph.owner[graph.edges[edge, 1]] in inside]
        open_ = [edge for edge in open_ if not np.isnan(strength[edge])]
        if not open_:
            break
        best = max(open_, key=lambda edge: (strength[edge], -edge))
        taken.append(best)
        inside.add(int(graph.edges[best, 0]))
    return taken


def test_the_strongest_edges_are_taken_whatever_their_sign() -> None:
    scores = by_name(SMALL, {"embed->logits": 0.5, "embed->m0": -3.0, "m0->logits": 2.0, "a0.h0->logits": -1.0})
    assert choose(scores, number=2).names == ("embed->m0", "m0->logits")
    assert choose(scores, number=3, prune=False).names == ("embed->m0", "a0.h0->logits", "m0->logits")


def test_a_tie_goes_to_the_edge_that_comes_first() -> None:
    equal = SMALL, np.full(len(SMALL), -1.0)
    assert choose(equal, number=3, prune=False).names == SMALL.names[:3]
    # embed->logits stands before a0.h0->logits, and only then is there more to take
    assert choose(equal, rule="greedy", number=1).names == ("embed->logits",)


def test_a_fraction_counts_all_edges_rounds_and_takes_at_least_one() -> None:
    scores = MEDIUM, np.arange(len(MEDIUM)) + 1.0
    assert [len(choose(scores, fraction=f, prune=False)) for f in (1e-9, 0.04, 0.5, 1.0)] == [1, 2, 23, 46]


def test_a_threshold_takes_what_exceeds_it_and_not_what_equals_it() -> None:
    scores = by_name(SMALL, {"embed->m0": -2.0, "m0->logits": 1.0, "embed->logits": 1.5})
    assert choose(scores, rule="threshold", threshold=1.0, prune=False).names == ("embed->m0", "embed->logits")
    assert choose(scores, rule="threshold", threshold=0.0) == Circuit.of(SMALL, ["embed->m0", "m0->logits", "embed->logits"])


def test_helpful_means_that_the_metric_gets_worse_without_the_edge() -> None:
    scores = by_name(SMALL, {"embed->logits": -1.0, "embed->m0": -2.0, "m0->logits": 3.0})
    assert choose(scores, number=1, prune=False, sign="helpful", higher_is_better=True).names == ("embed->m0",)
    assert choose(scores, number=1, prune=False, sign="helpful", higher_is_better=False).names == ("m0->logits",)
    above = choose(scores, rule="threshold", threshold=0.0, prune=False, sign="helpful", higher_is_better=True)
    assert above.names == ("embed->m0", "embed->logits")


def test_harmful_edges_come_last_so_that_the_whole_model_is_still_the_end_of_the_curve() -> None:
    values = np.random.default_rng(0).normal(size=len(MEDIUM))
    *_, most, all_ = fractions_curve((MEDIUM, values), (0.5, 45 / 46, 1.0), sign="helpful", higher_is_better=True, prune=False)
    assert all_ == Circuit.full(MEDIUM)
    assert (all_ - most).names == (MEDIUM.names[int(values.argmax())],)


def test_an_edge_without_a_score_is_never_taken() -> None:
    values = np.random.default_rng(0).normal(size=len(MEDIUM))
    values[::3] = np.nan
    for options in ({"rule": "top"}, {"rule": "greedy"}, {"rule": "top", "sign": "helpful", "higher_is_better": False}):
        found = choose((MEDIUM, values), fraction=1.0, prune=False, **options)
        assert not found.edges[::3].any()
    assert choose((MEDIUM, values), fraction=1.0, prune=False).edges.sum() == (~np.isnan(values)).sum()
    assert not choose((MEDIUM, values), rule="threshold", threshold=-1.0, prune=False).edges[::3].any()


@pytest.mark.parametrize("graph", [Graph(1, 1), Graph(2, 2), Graph(3, 2, parallel=True)], ids=str)
def test_greedy_equals_looking_at_every_edge_before_every_step(graph: Graph) -> None:
    for seed in range(8):
        random = np.random.default_rng(seed)
        values = random.integers(-4, 5, size=len(graph)).astype(float)  # many ties
        values[random.random(len(graph)) < 0.2] = np.nan
        for number in (1, 4, int((~np.isnan(values)).sum())):
            expected = np.zeros(len(graph), dtype=bool)
            expected[naive_greedy(graph, np.abs(values), number)] = True
            np.testing.assert_array_equal(choose((graph, values), rule="greedy", number=number, prune=False).edges, expected)


def test_greedy_follows_paths_that_top_does_not_see() -> None:
    # the strongest edge leads into an MLP that hardly writes to anything
    scores = by_name(SMALL, {"embed->m0": 9.0, "embed->logits": 1.0, "a0.h0->logits": 3.0, "embed->a0.h0<v>": 2.0, "m0->logits": 0.5})
    assert choose(scores, rule="greedy", number=2).names == ("embed->a0.h0<v>", "a0.h0->logits")
    assert choose(scores, rule="top", number=2).names == ()


def test_every_edge_of_a_greedy_circuit_leads_to_the_logits() -> None:
    values = np.random.default_rng(1).normal(size=len(MEDIUM))
    circuit = choose((MEDIUM, values), rule="greedy", number=12, prune=False)
    into = set(MEDIUM.owner[MEDIUM.edges[circuit.edges, 1]].tolist()) - {len(MEDIUM.senders)}
    assert into <= set(MEDIUM.edges[circuit.edges, 0].tolist())


def test_the_budget_counts_edges_before_pruning_unless_it_is_to_be_filled() -> None:
    scores = by_name(SMALL, {"embed->a0.h0<k>": 5.0, "embed->a0.h0<q>": 4.0, "embed->m0": 3.0, "m0->logits": 2.0, "a0.h0->logits": 1.0})
    assert choose(scores, number=2).names == ()
    assert choose(scores, number=2, fill=True).names == ("embed->m0", "m0->logits")
    # the fifth edge revives both edges into the head: five are one more than four, so two it stays
    assert choose(scores, number=4, fill=True).names == ("embed->m0", "m0->logits")
    assert len(choose(scores, number=5, fill=True)) == 5


@pytest.mark.parametrize("rule", ["top", "greedy"])
def test_a_filled_circuit_is_the_largest_that_fits(rule: Any) -> None:
    for seed in range(5):
        scores = MEDIUM, np.random.default_rng(seed).normal(size=len(MEDIUM))
        pruned = [len(choose(scores, rule=rule, number=number)) for number in range(1, len(MEDIUM) + 1)]
        for budget in (1, 5, 20, 40):
            assert len(choose(scores, rule=rule, number=budget, fill=True)) == max([size for size in pruned if size <= budget])


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("rule", ["top", "greedy"])
def test_the_circuits_of_a_curve_are_nested_and_end_with_the_model(rule: Any, fill: bool) -> None:
    graph = Graph(3, 3)
    scores = graph, np.random.default_rng(2).normal(size=len(graph))
    curve = fractions_curve(scores, rule=rule, fill=fill)
    assert len(curve) == len(MIB_FRACTIONS)
    for small, large in pairwise(curve):
        assert len(small - large) == 0
    assert curve[-1] == Circuit.full(graph)
    assert 0 < len(curve[-3]) < len(curve[-2])
    assert curve == [choose(scores, rule=rule, fraction=fraction, fill=fill) for fraction in MIB_FRACTIONS]


def test_nodes_are_chosen_by_the_sum_of_what_leaves_them() -> None:
    # a0.h1's edges are each stronger than m0's but cancel
    values = {"a0.h1->m1": 5.0, "a0.h1->logits": -5.0, "m0->m1": 1.0, "m0->logits": 1.0, "embed->logits": 100.0}
    circuit = choose(by_name(MEDIUM, values), by="nodes", number=1)
    assert circuit.names == ("embed->m0", "embed->logits", "m0->logits")
    everything_but_m0 = [name for name in MEDIUM.senders[1:] if name != "m0"]
    assert circuit == Circuit.full(MEDIUM).without(everything_but_m0)


def test_nodes_can_have_scores_of_their_own_and_the_input_takes_no_place() -> None:
    strengths = np.array([50.0, 1.0, -7.0, np.nan, 2.0, 0.5, 3.0])
    circuit = choose((MEDIUM, strengths), by="nodes", number=2)
    assert [name for name, inside in zip(MEDIUM.senders, circuit.nodes, strict=True) if inside] == ["embed", "a0.h1", "m1"]
    assert circuit == Circuit.full(MEDIUM).without(["a0.h0", "m0", "a1.h0", "a1.h1"])
    half = choose((MEDIUM, strengths), by="nodes", fraction=0.5)
    assert (half.edges & ~edges_at(MEDIUM, ["a1.h0"])).sum() == len(circuit)
    assert half.nodes.sum() == 4
    # of the six heads and MLPs a quarter rounds to two
    assert fractions_curve((MEDIUM, strengths), (0.25, 0.5), by="nodes") == [circuit, half]
    above = choose((MEDIUM, strengths), by="nodes", rule="threshold", threshold=2.5)
    assert above == circuit


def test_a_node_with_an_unscored_edge_has_no_score() -> None:
    scores = by_name(SMALL, {"m0->logits": 1.0, "a0.h0->m0": 9.0, "a0.h0->logits": np.nan})
    assert choose(scores, by="nodes", number=1).components().mlps == (0,)
    with pytest.raises(SettingsError, match=r"this graph has 2, of which 1 have a score; ask for 1 to 1"):
        choose(scores, by="nodes", number=2)


def test_scores_of_a_method_are_taken_as_they_are() -> None:
    graph, values = MEDIUM, np.random.default_rng(3).normal(size=len(MEDIUM)).astype(np.float32)
    assert choose(EdgeScores(graph, values, None, "eap", Cost(2, 1)), number=9) == choose((graph, values), number=9)


def test_greedy_of_gpt2_small_takes_less_than_a_second() -> None:
    graph = Graph(12, 12)
    scores = graph, np.random.default_rng(0).normal(size=len(graph))
    assert len(graph) == 32491
    start = time.process_time()
    circuit = choose(scores, rule="greedy", fraction=1.0)
    assert time.process_time() - start < 1
    assert circuit == Circuit.full(graph)


@pytest.mark.parametrize("method", ["flow-routes", "acdc", "edge-pruning"])
def test_what_helps_is_not_asked_of_scores_that_only_say_how_important_an_edge_is(method: str) -> None:
    values = np.arange(len(MEDIUM)) + 1.0
    unsigned = EdgeScores(MEDIUM, values, np.stack([values, values]), method, Cost(1, 0))
    assert not unsigned.signed
    helpful: dict[str, Any] = {"fraction": 0.2, "sign": "helpful", "higher_is_better": True}
    for choice in (lambda: choose(unsigned, **helpful), lambda: robustness(unsigned, resamples=2, **helpful)):
        with pytest.raises(SettingsError, match=f"'{method}' only say how important an edge is: use sign='absolute'"):
            choice()
    with pytest.raises(SettingsError, match=method):
        fractions_curve(unsigned, (0.2, 1.0), sign="helpful", higher_is_better=False)
    signed = EdgeScores(MEDIUM, values, None, "eap", Cost(2, 1))
    assert signed.signed
    # closing an edge raises this metric, so the weakest of them helps most
    assert choose(signed, prune=False, **helpful).names == MEDIUM.names[: round(0.2 * len(MEDIUM))]
    assert choose(unsigned, prune=False, fraction=0.2).names == MEDIUM.names[-round(0.2 * len(MEDIUM)) :]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "rule 'top' needs either a number or a fraction, not none of them"),
        ({"number": 3, "fraction": 0.5}, "not number=3, fraction=0.5"),
        ({"number": 3, "threshold": 0.5}, "needs either a number or a fraction, not number=3, threshold=0.5"),
        ({"rule": "greedy"}, "rule 'greedy' needs either"),
        ({"number": 47}, "a circuit of 47 edges: this graph has 46, of which 46 have a score; ask for 1 to 46"),
        ({"number": 0}, "a circuit of 0 edges"),
        ({"fraction": 0.0}, "a fraction of 0.0: give a share above 0 and at most 1"),
        ({"fraction": 2.0}, "a fraction of 2.0"),
        ({"fraction": float("nan")}, "a fraction of nan"),
        ({"rule": "threshold", "threshold": float("nan")}, "needs a threshold and nothing else, not threshold=nan"),
        ({"rule": "threshold"}, "needs a threshold and nothing else, not none of them"),
        ({"rule": "threshold", "threshold": 1.0, "number": 2}, "not number=2, threshold=1.0"),
        ({"rule": "best", "number": 2}, "rule 'best' is not known: use one of top, threshold, greedy"),
        ({"by": "heads", "number": 2}, "by 'heads' is not known: use one of edges, nodes"),
        ({"sign": "positive", "number": 2}, "sign 'positive' is not known: use one of absolute, helpful"),
        ({"sign": "helpful", "number": 2}, "needs higher_is_better: true for logit-diff"),
        ({"rule": "greedy", "by": "nodes", "number": 2}, "grows edge by edge"),
        ({"fill": True, "prune": False, "number": 2}, "fill=True replaces what pruning removed"),
        ({"fill": True, "by": "nodes", "number": 2}, "fill=True replaces what pruning removed"),
        ({"fill": True, "rule": "threshold", "threshold": 2.0}, "fill=True replaces what pruning removed"),
    ],
)
def test_an_impossible_choice_is_refused_with_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        choose((MEDIUM, np.ones(len(MEDIUM))), **options)


def test_scores_that_are_not_of_the_graph_are_refused() -> None:
    with pytest.raises(DataError, match=r"scores of shape \(7,\): this graph has 46 edges"):
        choose((MEDIUM, np.ones(7)), number=1)
    with pytest.raises(DataError, match=r"takes 46 for its edges or 7 for its senders"):
        choose((MEDIUM, np.ones(8)), by="nodes", number=1)
    with pytest.raises(DataError, match="none of the edges has a score"):
        choose((MEDIUM, np.full(46, np.nan)), number=1)
    with pytest.raises(SettingsError, match="rule 'threshold' has no curve over fractions"):
        fractions_curve((MEDIUM, np.ones(46)), rule=slip("threshold"))
    with pytest.raises(SettingsError, match=r"a fraction of 1.5"):
        fractions_curve((MEDIUM, np.ones(46)), (0.5, 1.5))
