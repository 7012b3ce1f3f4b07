"""Completeness and minimality: does a circuit hold everything that matters, and does everything it holds matter?

A circuit is complete if it and the model lose the same when the same nodes K are taken from both: |m(C∖K) − m(M∖K)| is small for every K. It is
minimal if every node v matters in it beside some K: |m(C∖(K∪{v})) − m(C∖K)| is large (Wang et al. 2022, arXiv 2211.00593). Taking a node away
closes all edges from and to it. Sets K are a search: random ones, and for completeness ones grown greedily towards a large gap.

How large is large? A superfluous part also changes the metric when it is taken away. So circuits are inflated by random parts and these are
taken away again in the same way: a node is needed if its removal changes more than theirs (after Shi et al. 2024, arXiv 2410.13032, where parts are
single edges of random paths; here they are nodes that are joined to the circuit by as many edges as one of its own).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechscope.circuits.evaluation import Evaluated, evaluate, of_span
from mechscope.circuits.graph import Circuit, edges_at
from mechscope.circuits.scores import Cost
from mechscope.circuits.sender_outputs import Source
from mechscope.data.pairs import Pairs
from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.shapes import by_shape
from mechscope.stats.inference import benjamini_hochberg, paired_difference
from mechscope.subject import Subject

Nodes = tuple[str, ...]
Sides = tuple[Circuit, Circuit]
_LEVEL = 0.05


@dataclass(frozen=True)
class Completeness:
    """What a circuit and the model lose when the same nodes are taken from both.

    Attributes:
        table: One row per set K: `component` (its nodes, comma-separated), `found` (`none`, `random` or `greedy`), `size`, `metric`, `n`, `circuit` and
            `model` (mean m(C∖K) and m(M∖K)), `gap` (their difference) with `se`, `low`, `high` (over texts), `incompleteness` (its absolute value)
            and `normalised` (by |m(M) − m(∅)|) with `normalised_low`, `normalised_high` (over texts; from 0 where the sign is not
            certain), `withheld` (why these are NaN). Greedy sets stand after every step of their growth. They were picked for their gap, so their
            intervals are optimistic.
        gaps: The gap of every set and text.
        cost: Passes that were made.
        notes: What a reader should know of the run.
    """

    table: pd.DataFrame
    gaps: Float[np.ndarray, "set text"]
    cost: Cost
    notes: dict[str, Any] = field(default_factory=dict)

    __repr__ = by_shape


@dataclass(frozen=True)
class Minimality:
    """What a circuit loses with each of its nodes.

    Attributes:
        table: One row per node: `component`, `layer`, `edges` (of the circuit, at it), `beside` (the set K beside which its removal matters most),
            `metric`, `n`, `change` (of the metric by its removal beside K) with `se`, `low`, `high` (over texts), `minimality` (its absolute value),
            `normalised` (by |m(M) − m(∅)|) with `normalised_low`, `normalised_high` (over texts; from 0 where the sign is not certain), `withheld` (why
            these are NaN), `control` (mean minimality of the superfluous parts), `p` (share of parts whose removal matters at least as much, the node itself
            counted: small where the node is needed) and `q` (Benjamini–Hochberg over the nodes; the notes say how small it can be).
        changes: The change of every node and text.
        controls: Minimality of every superfluous part, by the same search over K.
        cost: Passes that were made.
        notes: What a reader should know of the run.
    """

    table: pd.DataFrame
    changes: Float[np.ndarray, "node text"]
    controls: Float[np.ndarray, " part"]
    cost: Cost
    notes: dict[str, Any] = field(default_factory=dict)

    __repr__ = by_shape


def completeness(
    subject: Subject,
    pairs: Pairs,
    circuit: Circuit,
    *,
    random: int = 20,
    greedy: int = 2,
    steps: int = 5,
    candidates: int = 5,
    metric: str = "logit-diff",
    source: Source = "corrupt",
    execution: Execution = Execution(),
) -> Completeness:
    """Take nodes of a circuit from it and from the model, and see how far apart the two are.

    Args:
        subject: The model.
        pairs: The texts.
        circuit: The circuit.
        random: Random sets K; sizes from one node to all are equally likely.
        greedy: How many sets are grown greedily.
        steps: How many nodes each of them gets.
        candidates: Nodes tried at each step, drawn at random; that which widens the gap most is added.
        metric: `logit-diff`, `probability`, `loss` or `kl`.
        source: What closed edges carry: values of the `corrupt` run, `zero`, means (`SenderOutputs.mean_over`), or another model's clean run.
        execution: Tokens of a batch (512 by default), seed (of the sets), progress.

    Raises:
        MechscopeError: The circuit has no node but the input or is of another graph, or texts do not fit the model or the metric.
    """
    runs = _Runs(partial(evaluate, subject, pairs, metric=metric, source=source, execution=execution))
    nodes, chance = _nodes(circuit), np.random.default_rng(execution.seed)
    model = Circuit.full(circuit.graph)

    def sides(taken: Nodes) -> Sides:
        return circuit.without(taken), model.without(taken)

    sets: list[Nodes] = [(), *(_subset(nodes, chance) for _ in range(random))]
    origins = ["none", *["random"] * random]
    values = [runs.of([sides(taken) for taken in sets])]
    grown: list[Nodes] = [()] * greedy
    for _ in range(min(steps, len(nodes)) if greedy else 0):
        tried: list[list[Nodes]] = []
        for taken in grown:
            left = [node for node in nodes if node not in taken]
            tried.append([_sorted(nodes, (*taken, node)) for node in chance.permutation(left)[:candidates].tolist()])
        every = runs.of([sides(taken) for of_one in tried for taken in of_one])
        gap = np.abs(every[:, 0].mean(1) - every[:, 1].mean(1)).reshape(greedy, -1)
        best = gap.argmax(1)
        grown = [of_one[at] for of_one, at in zip(tried, best, strict=True)]
        sets, origins = [*sets, *grown], [*origins, *["greedy"] * greedy]
        values.append(every[np.arange(greedy) * gap.shape[1] + best])
    both = np.concatenate(values)
    gaps = both[:, 0] - both[:, 1]
    table = pd.DataFrame({"component": [",".join(taken) for taken in sets], "found": origins, "size": [len(taken) for taken in sets]})
    table["metric"], table["n"] = metric, len(pairs)
    table["circuit"], table["model"] = both.mean(-1).T
    note = _fill(table, gaps, runs, ("gap", "incompleteness"))
    return Completeness(table, gaps, runs.cost, {"seed": execution.seed, "nodes": len(nodes), "candidates": candidates, "normalised": note})


def minimality(
    subject: Subject,
    pairs: Pairs,
    circuit: Circuit,
    *,
    sets: Sequence[Sequence[str]] = (),
    random: int = 3,
    controls: int = 50,
    metric: str = "logit-diff",
    source: Source = "corrupt",
    execution: Execution = Execution(),
) -> Minimality:
    """Take every node from a circuit, alone and beside some sets K, and compare with superfluous parts that were added for it.

    The sets are shared by all nodes and parts, so that a largest change over them is compared with largest changes over the same ones.

    Args:
        subject: The model.
        pairs: The texts.
        circuit: The circuit.
        sets: Sets K of nodes of the circuit to try besides the empty one, such as those that do the same work.
        random: Random sets K to try as well.
        controls: Superfluous parts; the smallest p is 1 / (controls + 1), and q of a large circuit is bounded by it (`notes["q"]`).
        metric: `logit-diff`, `probability`, `loss` or `kl`.
        source: What closed edges carry: values of the `corrupt` run, `zero`, means (`SenderOutputs.mean_over`), or another model's clean run.
        execution: Tokens of a batch (512 by default), seed (of the sets and the parts), progress.

    Raises:
        MechscopeError: The circuit has no node but the input or is of another graph, a set names a node outside it, or texts do not fit the model or
            the metric.
    """
    runs = _Runs(partial(evaluate, subject, pairs, metric=metric, source=source, execution=execution))
    nodes, chance = _nodes(circuit), np.random.default_rng(execution.seed)
    for node in (node for taken in sets for node in taken):
        if node not in nodes:
            raise SettingsError(f"node {node!r} of the given sets is not a head or MLP of the circuit, which has {', '.join(nodes)}")
    taken = [(), *(tuple(given) for given in sets), *(_subset(nodes, chance) for _ in range(random))]

    def sides(node: str, whole: Circuit, rest: Circuit) -> list[Sides]:
        beside = [[other for other in of_one if other != node] for of_one in taken]
        return [(rest.without(others), whole.without(others)) for others in beside]

    parts = [part for part in (_inflated(circuit, nodes, chance) for _ in range(controls)) if part is not None]
    tests = [sides(node, circuit, circuit.without([node])) for node in nodes]
    tests += [sides(node, inflated, circuit) for node, inflated in parts]
    both = runs.of([side for of_one in tests for side in of_one])
    changes = (both[:, 0] - both[:, 1]).reshape(len(tests), len(taken), -1)
    largest = np.abs(changes.mean(-1)).argmax(1)
    changes = changes[np.arange(len(tests)), largest]
    size = np.abs(changes.mean(1))
    own, control = size[: len(nodes)], size[len(nodes) :]
    table = pd.DataFrame({"component": nodes, "layer": circuit.graph.layer_of(nodes)})
    table["edges"] = [int((circuit.edges & edges_at(circuit.graph, [node])).sum()) for node in nodes]
    table["beside"] = [",".join(other for other in taken[at] if other != node) for node, at in zip(nodes, largest, strict=False)]
    table["metric"], table["n"] = metric, len(pairs)
    note = _fill(table, changes[: len(nodes)], runs, ("change", "minimality"))
    table["control"] = control.mean() if len(control) else np.nan
    # parts that matter as much up to rounding count against the node
    matter_more = (control >= own[:, None] * (1 - 1e-9)).sum(1)
    table["p"] = (1 + matter_more) / (1 + len(control)) if len(control) else np.nan
    table["q"] = benjamini_hochberg(table["p"])
    notes: dict[str, Any] = {"seed": execution.seed, "sets": [list(of_one) for of_one in taken], "normalised": note}
    if parts:
        # q is p · nodes / rank at best, and no p is below 1 / (parts + 1)
        fewest = math.floor(len(nodes) / (_LEVEL * (len(parts) + 1))) + 1
        only = "for none" if fewest > len(nodes) else f"for none or for at least {fewest}"
        notes["q"] = f"with {len(parts)} superfluous parts q is below {_LEVEL} {only} of the {len(nodes)} nodes"
    if controls and not parts:
        notes["controls"] = "the circuit is the whole model, to which nothing superfluous can be added: there is no p"
    return Minimality(table, changes[: len(nodes)], control, runs.cost, notes)


class _Runs:
    """The metric of pairs of circuits, and what they cost together."""

    def __init__(self, run: Callable[[Sequence[Circuit]], Evaluated]) -> None:
        self._run = run
        self.cost = Cost(0, 0)
        self.clean = self.empty = np.zeros(0)

    def of(self, sides: Sequence[Sides]) -> Float[np.ndarray, "pair two text"]:
        evaluated = self._run([circuit for pair in sides for circuit in pair])
        self.cost = Cost(self.cost.forward + evaluated.cost.forward, 0)
        self.clean, self.empty = evaluated.clean, evaluated.empty
        return evaluated.values.reshape(len(sides), 2, -1)


def _fill(table: pd.DataFrame, differences: np.ndarray, runs: _Runs, names: tuple[str, str]) -> str | None:
    """Add what differences of the metric say; returns why they are not normalised, if so."""
    over = paired_difference(differences.T, np.zeros_like(differences.T))
    table[names[0]], table["se"], table["low"], table["high"] = over.mean, over.standard_error, over.low, over.high
    table[names[1]] = np.abs(over.mean)
    share = of_span(differences, runs.clean, runs.empty)
    table["normalised"] = np.abs(share.value)
    ends = np.abs(np.stack([share.low, share.high]))
    # an interval of a signed share that holds 0 begins at 0 once the sign is dropped
    table["normalised_low"] = np.where(share.low * share.high < 0, 0.0, ends.min(0))
    table["normalised_high"] = ends.max(0)
    table["withheld"] = share.withheld
    return share.note


def _nodes(circuit: Circuit) -> list[str]:
    nodes = [name for name, inside in zip(circuit.graph.senders, circuit.nodes, strict=True) if inside and name != "embed"]
    if not nodes:
        raise SettingsError(f"a circuit of {len(circuit)} edges without heads and MLPs has nothing to take away: choose a larger one")
    return nodes


def _sorted(nodes: Sequence[str], taken: Sequence[str]) -> Nodes:
    return tuple(node for node in nodes if node in taken)


def _subset(nodes: Sequence[str], chance: np.random.Generator) -> Nodes:
    return _sorted(nodes, chance.permutation(nodes)[: chance.integers(1, len(nodes) + 1)].tolist())


def _inflated(circuit: Circuit, nodes: Sequence[str], chance: np.random.Generator) -> tuple[str, Circuit] | None:
    """Return a random node and the circuit with that node joined to it by edges it did not have, or None where there is no such edge.

    They are as many as a random node of the circuit has, into it and out of it, from and to what is in the circuit already, so that they are not
    dead. The node is one outside the circuit; if all are in it, one of them that lacks edges.
    """
    graph = circuit.graph
    senders, owners = graph.edges[:, 0], graph.owner[graph.edges[:, 1]]
    live = np.append(circuit.nodes, True)  # the logits stand last
    live[0] = True
    outside, closed = np.flatnonzero(~live), ~circuit.edges
    lacking = np.setdiff1d(np.union1d(senders[closed], owners[closed]), [0, len(live) - 1])
    if not len(lacking):
        return None
    place = int(chance.choice(outside if len(outside) else lacking))
    like = graph.senders.index(str(chance.choice(nodes)))
    live[place] = True
    free = closed & live[senders] & live[owners]
    added = np.zeros(len(graph), dtype=bool)
    for ends in (owners, senders):
        pool = np.flatnonzero(free & (ends == place))
        wanted = max(1, int((circuit.edges & (ends == like)).sum()))
        added[chance.permutation(pool)[:wanted]] = True
    return graph.senders[place], Circuit(graph, circuit.edges | added)
