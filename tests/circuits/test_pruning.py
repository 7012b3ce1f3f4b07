"""Edge pruning: gates follow the hard concrete distribution, are as many as asked for, and stay open where it matters; what returns is judged."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.circuits.choosing import choose
from mechscope.circuits.evaluation import evaluate
from mechscope.circuits.exact import exact_effects
from mechscope.circuits.forward import CircuitRuns
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.pruning import Pruned, open_probability, prune_edges, sampled
from mechscope.circuits.settling import settled
from mechscope.data.pairs import Pairs, collate_pairs
from mechscope.errors import DataError, SettingsError
from mechscope.instrument.execution import Execution
from tests.causal.pairs import random_pairs
from tests.circuits import planted
from tests.circuits.test_acdc import IDLE, small, touches

PAIRS = random_pairs(3, lengths=(7,))
KEPT = 15


@lru_cache
def learned() -> Pruned:
    return prune_edges(small(idle=True), PAIRS, n_edges=KEPT, steps=250)


def test_gates_are_open_as_often_as_the_formula_says() -> None:
    log_alpha = torch.tensor([-4.0, -1.6, 0.0, 2.0], dtype=torch.float64)
    n = 200_000
    uniform = torch.rand(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = sampled(log_alpha, uniform)
    share, expected = (gates > 0).double().mean(0), open_probability(log_alpha)
    assert expected.min() < 0.1
    assert expected.max() > 0.9
    # four standard errors of a share
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt()).all()
    assert ((gates == 0).any(0) & (gates == 1).any(0) & ((gates > 0) & (gates < 1)).any(0)).all()


def test_a_gate_is_differentiable_where_it_is_neither_open_nor_closed() -> None:
    log_alpha = torch.tensor([0.3, -9.0, 9.0], dtype=torch.float64, requires_grad=True)
    uniform = torch.tensor([0.4, 0.4, 0.4], dtype=torch.float64)
    (slope,) = torch.autograd.grad(sampled(log_alpha, uniform).sum(), [log_alpha])
    step = 1e-6
    with torch.no_grad():
        expected = (sampled(log_alpha + step, uniform) - sampled(log_alpha - step, uniform)) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-8)
    assert slope[0] > 0.1
    assert slope[1] == slope[2] == 0


def test_as_many_gates_are_open_as_are_wanted_from_the_first_step_to_the_last() -> None:
    history = learned().history
    np.testing.assert_allclose(history["open"], history["wanted"], rtol=0, atol=0.02)
    assert history["open"].iloc[0] > 0.9 * len(learned().circuit.graph)
    assert (history["wanted"].iloc[125:] == KEPT).all()
    fall = np.diff(history["wanted"].iloc[:125])
    np.testing.assert_allclose(fall, fall[0], rtol=1e-9)
    assert len(learned().circuit) == KEPT
    assert np.isfinite(history["median"].iloc[125:]).sum() >= 20


def test_the_circuit_has_no_dead_ends_and_its_edges_stand_before_all_others() -> None:
    found = learned()
    assert found.circuit.pruned() == found.circuit
    inside = found.circuit.edges
    assert found.scores.mean[inside].min() >= 0.5 >= found.scores.mean[~inside].max()
    assert found.scores.mean[inside].min() > found.scores.mean[~inside].max()
    assert choose(found.scores, number=KEPT) == found.circuit


def test_what_is_said_of_the_circuit_is_what_it_gives_when_it_is_run() -> None:
    found = learned()
    run = evaluate(small(idle=True), PAIRS, [found.circuit, Circuit.empty(found.circuit.graph)], metric="kl")
    assert found.distance == pytest.approx(run.values[0].mean(), rel=1e-9)
    assert found.empty_distance == pytest.approx(run.values[1].mean(), rel=1e-9)
    assert found.scores.notes["distance"] == found.distance < found.scores.notes["empty_distance"]


def assert_the_chain_is_found(model: planted.Planted, seed: int, **options: Any) -> None:
    """Where gates tie at the cut, a choice by scores takes whatever stands first in the graph: a circuit worth exactly the empty one."""
    found = prune_edges(model.subject, model.pairs, n_edges=3, execution=Execution(seed=seed), **options)
    assert set(found.circuit.names) == set(model.truth), seed
    assert choose(found.scores, number=3) == found.circuit
    assert found.distance < 0.3 * found.empty_distance
    assert found.history["open"].iloc[-1] == pytest.approx(3, abs=0.02)


@pytest.mark.parametrize("metric", ["kl", "logit-diff"])
def test_three_edges_among_hundreds_are_found(metric: str) -> None:
    model = planted.chain(4)
    few = replace(model, pairs=model.pairs.first(3))
    assert_the_chain_is_found(few, 0, steps=100, metric=metric)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["kl", "logit-diff"])
def test_three_edges_are_found_in_twenty_of_twenty_seeds(metric: str) -> None:
    for seed in range(20):
        assert_the_chain_is_found(planted.chain(2), seed, metric=metric)


def test_two_steps_have_not_converged() -> None:
    found = prune_edges(small(idle=True), PAIRS, n_edges=KEPT, steps=2)
    assert not found.convergence.converged
    assert not found.scores.notes["converged"]
    assert "too few" in found.scores.notes["unconverged"]
    assert len(found.circuit) == KEPT


def test_long_training_has_converged() -> None:
    assert learned().convergence.converged


@pytest.mark.parametrize("size", [1, 2, 4, 7, 20])
def test_a_circuit_of_any_size_is_settled_on_whatever_the_order(size: int) -> None:
    graph = Graph.of(small(idle=True))
    draw = np.random.default_rng(size)
    worth = draw.random(len(graph))

    def distance(circuits: np.ndarray) -> np.ndarray:
        return -(circuits * worth).sum(1)

    for _ in range(10):
        circuit = settled(graph, draw.permutation(len(graph)), size, distance)
        assert len(circuit) == size
        assert circuit.pruned() == circuit


def test_ties_are_broken_by_what_circuits_are_worth() -> None:
    graph = Graph.of(small(idle=True))
    truth = Circuit.of(graph, ["embed->a0.h0<v>", "a0.h0->m1", "m1->logits"])

    def distance(circuits: np.ndarray) -> np.ndarray:
        return 1.0 - (circuits & truth.edges).sum(1).__eq__(3)

    # the true edges stand among the first, and behind others
    others = np.random.default_rng(0).permutation(np.flatnonzero(~truth.edges))
    order = np.concatenate([others[:3], np.flatnonzero(truth.edges), others[3:]])
    assert settled(graph, order, 3, distance) == truth


def test_an_idle_head_gets_closed_gates_and_what_matters_most_open_ones() -> None:
    found = learned()
    idle = np.array([touches(IDLE, name) for name in found.circuit.graph.names])
    assert found.scores.mean[idle].max() < 0.05
    assert not found.circuit.edges[idle].any()
    effects = np.abs(exact_effects(small(idle=True), PAIRS, metric="kl").mean)
    assert found.scores.mean[np.argsort(-effects)[:5]].min() > 0.9


def test_a_planted_circuit_is_found_by_another_metric() -> None:
    model = planted.induction()
    found = prune_edges(model.subject, model.pairs.first(4), n_edges=len(model.truth), steps=200, metric="logit-diff")
    assert set(found.circuit.names) == set(model.truth)


def test_the_circuit_is_nearer_to_the_model_than_random_ones_of_its_size() -> None:
    subject, found = small(idle=True), learned()
    runs = CircuitRuns(subject, collate_pairs(list(PAIRS)), "kl")
    order = np.random.default_rng(0)
    random = np.zeros((20, len(found.circuit.graph)), dtype=bool)
    for row in random:
        row[order.permutation(len(row))[:KEPT]] = True
    values = runs.run(torch.from_numpy(np.concatenate([found.circuit.edges[None], random]))).mean(1)
    assert values[0] < 0.5 * values[1:].min()
    assert values[0] < 0.5 * runs.corrupt.mean()


def test_equal_seeds_give_equal_gates_and_others_do_not() -> None:
    subject = small(idle=True)

    def once(seed: int) -> np.ndarray:
        return prune_edges(subject, PAIRS, n_edges=KEPT, steps=15, execution=Execution(tokens_per_batch=7, seed=seed)).scores.mean

    np.testing.assert_array_equal(once(0), once(0))
    assert np.abs(once(0) - once(1)).max() > 1e-3


def test_the_model_is_left_as_it_was() -> None:
    subject = small(idle=True)
    before = [parameter.clone() for parameter in subject.plain.parameters()]
    prune_edges(subject, PAIRS, n_edges=KEPT, steps=2)
    for parameter, held in zip(subject.plain.parameters(), before, strict=True):
        assert parameter.grad is None
        torch.testing.assert_close(parameter, held, rtol=0, atol=0)


def test_costs_are_in_passes_over_all_texts() -> None:
    found = prune_edges(small(idle=True), PAIRS, n_edges=KEPT, steps=6, execution=Execution(tokens_per_batch=7))
    # six steps of one text each are two passes over three texts; two more begin, the rest judges gates and runs circuits
    assert found.scores.cost.backward == 2
    assert found.scores.cost.forward > 4 + 3
    assert len(found.history) == 6


def test_wrong_input_is_refused() -> None:
    subject = small(idle=True)
    for n_edges in (0, 46):
        with pytest.raises(SettingsError, match=f"a circuit of {n_edges} edges"):
            prune_edges(subject, PAIRS, n_edges=n_edges)
    with pytest.raises(SettingsError, match="steps is 0"):
        prune_edges(subject, PAIRS, n_edges=5, steps=0)
    with pytest.raises(SettingsError, match="learning_rate is -1"):
        prune_edges(subject, PAIRS, n_edges=5, learning_rate=-1)
    with pytest.raises(DataError, match="has no target span"):
        prune_edges(subject, random_pairs(2, with_target=False), n_edges=5, metric="loss")
    same = Pairs(tuple(type(pair)(pair.id, pair.clean, pair.clean, target=pair.target) for pair in PAIRS), "same")
    with pytest.raises(DataError, match="same clean and corrupt text"):
        prune_edges(subject, same, n_edges=5)
