"""How alike two circuits are, beside how alike circuits are by chance and how alike one model's own circuits are.

The overlap is the Jaccard index, shared / in either, of the edges and of the heads and MLPs (the input, part of every circuit, is left out). Alone it says
nothing: large circuits overlap by chance, and one method finds other circuits of the same model on other texts. So it is compared with

    uniform          as many edges drawn from all: the shared ones are hypergeometric, exact
    layer-matched    every edge replaced by one from the same sender layer into the same layer's queries, keys, values or MLP, or the logits; every head
                     by one of its layer, every MLP by itself: sampled
    own noise        circuits of the same model from resampled texts (`robustness`) or other seeds (`compare_seeds`)

Edges and nodes are drawn apart: a drawn circuit is not pruned, most of its edges are dead ends, and it touches far more nodes than one found by search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Unpack

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from mechscope.circuits.choosing import Choice, Scored, choose, values_of
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.scores import EdgeScores
from mechscope.errors import DataError, SettingsError
from mechscope.shapes import by_shape

# random pairs of circuits behind an expected overlap
_DRAWS = 50

# which of all edges, or of all heads and MLPs, are in a circuit
Members = Bool[np.ndarray, " part"]


@dataclass(frozen=True)
class Overlap:
    """How much two circuits share.

    Attributes:
        table: One row per `of` (edges, nodes) and `null` (uniform, layer-matched): `jaccard`, `shared`, `first` and `second` (sizes), `expected`, `low`,
            `high` (mean and 95 % band of random circuits) and `p`, the probability that they share at least as many; where sampled, the share of draws,
            the observed one among them.
        edges: Jaccard index of the edges.
        nodes: Jaccard index of the heads and MLPs.
    """

    table: pd.DataFrame
    edges: float
    nodes: float

    __repr__ = by_shape


@dataclass(frozen=True)
class Robustness:
    """How much a circuit depends on which texts it was found on.

    Attributes:
        circuit: Of all texts.
        resampled: ``(resample, 2)``: Jaccard index of edges and of nodes of each bootstrap circuit with `circuit`. They share about 63 % of the texts, so
            this is the generous measure.
        halves: ``(resample, 2)``: the same of two circuits from disjoint random halves: each has half the texts only, so this is the strict one.
        inclusion: Share of the bootstrap circuits that contain each edge.
        table: One row per `comparison` (resample with whole, half with half) and `of` (edges, nodes): `mean`, `low`, `high` (2.5 % and 97.5 % quantiles over
            resamples), `null` (expected of layer-matched random circuits of the same sizes) and `n` resamples.
    """

    circuit: Circuit
    resampled: Float[np.ndarray, "resample 2"]
    halves: Float[np.ndarray, "resample 2"]
    inclusion: Float[np.ndarray, " edge"]
    table: pd.DataFrame

    __repr__ = by_shape


def jaccard(a: Circuit, b: Circuit) -> float:
    """Return the Jaccard index of two circuits' edges; 1 for two empty circuits.

    Raises:
        SettingsError: The circuits are of different graphs.
    """
    _same_graph(a, b)
    return _jaccard(a.edges, b.edges)


def node_jaccard(a: Circuit, b: Circuit) -> float:
    """Return the Jaccard index of the heads and MLPs that two circuits' edges touch; 1 where neither touches any.

    Raises:
        SettingsError: The circuits are of different graphs.
    """
    _same_graph(a, b)
    return _jaccard(a.nodes[1:], b.nodes[1:])


def overlap(a: Circuit, b: Circuit, *, draws: int = 1000, seed: int = 0) -> Overlap:
    """Compare two circuits with each other and with random pairs of the same sizes.

    Args:
        a: A circuit.
        b: Another one of the same graph.
        draws: Number of random pairs for the layer-matched null.
        seed: Seed of the draws.

    Raises:
        SettingsError: The circuits are of different graphs, or there are no draws.
    """
    _same_graph(a, b)
    if draws < 1:
        raise SettingsError(f"a null of {draws} draws: give at least 1")
    random = np.random.default_rng(seed)
    rows = []
    for of, one, other, cell in (("edges", a.edges, b.edges, cells(a.graph)), ("nodes", a.nodes[1:], b.nodes[1:], _node_cells(a.graph))):
        columns = {"of": of, "jaccard": _jaccard(one, other), "shared": (one & other).sum(), "first": one.sum(), "second": other.sum()}
        rows.append(columns | {"null": "uniform"} | _uniform(one, other))
        rows.append(columns | {"null": "layer-matched"} | _matched(one, other, cell, random, draws))
    return Overlap(pd.DataFrame(rows), jaccard(a, b), node_jaccard(a, b))


def random_like(circuit: Circuit, *, number: int, seed: int) -> list[Circuit]:
    """Draw layer-matched random circuits, not pruned.

    Every cell (sender layer, receiver layer, and whether queries, keys, values, the MLP or the logits read) keeps its number of edges.

    Args:
        circuit: The circuit to match.
        number: How many to draw.
        seed: Seed of the draws.
    """
    random = np.random.default_rng(seed)
    cell = cells(circuit.graph)
    counts, by_cell = np.bincount(cell[circuit.edges], minlength=cell.max() + 1), np.sort(cell)
    taken = np.arange(len(cell)) - np.searchsorted(by_cell, by_cell) < counts[by_cell]
    circuits = []
    for _ in range(number):
        # edges in random order, then stably by cell: every cell is shuffled in itself
        order = random.permutation(len(cell))
        edges = np.zeros(len(cell), dtype=bool)
        edges[order[np.argsort(cell[order], kind="stable")][taken]] = True
        circuits.append(Circuit(circuit.graph, edges))
    return circuits


def random_circuits(graph: Graph, size: int, *, number: int, seed: int) -> list[Circuit]:
    """Draw random circuits of a size uniformly from all edges, not pruned.

    Args:
        graph: The edges there are.
        size: Edges of each circuit.
        number: How many to draw.
        seed: Seed of the draws.

    Raises:
        SettingsError: The graph has fewer edges.
    """
    if not 0 <= size <= len(graph):
        raise SettingsError(f"random circuits of {size:,} edges: this graph has {len(graph):,}")
    random = np.random.default_rng(seed)
    return [Circuit(graph, random.permutation(len(graph)) < size) for _ in range(number)]


def robustness(scores: EdgeScores, *, resamples: int = 100, seed: int = 0, **choice: Unpack[Choice]) -> Robustness:
    """Choose circuits again from resampled texts; no model is run.

    Args:
        scores: Scores of the edges, with those of every text.
        resamples: How many bootstrap circuits, and how many pairs of halves.
        seed: Seed of the resampling.
        **choice: Options of `choose`: `rule`, `number` or `fraction` or `threshold`, `by`, `sign`, `higher_is_better`, `prune`, `fill`.

    Raises:
        DataError: The scores of the texts were not kept, or there are fewer than two texts.
        SettingsError: There are no resamples, or the options are not as `choose` needs them.
    """
    if scores.per_text is None:
        raise DataError(f"the scores of {scores.method!r} keep none of every text: score fewer texts, or compare circuits of several runs")
    if (texts := len(scores.per_text)) < 2:
        raise DataError(f"robustness of a circuit found on {texts} text: at least 2 are needed")
    if resamples < 1:
        raise SettingsError(f"robustness over {resamples} resamples: give at least 1")
    random = np.random.default_rng(seed)
    graph, per_text = scores.graph, scores.per_text.astype(np.float64, copy=False)

    def chosen(weights: np.ndarray) -> Circuit:
        return choose((graph, weights @ per_text / weights.sum()), **choice)

    whole = choose(scores, **choice)
    boots = [chosen(weights) for weights in random.multinomial(texts, np.full(texts, 1 / texts), size=resamples)]
    sides = [np.isin(np.arange(texts), random.permutation(texts)[: texts // 2]) for _ in range(resamples)]
    halves = [(chosen(side.astype(float)), chosen((~side).astype(float))) for side in sides]
    rows, values, chance = [], [], _Chance(graph, random)
    for name, pairs in (("resample with whole", [(boot, whole) for boot in boots]), ("half with half", halves)):
        compared = pd.DataFrame([chance.compared(*pair) for pair in pairs])
        values.append(compared[["edges", "nodes"]].to_numpy())
        for of in ("edges", "nodes"):
            low, high = np.quantile(compared[of], [0.025, 0.975])
            mean, null = compared[of].mean(), compared[f"{of}_null"].mean()
            rows.append({"comparison": name, "of": of, "mean": mean, "low": low, "high": high, "null": null, "n": resamples})
    return Robustness(whole, values[0], values[1], np.mean([boot.edges for boot in boots], axis=0), pd.DataFrame(rows))


def compare_seeds(circuits: Sequence[Circuit]) -> pd.DataFrame:
    """Compare the circuits that one method found with several seeds.

    Returns:
        One row per pair: `first`, `second` (places in the list), Jaccard `edges` and `nodes`, and what layer-matched random circuits of the same sizes
        would have: `edges_null`, `nodes_null`. Pairs share circuits and are not independent.

    Raises:
        SettingsError: There are fewer than two circuits, or they are of different graphs.
    """
    if len(circuits) < 2:
        raise SettingsError(f"{len(circuits)} circuits cannot be compared: give those of at least two seeds")
    chance = _Chance(circuits[0].graph, np.random.default_rng(0))
    pairs = combinations(range(len(circuits)), 2)
    return pd.DataFrame([{"first": i, "second": j, **chance.compared(circuits[i], circuits[j])} for i, j in pairs])


def score_correlation(a: Scored, b: Scored) -> float:
    """Return the Spearman correlation of two scorings, signs included, over the edges that both score.

    Returns:
        NaN where fewer than two edges are scored by both or all scores of one are equal.

    Raises:
        SettingsError: The scores are of different graphs.
    """
    (graph, first), (other, second) = values_of(a), values_of(b)
    if graph != other:
        raise SettingsError(f"scores of {graph} cannot be compared with those of {other}: both need one architecture")
    both = ~(np.isnan(first) | np.isnan(second))
    x, y = (rankdata(values[both]) - (both.sum() + 1) / 2 for values in (first, second))
    own = (x @ x) * (y @ y)
    return float(x @ y / np.sqrt(own)) if own > 0 else float("nan")


def cells(graph: Graph) -> Int[np.ndarray, " edge"]:
    """Return a number for each edge that is the same for the same (sender layer, receiver layer, queries/keys/values/MLP/logits)."""
    senders, receivers = graph.edges.T
    # a1.h0<q> reads queries of layer 1: the name without its head
    into = [f"{name.partition('.')[0]}{name[-3:] if '<' in name else ''}" for name in graph.receivers]
    sender = np.array(graph.layer_of(graph.senders))[senders] + 1
    receiver = np.unique(into, return_inverse=True)[1][receivers]
    numbers = np.unique(sender * len(into) + receiver, return_inverse=True)[1]
    # NumPy sorts the smallest integers by radix, three times as fast
    return numbers.astype(np.min_scalar_type(numbers.max()))


def _node_cells(graph: Graph) -> Int[np.ndarray, " node"]:
    """Return a number for each head and MLP that is the same for the heads of a layer."""
    return np.unique([name.partition(".")[0] for name in graph.senders[1:]], return_inverse=True)[1]


def _uniform(one: Members, other: Members) -> dict[str, float]:
    counts, chance = _law(len(one), int(one.sum()), int(other.sum()))
    values = _index(counts, int(one.sum()), int(other.sum()))
    low, high = values[np.searchsorted(chance.cumsum(), [0.025, 0.975])]
    p = chance[counts >= (one & other).sum()].sum()
    return {"expected": chance @ values, "low": low, "high": high, "p": min(1.0, p)}  # a sum of all may round to above 1


def _matched(one: Members, other: Members, cell: np.ndarray, random: np.random.Generator, draws: int) -> dict[str, float]:
    size, first, second = (np.bincount(cell, weights=members).astype(int) for members in (np.ones(len(cell)), one, other))
    # how many two random subsets of a cell share is hypergeometric; which they are does not matter
    shared = random.hypergeometric(first, size - first, second, size=(draws, len(size))).sum(1)
    values = _index(shared, int(first.sum()), int(second.sum()))
    low, high = np.quantile(values, [0.025, 0.975])
    return {"expected": values.mean(), "low": low, "high": high, "p": (1 + (shared >= (one & other).sum()).sum()) / (1 + draws)}


def _law(total: int, first: int, second: int) -> tuple[Int[np.ndarray, " count"], Float[np.ndarray, " count"]]:
    """Return how many elements two uniformly drawn sets can share, and how probable each number is (hypergeometric)."""
    shared = np.arange(max(0, first + second - total), min(first, second) + 1)
    k = shared[:-1]
    # the ratios of neighbouring probabilities are exact, and no factorial overflows
    steps = np.log((first - k) * (second - k)) - np.log((k + 1) * (total - first - second + k + 1))
    logs = np.append(0.0, steps.cumsum())
    chance = np.exp(logs - logs.max())
    return shared, chance / chance.sum()


def _index(shared: Int[np.ndarray, " count"], first: int, second: int) -> Float[np.ndarray, " count"]:
    """Return the Jaccard index of two sets of some sizes by how many elements they share; 1 for two empty sets."""
    return shared / (first + second - shared) if first + second else np.ones(len(shared))


def _jaccard(a: Members, b: Members) -> float:
    return float(_index(np.array([(a & b).sum()]), int(a.sum()), int(b.sum()))[0])


class _Chance:
    """What layer-matched random circuits share: the one chance that overlaps are shown beside."""

    def __init__(self, graph: Graph, random: np.random.Generator) -> None:
        self._cells, self._node_cells, self._random = cells(graph), _node_cells(graph), random

    def compared(self, a: Circuit, b: Circuit) -> dict[str, float]:
        """Return the overlap of two circuits' edges and nodes, and what is expected by chance."""
        observed = {"edges": jaccard(a, b), "nodes": node_jaccard(a, b)}
        parts = {"edges": (a.edges, b.edges, self._cells), "nodes": (a.nodes[1:], b.nodes[1:], self._node_cells)}
        nulls = {f"{of}_null": _matched(*part, self._random, _DRAWS)["expected"] for of, part in parts.items()}
        return observed | nulls


def _same_graph(a: Circuit, b: Circuit) -> None:
    if a.graph != b.graph:
        raise SettingsError(f"circuits of {a.graph} and {b.graph} cannot be compared: both need one architecture")
