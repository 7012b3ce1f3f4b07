"""A model as a graph of what writes to the residual stream and what reads from it (Elhage et al. 2021; Hanna et al. 2024).

    senders      embed, a0.h0 … a0.h11, m0, a1.h0 …           write to the residual stream, in this order
    receivers    a0.h0<q> …, a0.h0<k> …, a0.h0<v> …, m0, …, logits      read from it: all queries of a layer, all keys, all values, its MLP

There is an edge from every sender to every receiver that reads after it has written. In parallel blocks (GPT-NeoX, Phi) a layer's MLP does not read
its heads. A grouped-query head has a query, key and value of its own here, though the weights of key and value are shared. Edges have one
fixed order, and scores and membership are arrays over it; names are made at their first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mechscope.errors import SettingsError
from mechscope.instrument.wiring import Wiring
from mechscope.subject import Components, Subject

# edges that a circuit names when it is printed
_NAMED = 6


@dataclass(frozen=True)
class Graph:
    """The edges a model has.

    Attributes:
        n_layers: Number of blocks.
        n_heads: Query heads of a block.
        parallel: Whether a block's MLP reads the residual stream before its heads write.
    """

    n_layers: int
    n_heads: int
    parallel: bool = False

    @classmethod
    def of(cls, subject: Subject) -> Graph:
        """Return the graph of a model; whether its blocks are parallel is seen on a tiny forward pass.

        Raises:
            ModelError: Heads or MLPs read the residual stream in a way that is not supported, or some layers do not attend.
        """
        subject.anatomy.require_all_attending("a graph of edges between heads and MLPs")
        return cls(subject.anatomy.n_layers, subject.anatomy.n_heads, Wiring(subject).parallel)

    @cached_property
    def senders(self) -> tuple[str, ...]:
        """Names of what writes, in order: `embed`, then each layer's heads and MLP."""
        blocks = ([*(f"a{layer}.h{head}" for head in range(self.n_heads)), f"m{layer}"] for layer in range(self.n_layers))
        return ("embed", *(name for block in blocks for name in block))

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        """Names of what reads, in order: each layer's queries, keys, values and MLP, then `logits`."""
        names: list[str] = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}<{part}>" for part in "qkv" for head in range(self.n_heads)]
            names.append(f"m{layer}")
        return (*names, "logits")

    @cached_property
    def real(self) -> Bool[np.ndarray, "sender receiver"]:
        """True where there is an edge."""
        real = np.zeros((len(self.senders), len(self.receivers)), dtype=bool)
        for layer in range(self.n_layers):
            real[: self.heads_of(layer).start, self.readers_of(layer)] = True
            real[: self.heads_of(layer).start if self.parallel else self.heads_of(layer).stop, self.mlp_reader(layer)] = True
        real[:, -1] = True
        return real

    @cached_property
    def edges(self) -> Int[np.ndarray, "edge 2"]:
        """Sender and receiver of each edge, senders outermost."""
        return np.argwhere(self.real)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the edges in order, such as `a0.h3->m5` and `m2->a4.h1<q>`."""
        return tuple(f"{self.senders[sender]}->{self.receivers[receiver]}" for sender, receiver in self.edges)

    @cached_property
    def owner(self) -> Int[np.ndarray, " receiver"]:
        """The sender each receiver belongs to (a head's query to the head); for the logits the number of senders."""
        owners: list[int] = []
        for layer in range(self.n_layers):
            heads = self.heads_of(layer)
            owners += [*range(heads.start, heads.stop)] * 3 + [self.mlp_sender(layer)]
        return np.array([*owners, len(self.senders)])

    def __len__(self) -> int:
        """Return the number of edges."""
        return len(self.edges)

    def heads_of(self, layer: int) -> slice:
        """Return a layer's heads among the senders."""
        start = 1 + layer * (self.n_heads + 1)
        return slice(start, start + self.n_heads)

    def mlp_sender(self, layer: int) -> int:
        """Return a layer's MLP among the senders."""
        return (layer + 1) * (self.n_heads + 1)

    def readers_of(self, layer: int) -> slice:
        """Return the queries, keys and values of a layer among the receivers."""
        start = layer * (3 * self.n_heads + 1)
        return slice(start, start + 3 * self.n_heads)

    def mlp_reader(self, layer: int) -> int:
        """Return a layer's MLP among the receivers."""
        return self.readers_of(layer).stop

    def before_mlp(self, layer: int) -> int:
        """Return how many senders a layer's MLP reads."""
        return self.heads_of(layer).start if self.parallel else self.heads_of(layer).stop

    def index(self, edge: str) -> int:
        """Return the place of an edge in the order.

        Raises:
            SettingsError: The graph has no such edge; the message says why.
        """
        if (place := self._index.get(edge)) is not None:
            return place
        sender, arrow, receiver = edge.partition("->")
        if not arrow:
            raise SettingsError(f"edge {edge!r} is not understood: write a0.h3->m5, m2->a4.h1<q> or embed->logits")
        for name, known, example in ((sender, self.senders, "embed, a0.h3, m2"), (receiver, self.receivers, "a4.h1<q>, m5, logits")):
            if name not in known:
                raise SettingsError(
                    f"edge {edge!r}: {name!r} is not one of this graph's (for example {example}); it has layers 0-{self.n_layers - 1} with "
                    f"heads 0-{self.n_heads - 1}"
                )
        beside = self.parallel and receiver[0] == "m" and sender.startswith(f"a{receiver[1:]}.")
        why = "the MLP of a parallel block does not read its heads" if beside else "a part reads only what was written before it"
        raise SettingsError(f"edge {edge!r} does not exist: {why}")

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def matrix(self, values: np.ndarray, fill: Any = 0) -> np.ndarray:
        """Lay values of the edges out as ``(…, sender, receiver)``."""
        laid = np.full((*values.shape[:-1], *self.real.shape), fill, dtype=values.dtype)
        laid[..., self.real] = values
        return laid

    def flat(self, matrix: np.ndarray) -> np.ndarray:
        """Take the edges' values out of ``(…, sender, receiver)``; the inverse of `matrix`."""
        return matrix[..., self.real]

    def layer_of(self, names: Iterable[str]) -> list[int]:
        """Return the layer of each node or receiver: −1 for the input, the number of layers for the logits."""
        return [-1 if name == "embed" else self.n_layers if name == "logits" else int(name[1:].partition(".")[0]) for name in names]


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of edges.

    Attributes:
        graph: The edges there are.
        edges: Which of them are in the circuit.
    """

    graph: Graph
    edges: Bool[np.ndarray, " edge"]

    def __post_init__(self) -> None:
        if self.edges.shape != (len(self.graph),) or self.edges.dtype != bool:
            raise SettingsError(f"a circuit of this model has {len(self.graph):,} edges as true or false, not {self.edges.shape}")

    def __repr__(self) -> str:
        inside = np.flatnonzero(self.edges)
        names = ", ".join(self.graph.names[edge] for edge in inside[:_NAMED]) + (", …" if len(inside) > _NAMED else "")
        return f"Circuit({len(inside):,} of {len(self.graph):,} edges{': ' * bool(names)}{names})"

    @classmethod
    def of(cls, graph: Graph, names: Sequence[str]) -> Circuit:
        """Return the circuit of some named edges.

        Raises:
            SettingsError: The graph has no such edge.
        """
        edges = np.zeros(len(graph), dtype=bool)
        edges[[graph.index(name) for name in names]] = True
        return cls(graph, edges)

    @classmethod
    def full(cls, graph: Graph) -> Circuit:
        """Return the whole model."""
        return cls(graph, np.ones(len(graph), dtype=bool))

    @classmethod
    def empty(cls, graph: Graph) -> Circuit:
        """Return the circuit without edges."""
        return cls(graph, np.zeros(len(graph), dtype=bool))

    def __len__(self) -> int:
        """Return the number of edges."""
        return int(self.edges.sum())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Circuit) and self.graph == other.graph and bool((self.edges == other.edges).all())

    def __or__(self, other: Circuit) -> Circuit:
        return Circuit(self.graph, self.edges | self._edges_of(other))

    def __and__(self, other: Circuit) -> Circuit:
        return Circuit(self.graph, self.edges & self._edges_of(other))

    def __sub__(self, other: Circuit) -> Circuit:
        return Circuit(self.graph, self.edges & ~self._edges_of(other))

    def _edges_of(self, other: Circuit) -> Bool[np.ndarray, " edge"]:
        if other.graph != self.graph:
            raise SettingsError(
                f"circuits of different models cannot be combined: {len(self.graph):,} edges there are in one, {len(other.graph):,} in the other"
            )
        return other.edges

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the circuit's edges."""
        return tuple(self.graph.names[place] for place in np.flatnonzero(self.edges))

    @property
    def nodes(self) -> Bool[np.ndarray, " sender"]:
        """Which senders an edge of the circuit begins or ends at."""
        touched = np.zeros(len(self.graph.senders) + 1, dtype=bool)  # the logits stand last
        senders, receivers = self.graph.edges[self.edges].T
        touched[senders] = True
        touched[self.graph.owner[receivers]] = True
        return touched[:-1]

    def without(self, nodes: Iterable[str]) -> Circuit:
        """Return the circuit without the edges from and to some nodes.

        Raises:
            SettingsError: A node does not exist.
        """
        return Circuit(self.graph, self.edges & ~edges_at(self.graph, nodes))

    def pruned(self) -> Circuit:
        """Return the circuit without dead ends: edges that no path from `embed` to `logits` takes.

        A node without an incoming edge computes what the other run computes, so nothing of the clean run flows through its outgoing edges.
        """
        graph = self.graph
        matrix = graph.matrix(self.edges)
        reached = np.zeros(len(graph.senders) + 1, dtype=bool)
        reached[0] = True
        # receivers and senders stand in topological order
        for receiver, owner in enumerate(graph.owner):
            reached[owner] |= bool((matrix[:, receiver] & reached[:-1]).any())
        used = np.zeros(len(graph.senders) + 1, dtype=bool)
        used[-1] = True
        for sender in reversed(range(len(graph.senders))):
            used[sender] = bool((matrix[sender] & used[graph.owner]).any())
        senders, receivers = graph.edges.T
        return Circuit(graph, self.edges & reached[senders] & used[graph.owner[receivers]])

    def components(self) -> Components:
        """Return the heads and MLPs that take part in the circuit."""
        heads: list[tuple[int, int]] = []
        mlps: list[int] = []
        for place in np.flatnonzero(self.nodes):
            name = self.graph.senders[place]
            if name.startswith("a"):
                layer, _, head = name[1:].partition(".h")
                heads.append((int(layer), int(head)))
            elif name.startswith("m"):
                mlps.append(int(name[1:]))
        return Components(tuple(heads), tuple(mlps))


def edges_at(graph: Graph, nodes: Iterable[str]) -> Bool[np.ndarray, " edge"]:
    """Mark the edges that begin or end at some nodes.

    Raises:
        SettingsError: A node does not exist.
    """
    places = []
    for name in nodes:
        if name not in graph.senders:
            raise SettingsError(f"node {name!r} is not one of this graph's: write embed, a3.h5 or m3 within layers 0-{graph.n_layers - 1}")
        places.append(graph.senders.index(name))
    senders, receivers = graph.edges.T
    return np.isin(senders, places) | np.isin(graph.owner[receivers], places)


def sums_by_node(graph: Graph, values: Float[np.ndarray, "*rows edge"]) -> Float[np.ndarray, "*rows sender"]:
    """Sum the values of the edges that leave each node: to first order the effect of the node itself."""
    return graph.matrix(values).sum(-1)
