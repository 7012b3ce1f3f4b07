"""Which edges make the circuit: the strongest ones, those above a threshold, or those a search from the logits meets.

A method scores every edge; a circuit is a choice among them. *Top* takes the strongest wherever they are, *greedy* grows the circuit backwards from
the logits, so that every edge leads somewhere (Hanna et al. 2024, arXiv 2403.17806), and *threshold* takes whatever is strong enough. All three
order edges once, so the circuits of growing budgets are nested (the faithfulness curve of MIB, arXiv 2504.13151).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Literal, TypedDict, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from mechscope.choices import EdgeSign, EdgeUnit
from mechscope.circuits.graph import Circuit, Graph, sums_by_node
from mechscope.circuits.scores import EdgeScores
from mechscope.errors import DataError, SettingsError

Rule = Literal["top", "threshold", "greedy"]

# scores of the edges, or a graph and one number per edge (by nodes also per sender)
Scored = EdgeScores | tuple[Graph, Float[np.ndarray, " scored"]]

# the shares of all edges at which MIB measures faithfulness
MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Manner(TypedDict, total=False):
    """The options of `choose` but a circuit's size, for functions that hand them on."""

    rule: Rule
    by: EdgeUnit
    sign: EdgeSign
    higher_is_better: bool | None
    prune: bool
    fill: bool


class Choice(Manner, total=False):
    """All options of `choose`, for functions that hand them on."""

    number: int | None
    fraction: float | None
    threshold: float | None


def choose(
    scores: Scored,
    *,
    rule: Rule = "top",
    number: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    by: EdgeUnit = "edges",
    sign: EdgeSign = "absolute",
    higher_is_better: bool | None = None,
    prune: bool = True,
    fill: bool = False,
) -> Circuit:
    """Choose a circuit.

    The default strength is the absolute score: an edge that pushes the metric down counts as much as one that holds it up. Of equally strong edges
    the one earlier in the graph's order comes first. An edge without a score (NaN) is never chosen.

    Args:
        scores: Scores of the edges, or a graph and one number per edge. By nodes also a graph and one number per sender.
        rule: `top`: the strongest. `greedy`: start at the logits and repeatedly take the strongest edge into a node that is already in the circuit.
            `threshold`: all that are stronger than `threshold`.
        number: How many to take, before pruning (`top`, `greedy`).
        fraction: The same as a share in (0, 1] of all the graph's edges (or nodes), rounded, at least one; where fewer have a score, all of those.
        threshold: The strength to exceed, in units of the metric.
        by: `edges`, or `nodes`: choose heads and MLPs by the strength of the sum of their outgoing edges (or their own score) and keep all edges
            among them, the input and the logits. A node with an unscored outgoing edge has no score.
        sign: `absolute`, or `helpful`: strongest is what makes the metric better. Harmful edges then come last, so the whole budget is still spent;
            a threshold of 0 leaves them out. Needs a method whose scores have a sign (not acdc, edge-pruning or flow-routes).
        higher_is_better: Which way the metric counts (true for logit-diff and probability, false for loss and kl); needed for `helpful`.
        prune: Remove dead ends, edges on no path from `embed` to `logits`. The circuit may then be much smaller than the budget.
        fill: Take further edges for those removed: the largest pruned circuit within the budget, which an edge more would exceed.

    Raises:
        SettingsError: The budget is missing, given twice or impossible, or options contradict each other.
        DataError: Nothing has a score, or the scores are not of this graph.
    """
    _check_options(rule, by, sign, higher_is_better, prune, fill)
    graph, strength = _strength(scores, by, sign, higher_is_better)
    if rule == "threshold":
        if number is not None or fraction is not None or threshold is None or math.isnan(threshold):
            raise SettingsError(f"rule 'threshold' needs a threshold and nothing else, not {_given(number, fraction, threshold)}")
        return _circuit(graph, strength > threshold, by, prune)
    if threshold is not None or (number is None) == (fraction is None):
        raise SettingsError(f"rule {rule!r} needs either a number or a fraction, not {_given(number, fraction, threshold)}")
    total, scored = len(strength) - (by == "nodes"), int((~np.isnan(strength)).sum())
    if number is None:
        assert fraction is not None
        number = _share(fraction, total)
    elif not 1 <= number <= scored:
        raise SettingsError(
            f"a circuit of {number:,} {by}: this graph has {total:,}, of which {scored:,} have a score; ask for 1 to {scored:,}"
        )
    return _nested(graph, strength, [number], rule, by, prune, fill)[0]


def fractions_curve(
    scores: Scored,
    fractions: Sequence[float] = MIB_FRACTIONS,
    *,
    rule: Literal["top", "greedy"] = "top",
    by: EdgeUnit = "edges",
    sign: EdgeSign = "absolute",
    higher_is_better: bool | None = None,
    prune: bool = True,
    fill: bool = False,
) -> list[Circuit]:
    """Choose a circuit for each of some fractions, in the order given; a larger one contains every smaller one.

    Args:
        scores: Scores of the edges, or a graph and one number per edge. By nodes also a graph and one number per sender.
        fractions: Shares in (0, 1] of all edges (or nodes), before pruning.
        rule: `top`: the strongest; `greedy`: grown backwards from the logits.
        by: `edges` or `nodes`.
        sign: What counts as strong: `absolute`, or `helpful` (what makes the metric better).
        higher_is_better: Which way the metric counts; needed for `helpful`.
        prune: Remove dead ends.
        fill: Take further edges for those removed.

    Raises:
        SettingsError: A fraction is outside (0, 1], or options contradict each other.
        DataError: Nothing has a score, or the scores are not of this graph.
    """
    if rule not in ("top", "greedy"):
        raise SettingsError(f"rule {rule!r} has no curve over fractions: use 'top' or 'greedy'")
    _check_options(rule, by, sign, higher_is_better, prune, fill)
    graph, strength = _strength(scores, by, sign, higher_is_better)
    total = len(strength) - (by == "nodes")
    return _nested(graph, strength, [_share(fraction, total) for fraction in fractions], rule, by, prune, fill)


def values_of(scores: Scored) -> tuple[Graph, Float[np.ndarray, " scored"]]:
    """Return the graph and one number per edge, as float64."""
    graph, values = (scores.graph, scores.mean) if isinstance(scores, EdgeScores) else scores
    return graph, np.asarray(values, dtype=np.float64)


def _check_options(rule: str, by: str, sign: str, higher_is_better: bool | None, prune: bool, fill: bool) -> None:
    for name, value, kind in (("rule", rule, Rule), ("by", by, EdgeUnit), ("sign", sign, EdgeSign)):
        if value not in get_args(kind):
            raise SettingsError(f"{name} {value!r} is not known: use one of {', '.join(get_args(kind))}")
    if sign == "helpful" and higher_is_better is None:
        raise SettingsError("sign 'helpful' needs higher_is_better: true for logit-diff and probability, false for loss and kl")
    if rule == "greedy" and by == "nodes":
        raise SettingsError("rule 'greedy' grows edge by edge: use it with by='edges', or rule 'top' for nodes")
    if fill and (rule == "threshold" or by == "nodes" or not prune):
        raise SettingsError(
            "fill=True replaces what pruning removed from a budget of edges: use it with prune=True, by='edges' and no threshold"
        )


def _strength(scores: Scored, by: EdgeUnit, sign: EdgeSign, higher_is_better: bool | None) -> tuple[Graph, Float[np.ndarray, " scored"]]:
    """Return the strength of every edge or sender; NaN for what cannot be chosen."""
    if sign == "helpful" and isinstance(scores, EdgeScores) and not scores.signed:
        raise SettingsError(
            f"sign 'helpful' needs scores with a sign, and those of {scores.method!r} only say how important an edge is: use sign='absolute'"
        )
    graph, values = values_of(scores)
    if by == "nodes":
        if values.shape == (len(graph),):
            values = sums_by_node(graph, values)
        if values.shape != (len(graph.senders),):
            raise DataError(
                f"scores of shape {values.shape}: this graph takes {len(graph):,} for its edges or {len(graph.senders):,} for its senders"
            )
        # the input is part of every circuit and takes no place of the budget
        values = np.concatenate([[np.nan], values[1:]])
    elif values.shape != (len(graph),):
        raise DataError(f"scores of shape {values.shape}: this graph has {len(graph):,} edges, each needs one")
    if np.isnan(values).all():
        raise DataError(f"none of the {by} has a score (all are NaN): score them before choosing a circuit")
    if sign == "absolute":
        return graph, np.abs(values)
    # a score is what the metric changes by when the edge is taken away
    return graph, -values if higher_is_better else values


def _order(graph: Graph, strength: Float[np.ndarray, " scored"], rule: str, most: int) -> Int[np.ndarray, " taken"]:
    """Return the first edges or senders in the order in which they are taken."""
    by_strength = np.argsort(-strength, kind="stable")[: int((~np.isnan(strength)).sum())]
    if rule == "top":
        return by_strength[:most]
    senders, receivers = graph.edges[by_strength].T
    into, logits = graph.owner[receivers], len(graph.senders)
    ends = np.bincount(into, minlength=logits + 1).cumsum()[:-1]
    waiting = [iter(ranks.tolist()) for ranks in np.split(np.argsort(into, kind="stable"), ends)]
    # ranks are unique and already break ties; of each node's incoming edges only the strongest one left is on the heap
    heap: list[tuple[int, int]] = []

    def advance(node: int) -> None:
        if (rank := next(waiting[node], None)) is not None:
            heapq.heappush(heap, (rank, node))

    inside = {logits}
    taken: list[int] = []
    advance(logits)
    while heap and len(taken) < most:
        rank, node = heapq.heappop(heap)
        taken.append(rank)
        advance(node)
        if (sender := int(senders[rank])) not in inside:
            inside.add(sender)
            advance(sender)
    return by_strength[taken]


def _share(fraction: float, total: int) -> int:
    if not 0 < fraction <= 1:
        raise SettingsError(f"a fraction of {fraction}: give a share above 0 and at most 1, such as 0.02 for 2 %")
    return max(1, round(fraction * total))


def _nested(
    graph: Graph, strength: Float[np.ndarray, " scored"], budgets: Sequence[int], rule: str, by: EdgeUnit, prune: bool, fill: bool
) -> list[Circuit]:
    """Return the circuit of each budget."""
    order = _order(graph, strength, rule, len(strength) if fill else max(budgets, default=0))

    def of(count: int) -> Circuit:
        chosen = np.zeros(len(strength), dtype=bool)
        chosen[order[:count]] = True
        return _circuit(graph, chosen, by, prune)

    def filled(budget: int) -> int:
        # taking more edges never prunes to fewer, so the last count that fits can be searched by halving
        low, high = min(budget, len(order)), len(order)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(of(middle)) <= budget else (low, middle - 1)
        return low

    return [of(filled(budget) if fill else budget) for budget in budgets]


def _circuit(graph: Graph, chosen: Bool[np.ndarray, " scored"], by: EdgeUnit, prune: bool) -> Circuit:
    if by == "nodes":
        inside = np.concatenate([[True], chosen[1:], [True]])
        senders, receivers = graph.edges.T
        chosen = inside[senders] & inside[graph.owner[receivers]]
    circuit = Circuit(graph, chosen)
    return circuit.pruned() if prune else circuit


def _given(number: int | None, fraction: float | None, threshold: float | None) -> str:
    named = {"number": number, "fraction": fraction, "threshold": threshold}
    return ", ".join(f"{name}={value}" for name, value in named.items() if value is not None) or "none of them"
