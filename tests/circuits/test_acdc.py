"""ACDC takes away what does nothing, keeps what does something, and decides edge by edge as the paper's algorithm does."""

from __future__ import annotations

import importlib
import math
from functools import lru_cache

import numpy as np
import pytest
import torch

from mechscope.circuits.acdc import acdc
from mechscope.circuits.forward import CircuitRuns
from mechscope.circuits.graph import Circuit, Graph
from mechscope.data.pairs import Pairs, collate_pairs
from mechscope.errors import DataError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.subject.load import Subject, load
from tests import families
from tests.causal.pairs import random_pairs
from tests.circuits import planted

# the changed tokens are among those whose prediction is scored, so that every edge matters
PAIRS = random_pairs(3, lengths=(7, 8, 7))
IDLE = "a0.h1"


@lru_cache
def small(idle: bool = False, family: str = "gpt2") -> Subject:
    """Return a model of two layers with two heads; head 0.1 of GPT-2 writes nothing if idle."""
    sizes = {"n_layer": 2, "n_head": 2} if family == "gpt2" else {"num_hidden_layers": 2, "num_attention_heads": 2}
    model = families.build(family, torch.float64, **sizes)
    if idle:
        width = families.WIDTH // 2
        with torch.no_grad():
            model.transformer.h[0].attn.c_proj.weight[width:] = 0
    return load(model)


def touches(name: str, edge: str) -> bool:
    """Tell whether an edge begins or ends at a head."""
    sender, _, receiver = edge.partition("->")
    return sender == name or receiver.startswith(f"{name}<")


def one_by_one(subject: Subject, pairs: Pairs, threshold: float, metric: str) -> set[str]:
    """Follow the algorithm with names, one edge at a time."""
    runs = CircuitRuns(subject, collate_pairs(list(pairs)), metric)
    graph = runs.graph

    def value(names: set[str]) -> float:
        edges = torch.tensor([[name in names for name in graph.names]])
        return runs.run(edges).mean().item()

    kept, now = set(graph.names), value(set(graph.names))
    receivers = ["logits"]
    for layer in (1, 0):
        receivers += [f"m{layer}", *(f"a{layer}.h{head}<{part}>" for part in "qkv" for head in (1, 0))]
    for receiver in receivers:
        owner = receiver.partition("<")[0]
        read_by_anyone = receiver == "logits" or any(name.startswith(f"{owner}->") for name in kept)
        for sender in ("m1", "a1.h1", "a1.h0", "m0", "a0.h1", "a0.h0", "embed"):
            edge = f"{sender}->{receiver}"
            if edge not in graph.names:
                continue
            after = value(kept - {edge}) if read_by_anyone else now
            change = after - now if metric == "kl" else abs(after - now)
            if not read_by_anyone or change < threshold:
                kept, now = kept - {edge}, after
    return kept


@pytest.mark.parametrize(("family", "metric"), [("gpt2", "kl"), ("gpt2", "loss"), ("gpt_neox", "logit-diff")])
def test_the_sweep_decides_as_a_search_one_edge_at_a_time_does(family: str, metric: str) -> None:
    subject = small(family=family)
    thresholds = (0.003, 0.02, 0.1)
    found = acdc(subject, PAIRS, thresholds=thresholds, metric=metric, execution=Execution(tokens_per_batch=8))
    sizes = []
    for threshold in thresholds:
        expected = one_by_one(subject, PAIRS, threshold, metric)
        assert set(found[threshold].names) == expected
        sizes.append(len(expected))
    assert len(set(sizes)) == 3  # the thresholds are told apart


def test_just_above_zero_exactly_the_edges_of_an_idle_head_go() -> None:
    found = acdc(small(idle=True), PAIRS, thresholds=[1e-11])
    gone = {name for name in found.scores.graph.names if name not in found.circuits[0].names}
    assert gone == {name for name in found.scores.graph.names if touches(IDLE, name)}
    assert found.values[0] == pytest.approx(0, abs=1e-12)  # KL to the whole model, rounding apart


def test_a_planted_circuit_is_found() -> None:
    model = planted.induction()
    found = acdc(model.subject, model.pairs.first(4), thresholds=[0.01, 0.1])
    assert [set(circuit.names) for circuit in found.circuits] == [set(model.truth)] * 2


def test_threshold_zero_keeps_everything_and_infinity_nothing_and_neither_needs_a_trial() -> None:
    pairs = PAIRS
    found = acdc(small(idle=True), pairs, thresholds=[math.inf, 0.0], metric="loss")
    graph = found.scores.graph
    assert found.thresholds == (0.0, math.inf)
    assert found.circuits == (Circuit.full(graph), Circuit.empty(graph))
    assert found.scores.notes["trials"] == 1  # the value of the empty circuit
    runs = CircuitRuns(small(idle=True), collate_pairs(list(pairs)), "loss")
    np.testing.assert_allclose(found.values, [runs.clean.mean().item(), runs.corrupt.mean().item()], rtol=0, atol=1e-9)


def test_the_value_of_a_circuit_is_what_running_it_gives() -> None:
    subject = small()
    found = acdc(subject, PAIRS, thresholds=[0.01, 0.1, 1.0], metric="loss", execution=Execution(tokens_per_batch=8))
    runs = CircuitRuns(subject, collate_pairs(list(PAIRS)), "loss")
    sets = torch.from_numpy(np.stack([circuit.edges for circuit in found.circuits]))
    np.testing.assert_allclose(found.values, runs.run(sets).mean(1).numpy(), rtol=0, atol=1e-9)
    assert found.clean == pytest.approx(runs.clean.mean().item(), abs=1e-9)
    table = found.table()
    assert list(table.edges) == [len(circuit) for circuit in found.circuits]
    np.testing.assert_allclose(table.change, found.values - found.clean, rtol=0, atol=1e-12)


def test_thresholds_side_by_side_find_what_each_finds_alone_with_fewer_trials() -> None:
    subject, thresholds = small(), [0.001, 0.01, 0.05]
    together = acdc(subject, PAIRS, thresholds=thresholds)
    alone = [acdc(subject, PAIRS, thresholds=[threshold]) for threshold in thresholds]
    for threshold, one in zip(thresholds, alone, strict=True):
        assert together[threshold] == one.circuits[0]
    apart = sum(one.scores.notes["trials"] for one in alone)
    assert together.scores.notes["trials"] < apart


def test_a_decision_looks_at_all_texts_and_not_at_one_batch() -> None:
    subject, order = small(), Pairs(PAIRS.pairs[::-1], "turned")
    whole = acdc(subject, PAIRS, thresholds=[0.03])
    assert acdc(subject, PAIRS, thresholds=[0.03], execution=Execution(tokens_per_batch=1)).circuits == whole.circuits
    assert acdc(subject, order, thresholds=[0.03]).circuits == whole.circuits
    alone = [acdc(subject, Pairs((pair,), "one"), thresholds=[0.03]).circuits for pair in PAIRS]
    assert any(circuits != whole.circuits for circuits in alone)


def test_an_edge_scores_the_largest_threshold_it_survives() -> None:
    thresholds = [0.001, 0.01, 0.1]
    found = acdc(small(), PAIRS, thresholds=thresholds)
    for place, name in enumerate(found.scores.graph.names):
        survives = [threshold for threshold in thresholds if found[threshold].edges[place]]
        assert found.scores[name] == (max(survives) if survives else 0)


def test_only_candidates_can_leave() -> None:
    subject = small(idle=True)
    candidates = [f"embed->{IDLE}<q>", f"{IDLE}->logits", "m0->m1"]
    found = acdc(subject, PAIRS, thresholds=[1e-11], edges=candidates)
    assert set(found.circuits[0].names) == set(found.scores.graph.names) - set(candidates[:2])
    assert np.isnan(found.scores.mean).sum() == len(found.scores.graph) - 3
    assert found.scores["m0->m1"] == 1e-11
    assert acdc(subject, PAIRS, thresholds=[1e-11], edges=Circuit.of(found.scores.graph, candidates)).circuits == found.circuits
    none = acdc(subject, PAIRS, thresholds=[math.inf], edges=candidates)
    assert set(none.circuits[0].names) == set(found.scores.graph.names) - set(candidates)


def test_a_node_that_nothing_reads_is_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    class Watched(CircuitRuns):
        def run(self, edges: torch.Tensor) -> torch.Tensor:
            tried.append(len(edges))
            return super().run(edges)

    # the package gives the function under the module's name
    monkeypatch.setattr(importlib.import_module("mechscope.circuits.acdc"), "CircuitRuns", Watched)
    found = acdc(small(idle=True), PAIRS, thresholds=[1e-11])
    # every edge but the three into the idle head, whose outgoing edges have all gone by then
    assert sum(tried) == found.scores.notes["trials"] == len(found.scores.graph) - 3
    assert not any(found.circuits[0].edges[found.scores.graph.index(f"embed->{IDLE}<{part}>")] for part in "qkv")


def test_the_cost_counts_only_the_layers_that_were_run() -> None:
    # one edge into the logits, one into the last layer, one into the first of two
    found = acdc(small(), PAIRS, thresholds=[1e-6, 1e-5], edges=["m1->logits", "m0->m1", "embed->m0"])
    assert found.scores.notes["trials"] == 3
    assert found.scores.cost.forward == 2 + 0 + 0.5 + 1


def test_wrong_input_is_refused() -> None:
    subject = small()
    for thresholds, words in (([], "no thresholds"), ([0.1, -0.1], "threshold -0.1"), ([math.nan], "threshold nan")):
        with pytest.raises(SettingsError, match=words):
            acdc(subject, PAIRS, thresholds=thresholds)
    with pytest.raises(DataError, match="has no target span"):
        acdc(subject, random_pairs(2, with_target=False), thresholds=[0.1], metric="loss")
    with pytest.raises(DataError, match="is not known"):
        acdc(subject, PAIRS, thresholds=[0.1], metric="accuracy")
    with pytest.raises(SettingsError, match="does not exist"):
        acdc(subject, PAIRS, thresholds=[0.1], edges=["m1->m0"])
    with pytest.raises(SettingsError, match="name this model's edges"):
        acdc(subject, PAIRS, thresholds=[0.1], edges=Circuit.full(Graph(3, 2)))
    same = Pairs(tuple(type(pair)(pair.id, pair.clean, pair.clean, target=pair.target) for pair in PAIRS), "same")
    with pytest.raises(DataError, match="same clean and corrupt text"):
        acdc(subject, same, thresholds=[0.1])
