"""Edge pruning: gates follow the hard concrete distribution, reach the sparsity that is asked for, and stay open where it matters."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from mechscope.circuits.exact import exact_effects
from mechscope.circuits.forward import CircuitRuns
from mechscope.circuits.pruning import Pruned, open_probability, prune_edges, sampled
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


def test_the_expected_sparsity_reaches_the_target_and_rises_to_it() -> None:
    found = learned()
    n = len(found.circuit.graph)
    assert len(found.circuit) == KEPT
    assert found.history.target.iloc[-1] == pytest.approx(1 - KEPT / n)
    assert found.history.sparsity.iloc[-1] == pytest.approx(1 - KEPT / n, abs=0.08)
    assert found.history.sparsity.iloc[0] < 0.05
    rise = found.history.target[: int(250 * 5 / 6)]
    np.testing.assert_allclose(np.diff(rise), rise[0], rtol=1e-9)
    np.testing.assert_allclose(found.scores.mean.mean(), 1 - found.history.sparsity.iloc[-1], rtol=0, atol=0.02)


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
    # six steps of one text each are two passes over three texts
    assert (found.scores.cost.forward, found.scores.cost.backward) == (4, 2)
    assert len(found.history) == 6


def test_wrong_input_is_refused() -> None:
    subject = small(idle=True)
    for n_edges in (0, 46):
        with pytest.raises(SettingsError, match=f"a circuit of {n_edges} edges"):
            prune_edges(subject, PAIRS, n_edges=n_edges)
    with pytest.raises(SettingsError, match="steps is 0"):
        prune_edges(subject, PAIRS, n_edges=5, steps=0)
    with pytest.raises(SettingsError, match="multiplier_rate is -1"):
        prune_edges(subject, PAIRS, n_edges=5, multiplier_rate=-1)
    with pytest.raises(DataError, match="has no target span"):
        prune_edges(subject, random_pairs(2, with_target=False), n_edges=5, metric="loss")
    same = Pairs(tuple(type(pair)(pair.id, pair.clean, pair.clean, target=pair.target) for pair in PAIRS), "same")
    with pytest.raises(DataError, match="same clean and corrupt text"):
        prune_edges(subject, same, n_edges=5)
