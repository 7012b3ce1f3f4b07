"""Scores of methods: precision and chance by hand, and a method that is given the answer."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from mechscope.circuits import Circuit, Graph
from mechscope.groundtruth import ground_truth
from mechscope.groundtruth.benchmark import benchmark_methods, chance_auroc, precision_at_size


def test_precision_of_equal_scores_is_the_mean_over_their_orders() -> None:
    strength, truth = np.array([3.0, 1.0, 1.0, 1.0, np.nan]), np.array([True, True, False, False, True])
    by_hand = []
    for order in permutations(range(5)):
        place = {edge: at for at, edge in enumerate(order)}
        ranked = sorted(range(5), key=lambda edge: (-np.nan_to_num(strength[edge], nan=-1), place[edge]))
        by_hand.append(truth[ranked[:3]].mean())
    assert precision_at_size(strength, truth) == pytest.approx(np.mean(by_hand))
    assert precision_at_size(np.array([1.0, 2.0, 3.0]), np.array([False, True, True])) == 1
    assert precision_at_size(np.array([1.0, 2.0, 3.0]), np.array([True, False, False])) == 0


def test_chance_is_the_quantile_of_random_orders() -> None:
    graph = Graph(1, 1)
    names = graph.names[:2]
    others, inside = len(graph) - 2, 2
    # all orders by hand: every choice of two places, each equally likely
    found = []
    for places in ((one, two) for one in range(len(graph)) for two in range(one)):
        below = sum(sum(1 for other in range(len(graph)) if other not in places and other < place) for place in places)
        found.append(below / (inside * others))
    quantile = chance_auroc(Circuit.of(graph, names), 4000)
    at_least, above = np.mean(np.array(found) >= quantile), np.mean(np.array(found) > quantile)
    assert above <= 0.05
    assert at_least >= 0.02


def test_methods_are_judged_on_every_model() -> None:
    truths = {name: ground_truth(name) for name in ("counting", "induction")}
    table = benchmark_methods(truths, ("exact", "flow-routes"), pairs=8, draws=200)
    assert list(table["program"]) == ["counting", "counting", "induction", "induction"]
    exact = table[table["method"] == "exact"]
    assert (exact["found"] & (exact["auroc"] == 1) & (exact["precision"] == 1)).all()
    assert not table.loc[table["method"] == "flow-routes", "found"].any()
    assert (exact["circuit"] == [3, 5]).all()
    assert (table["edges"] == [23, 23, 110, 110]).all()
    # from the circuit's size on, a circuit that holds all of it is as good as the model
    assert (exact["cmd"] < 0.2).all()
    assert table["auroc_chance"].between(0.6, 0.95).all()
