"""Edges between latents and errors: what a node does to the metric through another one, with every node between them held (Marks et al. 2024, §3.3).

    edge(u → v) = Σ ∂m/∂v · ∂v/∂u · (u' − u)        ∂v/∂u along the paths on which no other place lies

∂m/∂v is the whole derivative, through everything behind v. With integrated gradients it is its mean on v's way, as in the effect of v, and ∂v/∂u its mean on
the way of u's place, so that the edges of all nodes of a place into v add up to what replacing that place alone does to v. By attribution a node's effect is
the sum of its edges into all nodes behind it and of its edge into the metric, `logits`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.choices import NodeMethod, NodeSource, Quadrature
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, check_fits
from mechscope.errors import SettingsError
from mechscope.features.cut import Cuttable
from mechscope.features.node_effects import TOKENS_PER_BATCH, Moved, check_options, gradients_of, prepare, quadrature_of
from mechscope.features.places import Place
from mechscope.features.standing import Node, Standing, Stream, require
from mechscope.instrument import Execution
from mechscope.stats.inference import benjamini_hochberg, estimate
from mechscope.stats.skewness import ThirdMoments
from mechscope.subject import Subject

END = "logits"
"""What the metric is read from, as the receiver of an edge."""


@dataclass(frozen=True)
class _Graph:
    """The nodes by place, and all edges between them in order.

    Attributes:
        standing: The autoencoders, in the order of the run.
        nodes: By place, in the order given.
        edges: Sender and receiver; None is the metric.
    """

    standing: tuple[Standing, ...]
    nodes: Mapping[Place, tuple[Node, ...]]
    edges: tuple[tuple[Node, Node | None], ...]

    @classmethod
    def of(cls, standing: Sequence[Standing], nodes: Sequence[Node]) -> _Graph:
        by_place: dict[Place, list[Node]] = defaultdict(list)
        require(standing, nodes)
        for node in dict.fromkeys(nodes):
            by_place[node.place].append(node)
        own = tuple(each for each in standing if each.place in by_place)
        order = [each.place for each in own]
        edges = [
            (sender, receiver)
            for at, place in enumerate(order)
            for later in (*order[at + 1 :], None)
            for receiver in (by_place[later] if later is not None else (None,))
            for sender in by_place[place]
        ]
        return cls(own, {place: tuple(found) for place, found in by_place.items()}, tuple(edges))


def node_edges(
    subject: Subject,
    standing: Sequence[Standing],
    pairs: Pairs,
    nodes: Sequence[Node],
    *,
    method: NodeMethod = "integrated-gradients",
    points: int = 10,
    quadrature: Quadrature = "gauss",
    source: NodeSource = "corrupt",
    metric: str = "logit-diff",
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Estimate what each of some nodes does to the clean run's metric through each of those behind it.

    Args:
        subject: The model.
        standing: All autoencoders of the circuit, in the order of the run (`in_order`): what stands between two nodes is held at each of them.
        pairs: The texts.
        nodes: Which nodes.
        method: As for `node_effects`.
        points: Points of integrated gradients.
        quadrature: Where they lie.
        source: What a node becomes.
        metric: `logit-diff`, `probability` or `loss`.
        execution: Tokens of a batch (1,024 by default), progress.

    Returns:
        One row per edge that is not zero on every text: `edge`, `sender`, `receiver` (`logits` for the metric), `metric`, `n` (texts), `effect` (mean over
        texts), `se`, `low`, `high` (95 %), `p`, `q` (Benjamini–Hochberg over the table).

    Raises:
        MechscopeError: Nodes, texts or metric do not fit the model or each other.
    """
    check_options(method, points, source, metric)
    check_fits(subject, pairs)
    graph = _Graph.of(standing, nodes)
    weights = quadrature_of(quadrature, points)
    gathered = PerText(pairs)

    def scores(batch: PairBatch) -> dict[str, np.ndarray]:
        prepared, moved, real = prepare(subject, standing, batch, source=source, metric=metric)
        gradients = gradients_of(prepared, standing, moved, method, weights)
        work = _Batch(graph, prepared, tuple(standing), moved, gradients, real)
        found = work.by_attribution() if method == "attribution" else work.by_integration(weights)
        return {"edges": np.stack([found[edge].double().cpu().numpy() for edge in graph.edges])}

    if not graph.edges:
        raise SettingsError("there are no nodes to draw edges between: lower the threshold of nodes")
    gathered.run(scores, execution, tokens=TOKENS_PER_BATCH, label="edges of latents")
    return _table(graph, gathered["edges"], metric)


def _table(graph: _Graph, values: Float[np.ndarray, "edge text"], metric: str) -> pd.DataFrame:
    some = np.flatnonzero(values.any(1))
    moments = ThirdMoments((len(some),))
    moments.update_many(values[some].T)
    found = estimate(moments)
    named = [(sender.name, END if receiver is None else receiver.name) for sender, receiver in (graph.edges[at] for at in some)]
    return pd.DataFrame(
        {
            "edge": [f"{sender}->{receiver}" for sender, receiver in named],
            "sender": [sender for sender, _ in named],
            "receiver": [receiver for _, receiver in named],
            "metric": metric,
            "n": found.n.astype(int),
            "effect": found.mean,
            "se": found.standard_error,
            "low": found.low,
            "high": found.high,
            "p": found.p,
            "q": benjamini_hochberg(found.p),
        }
    )


Scores = dict[tuple[Node, Node | None], Float[Tensor, " batch"]]


@dataclass(frozen=True)
class _Batch:
    """One batch's edges."""

    graph: _Graph
    prepared: Cuttable
    every: tuple[Standing, ...]
    moved: Mapping[Place, Moved]
    gradients: Mapping[Place, Stream]
    real: Bool[Tensor, "batch token"]

    def by_attribution(self) -> Scores:
        """Take all derivatives where the run is."""
        cut = self.prepared.cut(self.every)
        found: Scores = {}
        order = [each.place for each in self.graph.standing]
        for place, vector in cut.back(None, None, order).items():
            found |= self._sent(place, None, vector)
        for at, receiver in enumerate(self.graph.standing):
            for node, vector in self._vectors(receiver, self.moved[receiver.place].x):
                for place, carried in cut.back(receiver.place, vector, order[:at]).items():
                    found |= self._sent(place, node, carried)
        return found

    def by_integration(self, weights: Sequence[tuple[float, float]]) -> Scores:
        """Take the means of derivatives on the way of each sender's place, with the other places held as they are."""
        found: Scores = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        as_is = {place: own.x for place, own in self.moved.items()}
        for number, sender in enumerate(self.graph.standing):
            own = self.moved[sender.place]
            for at, weight in weights:
                cut = self.prepared.cut(self.every, {**as_is, sender.place: own.x + at * (own.other - own.x)})
                self._weigh(found, self._sent(sender.place, None, cut.back(None, None, (sender.place,))[sender.place]), weight)
                for receiver in self.graph.standing[number + 1 :]:
                    for node, vector in self._vectors(receiver, cut.arrivals[receiver.place].detach()):
                        carried = cut.back(receiver.place, vector, (sender.place,))[sender.place]
                        self._weigh(found, self._sent(sender.place, node, carried), weight)
        return found

    @staticmethod
    def _weigh(found: Scores, part: Scores, weight: float) -> None:
        for edge, value in part.items():
            found[edge] = found[edge].to(value.device) + weight * value.double()

    def _vectors(self, receiver: Standing, arrived: Stream) -> Iterator[tuple[Node, Stream]]:
        """Yield for every node of a place ∂m/∂v · ∂v/∂x, by what arrived there; nothing at tokens that do not count."""
        here = self.real[..., None]
        x = torch.where(here, arrived.to(receiver.decoders), 0.0)
        gradient = torch.where(here, self.gradients[receiver.place].to(x), 0.0)
        codes = receiver.codes(x)
        nodes = self.graph.nodes[receiver.place]
        chosen = [node.latent for node in nodes if node.latent is not None]
        active = codes.columns(torch.tensor(chosen, dtype=torch.int64, device=x.device)).unflatten(0, x.shape[:2]) != 0
        for at, latent in enumerate(chosen):
            slope = torch.where(active[..., at], gradient @ receiver.decoders[latent], 0.0)
            yield Node(receiver.place, latent), slope[..., None] * receiver.encoders[latent]
        if Node(receiver.place) in nodes:
            through = codes.with_values(codes.inner(gradient.flatten(0, 1), receiver.decoders)).decoded(receiver.encoders)
            yield Node(receiver.place), gradient - through.view_as(gradient)

    def _sent(self, place: Place, receiver: Node | None, vector: Stream) -> Scores:
        """Return what each node of a place sends along a vector that was carried to it, text by text."""
        moved, nodes = self.moved[place], self.graph.nodes[place]
        each = next(one for one in self.graph.standing if one.place == place)
        vector = torch.where(self.real[..., None], vector.to(moved.x), 0.0)
        chosen = [node.latent for node in nodes if node.latent is not None]
        products = torch.einsum("btj,btj->bj", vector @ each.decoders[chosen].T, moved.change(chosen))
        found: Scores = {(Node(place, latent), receiver): products[:, at] for at, latent in enumerate(chosen)}
        if Node(place) in nodes:
            found[Node(place), receiver] = (vector * moved.error).sum((1, 2))
        return found
