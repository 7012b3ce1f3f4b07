"""Scores from gradients: what senders would write differently, times the gradient at what receivers read.

A score is linear in the gradient, so points of integrated gradients are added up before anything is expanded. Heads' gradients stay where they
are small, at the projections; a layer's are expanded to the residual stream once and meet all senders in one product, together with
the MLP's below, which reads almost the same senders. Norms stand differently at every point: what a norm takes off along x̂,

    ⟨Δ_u, g_v⟩ = ⟨Δ_u, Gᵀ a_v⟩ + Σ_k ⟨Δ_u, x̂_k⟩ · along_k,v          a: gradient at the projections, G: weights with the norm's gain, centred

costs one further product for all points.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.circuits.graph import Graph
from mechscope.circuits.receiver_gradients import ReceiverGradients
from mechscope.instrument import Reading
from mechscope.instrument.parts import PARTS
from mechscope.instrument.wiring import Wiring


class Contraction:
    """Gradients of some passes of one batch, added up, and what they make of senders' differences."""

    def __init__(self, graph: Graph, wiring: Wiring, reading: Reading) -> None:
        """Begin with nothing; `reading` are the rows of the last residual stream that the metric reads."""
        self.graph, self.wiring, self.reading = graph, wiring, reading
        self._heads: dict[int, Tensor] = {}
        self._along: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._mlp: dict[int, Tensor] = {}
        self._logits: Tensor | None = None

    def add(self, readings: ReceiverGradients, weight: float) -> None:
        """Add a pass's gradients, with its weight in the mean over passes."""
        for layer in readings.layers_of_heads:
            gradients = readings.heads(layer)
            self._heads[layer] = _sum(self._heads.get(layer), gradients.at, weight)
            if gradients.standard is not None and gradients.along is not None:
                self._along[layer].append((gradients.standard, gradients.along * weight))
        for layer in readings.layers_of_mlps:
            self._mlp[layer] = _sum(self._mlp.get(layer), readings.mlp_input(layer), weight)
        self._logits = _sum(self._logits, readings.above, weight)

    def into(
        self,
        scores: Float[Tensor, "batch sender receiver"],
        differences: Float[Tensor, "sender batch token d_model"],
        senders: slice = slice(None),
    ) -> None:
        """Add each text's products to its scores; what stands where the graph has no edge means nothing.

        Args:
            scores: Where to add.
            differences: What each sender would write differently.
            senders: Only these senders.
        """
        graph, last = self.graph, self.graph.n_layers - 1
        for layer in range(graph.n_layers + 1):
            if layer <= last and layer in self._heads:
                below = self._mlp.get(layer - 1)
                start, stop, _ = senders.indices(graph.heads_of(layer).start)
                readers = graph.readers_of(layer)
                if stop > start:
                    gradients = self._expanded(layer, below).to(differences.device)
                    products = _products(differences[start:stop], gradients)
                    self._take_off(layer, differences[start:stop], products[..., int(below is not None) :])
                    scores[:, start:stop, readers.start - int(below is not None) : readers.stop] += products
            elif layer - 1 in self._mlp:
                start, stop, _ = senders.indices(graph.before_mlp(layer - 1))
                if stop > start:
                    scores[:, start:stop, graph.mlp_reader(layer - 1)] += _single(differences[start:stop], self._mlp[layer - 1])
        if self._logits is not None:
            rows = self.reading.take(differences[senders])  # (sender, read, d_model)
            products = (rows * self._logits.to(rows.device)).sum(-1).T
            scores[:, senders, -1] = scores[:, senders, -1].index_add(0, self.reading.example.to(products.device), products)

    def _expanded(self, layer: int, below: Tensor | None) -> Float[Tensor, "receiver batch token d_model"]:
        """Carry the gradients at a layer's projections to the residual stream, but for what its norm takes off; the MLP's below comes first."""
        at = self._heads[layer]  # (batch, token, 3 · head, d_head)
        batch, tokens, readers, width = at.shape
        heads = readers // len(PARTS)
        first = int(below is not None)
        whole = at.new_empty(first + readers, batch * tokens, self.wiring.subject.anatomy.d_model)
        if below is not None:
            whole[0] = below.flatten(0, 1)
        rows = at.permute(2, 0, 1, 3).reshape(readers, batch * tokens, width)
        for number, part in enumerate(PARTS):
            weight = self.wiring.folded(layer, part)
            weight = weight.repeat_interleave(heads // len(weight), dim=0) if len(weight) < heads else weight
            mine = slice(number * heads, (number + 1) * heads)
            torch.bmm(rows[mine], weight, out=whole[first:][mine])
        points = self._along[layer]
        if len(points) == 1:  # cheaper than a product with every sender
            ((standard, along),) = points
            whole[first:].addcmul_(standard.flatten(0, 1), along.permute(2, 0, 1).reshape(readers, batch * tokens, 1))
        return whole.unflatten(1, (batch, tokens))

    def _take_off(self, layer: int, differences: Tensor, products: Tensor) -> None:
        """Add what the norm takes off at each of several points, to ``(batch, sender, receiver)``."""
        points = self._along[layer]
        if len(points) < 2:
            return
        senders, batch, tokens, _ = differences.shape
        standard = torch.stack([one for one, _ in points], dim=-1).flatten(0, 1)  # (batch · token, d_model, point)
        within = torch.bmm(differences.flatten(1, 2).transpose(0, 1), standard.to(differences.device))  # (batch · token, sender, point)
        within = within.view(batch, tokens, senders, -1).permute(0, 2, 1, 3).flatten(2)
        along = torch.stack([one for _, one in points], dim=2).flatten(1, 2)  # (batch, token · point, receiver)
        products += torch.bmm(within, along.to(within.device))


def _sum(total: Tensor | None, gradient: Tensor, weight: float) -> Tensor:
    return gradient * weight if total is None else total.add_(gradient, alpha=weight)


def _products(differences: Tensor, gradients: Tensor) -> Float[Tensor, "batch sender receiver"]:
    return torch.bmm(differences.flatten(2).transpose(0, 1), gradients.flatten(2).permute(1, 2, 0))


def _single(differences: Tensor, gradient: Tensor) -> Float[Tensor, "batch sender"]:
    """Multiply with one receiver's gradient; text by text, as a product with a single column is slow in a batch."""
    gradient = gradient.to(differences.device)
    return torch.stack([differences[:, text].flatten(1) @ gradient[text].flatten() for text in range(len(gradient))])
