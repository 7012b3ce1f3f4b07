"""Completeness finds what a circuit lacks, minimality what it could do without; both are exactly 0 where nothing differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.circuits import criteria
from mechscope.circuits.criteria import completeness, minimality
from mechscope.circuits.evaluation import Evaluated, evaluate
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.overlap import random_circuits
from mechscope.circuits.scores import Cost
from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.subject.load import load
from tests import families
from tests.causal.pairs import random_pairs
from tests.circuits import planted
from tests.circuits.brute import TOLERANCE

TEXTS = random_pairs(6)
SMALL = Graph(2, 3)
# heads that do the same work, each by one path
ALIKE = ("a0.h0", "a1.h1", "a1.h2")
NOBODY: Any = None


def path(node: str) -> tuple[str, str]:
    return f"embed->{node}<v>", f"{node}->logits"


def works(circuit: Circuit, node: str) -> bool:
    return all(circuit.edges[SMALL.index(edge)] for edge in path(node))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Circuit], float]], None]:
    """Let the metric be a function of the circuit, times a factor of each text that is 1 on average."""

    def set_to(value: Callable[[Circuit], float]) -> None:
        def fake(subject: Any, pairs: Sequence[Any], circuits: Sequence[Circuit], *, metric: str, **_: Any) -> Evaluated:
            texts = 1 + 0.1 * np.linspace(-1, 1, len(pairs))
            of = [value(circuit) for circuit in (*circuits, Circuit.full(SMALL), Circuit.empty(SMALL))]
            *values, clean, empty = np.array(of)[:, None] * texts
            return Evaluated(np.stack(values), clean, empty, metric, Cost(len(circuits) + 2, 0))

        monkeypatch.setattr(criteria, "evaluate", fake)

    return set_to


def any_of(nodes: Sequence[str]) -> Callable[[Circuit], float]:
    return lambda circuit: float(any(works(circuit, node) for node in nodes))


def test_a_circuit_that_lacks_a_backup_is_faithful_but_not_complete(world: Any) -> None:
    world(any_of(ALIKE[:2]))
    found = completeness(NOBODY, TEXTS, Circuit.of(SMALL, path("a0.h0")), random=4, greedy=0).table
    assert found["gap"][0] == 0  # beside no set: it is as good as the model
    assert list(found["component"][1:]) == ["a0.h0"] * 4
    np.testing.assert_allclose(found["gap"][1:], -1, rtol=1e-12)
    np.testing.assert_allclose(found[["incompleteness", "normalised"]][1:], 1, rtol=1e-12)
    np.testing.assert_allclose(found[["circuit", "model"]].iloc[1], [0, 1], rtol=1e-12)
    whole = completeness(NOBODY, TEXTS, Circuit.of(SMALL, [*path("a0.h0"), *path("a1.h1")]), random=10, greedy=2)
    np.testing.assert_array_equal(whole.gaps, 0)


def test_greedy_sets_grow_by_the_node_that_widens_the_gap_most(world: Any) -> None:
    world(lambda circuit: 1 - 0.5 ** sum(works(circuit, node) for node in ALIKE))
    others = [edge for node in ("a0.h1", "a0.h2", "a1.h0") for edge in path(node)]
    circuit = Circuit.of(SMALL, [*path("a0.h0"), *path("a1.h1"), *others])
    found = completeness(NOBODY, TEXTS, circuit, random=0, greedy=2, steps=3, candidates=5)
    greedy = found.table[found.table["found"] == "greedy"]
    assert list(greedy["size"]) == [1, 1, 2, 2, 3, 3]
    # the third of the three is not in the circuit: 3/4 against 7/8, then 1/2 against 3/4, then 0 against 1/2
    np.testing.assert_allclose(found.table["gap"], [-1 / 8, *[-1 / 4] * 2, *[-1 / 2] * 4], rtol=1e-12)
    assert list(greedy["component"])[2:4] == ["a0.h0,a1.h1"] * 2
    # one set without, two runs times five, four and three candidates, each in circuit and model; and the two plain runs of each of the four calls
    assert found.cost.forward == 2 * (1 + 2 * (5 + 4 + 3)) + 4 * 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_whole_model_is_complete(family: str) -> None:
    subject = families.subject(family, torch.float64)
    found = completeness(subject, TEXTS, Circuit.full(Graph.of(subject)), random=6, greedy=1, steps=2, candidates=3)
    np.testing.assert_array_equal(found.gaps, 0)
    assert found.table["size"].max() > 3
    assert np.ptp(found.table["model"]) > 1e-3  # though the sets matter


def test_gaps_are_those_of_the_circuits_named_and_their_intervals_hold_the_value() -> None:
    subject = families.subject("gpt2", torch.float64)
    graph = Graph.of(subject)
    circuit = random_circuits(graph, 150, number=1, seed=0)[0]
    found = completeness(subject, TEXTS, circuit, random=4, greedy=1, steps=2, candidates=3, metric="kl", execution=Execution(seed=5))
    rows: Any = found.table.itertuples()
    for row, gaps in zip(rows, found.gaps, strict=True):
        nodes = [node for node in row.component.split(",") if node]
        direct = evaluate(subject, TEXTS, [circuit.without(nodes), Circuit.full(graph).without(nodes)], metric="kl")
        np.testing.assert_allclose(gaps, direct.values[0] - direct.values[1], rtol=1e-9, atol=1e-9)
        assert row.incompleteness == pytest.approx(abs(gaps.mean()), rel=1e-9)
        assert row.normalised == pytest.approx(abs(gaps.mean() / (direct.clean - direct.empty).mean()), rel=1e-9)
        assert row.low < row.gap < row.high
        assert 0 <= row.normalised_low <= row.normalised <= row.normalised_high
    assert set(found.table["found"]) == {"none", "random", "greedy"}
    again = completeness(subject, TEXTS, circuit, random=4, greedy=1, steps=2, candidates=3, metric="kl", execution=Execution(seed=5))
    assert again.table.equals(found.table)


def test_a_node_with_a_double_matters_beside_its_double_only_and_a_superfluous_one_never(world: Any) -> None:
    world(any_of(ALIKE[:2]))
    circuit = Circuit.of(SMALL, [*path("a0.h0"), *path("a1.h1"), *path("a0.h2")])
    alone = minimality(NOBODY, TEXTS, circuit, random=0).table
    np.testing.assert_array_equal(alone["minimality"], 0)
    np.testing.assert_array_equal(alone["p"], 1)
    found = minimality(NOBODY, TEXTS, circuit, sets=[["a0.h0", "a1.h1"]], random=0, controls=50).table.set_index("component")
    assert list(found.index) == ["a0.h0", "a0.h2", "a1.h1"]
    assert found["beside"].to_dict() == {"a0.h0": "a1.h1", "a0.h2": "", "a1.h1": "a0.h0"}
    np.testing.assert_allclose(found["change"], [-1, 0, -1], rtol=1e-12)
    np.testing.assert_allclose(found["normalised"], [1, 0, 1], rtol=1e-12)
    np.testing.assert_allclose(found["p"], [1 / 51, 1, 1 / 51], rtol=1e-12)
    np.testing.assert_allclose(found["q"], [1.5 / 51, 1, 1.5 / 51], rtol=1e-12)
    assert list(found["edges"]) == [2, 2, 2]


def test_superfluous_parts_are_new_edges_at_one_node_no_more_than_a_node_of_the_circuit_has(world: Any) -> None:
    world(lambda circuit: float(len(circuit)))
    circuit = random_circuits(SMALL, len(SMALL) // 2, number=1, seed=1)[0]
    found = minimality(NOBODY, TEXTS, circuit, random=0, controls=40)
    # this metric counts edges, and all of a part's are new
    np.testing.assert_allclose(found.controls, found.controls.round(), atol=1e-9)
    assert found.controls.min() >= 1
    assert found.controls.max() <= found.table["edges"].max()
    np.testing.assert_allclose(found.table["minimality"], found.table["edges"], rtol=1e-12)
    larger = (found.controls[None] >= found.table["edges"].to_numpy()[:, None] - 1e-9).sum(1)
    np.testing.assert_allclose(found.table["p"], (1 + larger) / 41, rtol=1e-12)
    nearly_all = random_circuits(SMALL, len(SMALL) - 4, number=1, seed=1)[0]
    assert minimality(NOBODY, TEXTS, nearly_all, random=0, controls=40).controls.min() > 0.99
    # where nodes are outside the circuit, a part brings one of them, on a path from the input to the logits
    world(lambda circuit: float(circuit.pruned().nodes.sum()))
    two_paths = Circuit.of(SMALL, [*path("a0.h0"), *path("a1.h1")])
    np.testing.assert_allclose(minimality(NOBODY, TEXTS, two_paths, random=0, controls=20).controls, 1, rtol=1e-12)


def test_the_whole_model_has_no_superfluous_part_to_compare_with(world: Any) -> None:
    world(lambda circuit: float(len(circuit)))
    found = minimality(NOBODY, TEXTS, Circuit.full(SMALL), random=0)
    assert found.table[["p", "q", "control"]].isna().all(axis=None)
    assert "nothing superfluous can be added" in found.notes["controls"]


def test_a_part_that_writes_nothing_is_exactly_unneeded_and_the_others_changes_are_those_of_the_circuits_named() -> None:
    model = families.build("gpt2", torch.float64)
    subject = load(model)
    block = subject.anatomy.blocks[1]
    with torch.no_grad():
        block.output.weight(2).zero_()
        for parameter in block.mlp_down.parameters():
            parameter.zero_()
    graph = Graph.of(subject)
    circuit = random_circuits(graph, 200, number=1, seed=0)[0].without(["a2.h3"])
    found = minimality(subject, TEXTS, circuit, random=2, controls=8, metric="kl")
    table = found.table.set_index("component")
    for node in ("a1.h2", "m1"):
        assert dict(table["minimality"])[node] == 0
        assert dict(table["p"])[node] == 1
        assert dict(table["edges"])[node] > 5
    assert (table["minimality"] > 0).sum() == len(table) - 2
    assert "a2.h3" not in table.index
    assert (found.controls > 0).all()
    for name, row in table.iterrows():
        beside = [other for other in row["beside"].split(",") if other]
        with_it, without_it = evaluate(subject, TEXTS, [circuit.without(beside), circuit.without([*beside, str(name)])], metric="kl").values
        np.testing.assert_allclose(row["change"], (without_it - with_it).mean(), rtol=1e-9, atol=1e-12)
    assert all(set(taken) <= set(table.index) for taken in found.notes["sets"])


def test_a_planted_circuit_passes_both_and_a_missing_and_a_superfluous_part_are_told_apart() -> None:
    known = planted.backup()
    graph = Graph.of(known.subject)
    truth = Circuit.of(graph, known.truth)
    lacking = truth.without(["a0.h1"])
    name, edges = known.superfluous
    larger = truth | Circuit.of(graph, edges)
    # two heads fetch the same feature and either is enough: lacking one, a circuit does what the model does, until the head that it has is taken from both
    assert completeness(known.subject, known.pairs, truth, random=8, greedy=0).table["normalised"].max() < 0.15
    found = completeness(known.subject, known.pairs, lacking, random=0, greedy=1, steps=1).table
    assert found["normalised"][0] < 0.15
    assert found["normalised"][1] > 0.8
    assert found["component"][1] == "a0.h0"
    minimal = minimality(known.subject, known.pairs, larger, sets=[["a0.h0"], ["a0.h1"]], random=0, controls=100).table.set_index(
        "component"
    )
    q, size = dict(minimal["q"]), dict(minimal["normalised"])
    for node in ("a0.h0", "a0.h1", "m1"):
        assert q[node] < 0.05
        assert size[node] > 0.8
    assert q[name] > 0.1
    assert size[name] < 0.15


def test_what_cannot_be_judged_is_refused() -> None:
    subject = families.subject("gpt2", torch.float64)
    graph = Graph.of(subject)
    for criterion in (completeness, minimality):
        with pytest.raises(SettingsError, match="has nothing to take away"):
            criterion(subject, TEXTS, Circuit.of(graph, ["embed->logits"]))
    with pytest.raises(SettingsError, match=r"node 'a1\.h1' of the given sets is not a head or MLP of the circuit, which has a0\.h0"):
        minimality(subject, TEXTS, Circuit.of(graph, path("a0.h0")), sets=[["a1.h1"]])


def test_the_notes_say_how_small_q_can_be(world: Any) -> None:
    # all that is in the circuit matters, what is added to it does not
    circuit = Circuit.of(SMALL, [edge for node in ALIKE for edge in path(node)])
    world(lambda one: float(sum(3 * works(one, node) for node in ALIKE)))
    for controls, least in (
        (9, "for none of the 3"),
        (20, "for none or for at least 3 of the 3"),
        (60, "for none or for at least 1 of the 3"),
    ):
        found = minimality(NOBODY, TEXTS, circuit, random=0, controls=controls)
        assert least in found.notes["q"]
        assert (found.table["p"] == 1 / (controls + 1)).all()
        assert (found.table["q"] < 0.05).all() == (controls > 19)


@pytest.mark.parametrize("family", ["llama"])
def test_a_family_with_grouped_keys_is_judged_alike(family: str) -> None:
    subject = families.subject(family, torch.float64)
    graph = Graph.of(subject)
    circuit = random_circuits(graph, 150, number=1, seed=2)[0]
    found = minimality(subject, TEXTS, circuit, random=0, controls=3, metric="kl").table
    row = found.set_index("component").loc["a1.h1"]
    direct = evaluate(subject, TEXTS, [circuit, circuit.without(["a1.h1"])], metric="kl").values.mean(1)
    assert row["change"] == pytest.approx(direct[1] - direct[0], rel=TOLERANCE[family], abs=TOLERANCE[family])
