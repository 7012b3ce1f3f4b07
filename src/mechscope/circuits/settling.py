"""From gates that nearly tie to a circuit of exactly the size asked for: ties are broken by what circuits are worth when they are run.

Learned gates order the edges, but around the cut their order is chance, and edges that lead nowhere (no path from `embed` to `logits` takes them) fill
places that others need. So the circuit is first some edges too large and without dead ends; then edges near the cut are taken away one at a time, always
the one without which the circuit stays nearest to the model (backward elimination), down to the size asked for. Where that leaves fewer, because a path
went as a whole, it is filled up with the single edges that bring it nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Float, Int

from mechscope.circuits.graph import Circuit, Graph

# edges above and below the cut whose order is decided by running circuits
_WINDOW = 8
# the farthest that edges behind the cut are looked for, in places
_LOOKED_AT = 64

Worth = Callable[[Bool[np.ndarray, "circuit edge"]], Float[np.ndarray, " circuit"]]


def settled(graph: Graph, order: Int[np.ndarray, " edge"], size: int, distance: Worth) -> Circuit:
    """Return a circuit of some size without dead ends.

    Args:
        graph: The edges.
        order: All edges, the most important first.
        size: How many the circuit has.
        distance: How far each of some circuits is from the model, less being better; equal circuits are as far.
    """
    rank = np.empty(len(order), dtype=int)
    rank[order] = np.arange(len(order))
    circuit = _shrunk(_first(graph, order, min(len(order), size + _WINDOW)), rank, size, distance)
    while len(circuit) < size and (larger := _larger(circuit, rank)):
        circuit = _best(larger, distance)
    # one too many where the next were only to be had as a pair
    return _shrunk(circuit, rank, size, distance)


def _shrunk(circuit: Circuit, rank: Int[np.ndarray, " edge"], size: int, distance: Worth) -> Circuit:
    """Take edges away one at a time, down to a size; to fewer only where all that is left there goes as a whole."""
    while len(circuit) > size:
        # the surest edges are not questioned
        inside = np.flatnonzero(circuit.edges)
        weakest = inside[np.argsort(-rank[inside], kind="stable")][: 2 * _WINDOW]
        smaller = _distinct(_turned(circuit, edge).pruned() for edge in weakest)
        circuit = _best([one for one in smaller if len(one) >= size] or smaller, distance)
    return circuit


def _larger(circuit: Circuit, rank: Int[np.ndarray, " edge"]) -> list[Circuit]:
    """Return the circuit with one edge more, or, where it has all edges among its nodes, with one node more; the first in rank."""
    senders, receivers = circuit.graph.edges.T
    owners = circuit.graph.owner[receivers]
    inside = np.append(circuit.nodes, True)
    inside[0] = True
    single = np.flatnonzero(~circuit.edges & inside[senders] & inside[owners])
    if len(single):
        return [_turned(circuit, edge) for edge in single[np.argsort(rank[single])][:_LOOKED_AT]]
    found = []
    for node in np.flatnonzero(~inside):
        into, out = np.flatnonzero((owners == node) & inside[senders]), np.flatnonzero((senders == node) & inside[owners])
        pair = [edges[np.argmin(rank[edges])] for edges in (into, out)]
        found.append((rank[pair].max(), _turned(circuit, *pair)))
    return [larger for _, larger in sorted(found, key=lambda each: each[0])][:_LOOKED_AT]


def _first(graph: Graph, order: Int[np.ndarray, " edge"], least: int) -> Circuit:
    """Return the circuit of the fewest first edges of which so many are no dead ends."""
    low, high = least, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_of(graph, order[:middle]).pruned()) >= least else (middle + 1, high)
    return _of(graph, order[:low]).pruned()


def _of(graph: Graph, edges: Int[np.ndarray, " some"]) -> Circuit:
    chosen = np.zeros(len(graph), dtype=bool)
    chosen[edges] = True
    return Circuit(graph, chosen)


def _turned(circuit: Circuit, *edges: int) -> Circuit:
    """Return the circuit with some edges added that it lacks, or taken away that it has."""
    turned = circuit.edges.copy()
    turned[list(edges)] ^= True
    return Circuit(circuit.graph, turned)


def _distinct(circuits: Iterable[Circuit]) -> list[Circuit]:
    return list({circuit.edges.tobytes(): circuit for circuit in circuits}.values())


def _best(circuits: list[Circuit], distance: Worth) -> Circuit:
    """Return the nearest circuit; of several the first."""
    return circuits[int(np.argmin(distance(np.stack([circuit.edges for circuit in circuits]))))]
