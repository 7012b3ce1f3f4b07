"""m(C): the metric when the circuit's edges carry clean values and all others those of another run (Conmy et al. 2023; Hanna et al. 2024).

Every receiver v (a head's query, key or value, an MLP, the logits) reads a residual stream of its own:

    x_v = x'_v + Σ_u w(u→v) · (what u writes here − what u writes in the other run)

with x' the other run's residual stream and w = 1 for the circuit's edges, else 0; in between, an edge carries a mixture. So all of a layer's
receivers cost one matrix product with the senders' differences, then each passes its norm and its own weights, and attention and MLP run as ever.

    1. Receivers before the first closed edge compute what the clean run computed: nothing is run, many edge sets share it.
    2. From there on every receiver gets its mixture.
    3. Behind the last closed edge all receivers read the same stream: the model's own blocks run.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.circuits.graph import Graph
from mechscope.circuits.mixer import Mixer, Other
from mechscope.circuits.sender_outputs import SITES, SenderOutputs, Source, differences, expanded, scaled, written_in
from mechscope.data.pairs import PairBatch
from mechscope.data.scoring import fetched, metric_of, score
from mechscope.errors import SettingsError
from mechscope.instrument import CachedRun, Reading, observed
from mechscope.instrument.parts import attention_of, mlp_of
from mechscope.instrument.substitutes import fused_activations
from mechscope.instrument.walk import Walk
from mechscope.instrument.wiring import Wiring
from mechscope.subject import Subject
from mechscope.subject.placement import sent

# numbers that edge sets side by side may hold at once: 256 MiB in float32
_NUMBERS = 2**26
# what errors call a run of some edges
RUN = "a circuit's run"


class CircuitRuns:
    """A batch of pairs, ready to run the model with any set of edges.

    Attributes:
        graph: The model's edges.
        batch: The pairs.
        metric: What is measured.
        clean: ``(batch)``: the metric with all edges.
        corrupt: ``(batch)``: the metric without edges.
    """

    @torch.no_grad()
    def __init__(self, subject: Subject, batch: PairBatch, metric: str = "logit-diff", *, source: Source = "corrupt") -> None:
        """Run the clean texts, and those the closed edges take their values from.

        Args:
            subject: The model.
            batch: The pairs.
            metric: One of `mechscope.data.metrics.METRICS`.
            source: What closed edges carry: values of the `corrupt` run, `zero`, means (`SenderOutputs.mean_over`), or another model's clean run.

        Raises:
            MechscopeError: The pairs, the metric or the model cannot be used.
        """
        self.graph = Graph.of(subject)
        self.subject, self.batch, self.wiring = subject, batch, Wiring(subject)
        self._clean = CachedRun(subject, batch.clean, batch.real, sites=SITES)
        # where mixtures are made: on the device of what the first block reads
        self._device = self._clean.input_of(0).device
        self.metric = metric_of(metric, batch, self._clean)
        self._reading = Reading.of(self.metric.where)
        self._clean_written = SenderOutputs.by(self._clean, self.wiring)
        self._other = Other.of(written_in(source, batch, self._clean_written), self.wiring, self._clean.input_of(0))
        self.clean: Float[Tensor, " batch"] = self._score(self._clean.read(self._reading)[None], read=True)[0]
        self.corrupt: Float[Tensor, " batch"] = self._score(self._other.final[None])[0]
        self._differences: Tensor | None = None
        self._walks: dict[int, Walk] = {}
        graph = self.graph
        place = [2 * layer for layer in range(graph.n_layers) for _ in range(3 * graph.n_heads + 1)]
        for layer in range(graph.n_layers):
            place[graph.mlp_reader(layer)] += 1
        self._edges = torch.from_numpy(graph.edges)
        # where each edge's receiver stands: 2·layer for heads, 2·layer + 1 for an MLP, then the logits
        self._place = torch.tensor([*place, 2 * graph.n_layers])[self._edges[:, 1]]
        self._ends = self._edges.T.to(self._device)

    def run(self, edges: Tensor) -> Float[Tensor, "units batch"]:
        """Return the metric with only some edges carrying clean values.

        Args:
            edges: ``(units, edge)``: one set of edges per unit, true or false, or how much of the clean value each carries (0 to 1). If it
                requires a gradient, so does the result.

        Raises:
            SettingsError: There is not one value for each edge.
            ModelError: The result is not finite.
        """
        whole = self.launch(edges)
        fetched(whole, of=RUN)
        return whole

    def launch(self, edges: Tensor) -> Float[Tensor, "units batch"]:
        """Return what `run` does while a device may still work on it, so that it may not be finite; for `fetched`."""
        if edges.ndim != 2 or edges.shape[1] != len(self.graph):
            raise SettingsError(f"edge sets have shape {tuple(edges.shape)}, this model needs (sets, {len(self.graph):,} edges)")
        learning = torch.is_grad_enabled() and edges.requires_grad
        # what is run is decided on the CPU, so that no device is waited for in between
        closed = edges.detach().cpu() != 1
        edges = sent(edges, self._device)
        end = 2 * self.graph.n_layers + 1
        first = torch.where(closed, self._place, end).amin(1)
        last = torch.where(closed, self._place, -1).amax(1)
        parts = []
        order = torch.arange(len(edges)) if learning else first.argsort(stable=True)
        with torch.set_grad_enabled(learning), observed(self.subject), fused_activations(self.subject):
            start = 0
            while start < len(order):
                begin = 0 if learning else int(first[order[start]])
                at_once = self._at_once(begin, end if learning else int(last[order[start:]].amax()))
                chunk = order[start : start + at_once]
                # sets that begin further up wait for their own pass, unless it is this place
                same = chunk if learning else chunk[first[chunk] // 2 == begin // 2]
                here = edges if len(same) == len(edges) and learning else edges[sent(same, edges.device)]
                parts.append(self._run(here, closed[same], begin, end if learning else int(last[same].amax()), learning=learning))
                start += len(same)
        whole = torch.cat(parts)
        return whole[sent(order.argsort(), whole.device)]

    def _at_once(self, begin: int, last: int) -> int:
        """Return how many edge sets fit side by side."""
        graph, stream = self.graph, self._clean.input_of(0).numel()
        senders = (min(last, 2 * graph.n_layers) // 2 - begin // 2) * (graph.n_heads + 1)
        return max(1, _NUMBERS // (stream * (senders + 6 * graph.n_heads + 8)))

    def _run(self, edges: Tensor, closed: Tensor, first: int, last: int, *, learning: bool) -> Tensor:
        """Run some edge sets that are whole before one place and behind another."""
        graph, layers = self.graph, self.graph.n_layers
        units = len(edges)
        if first > 2 * layers:
            return self.clean.expand(units, -1)
        weights = torch.zeros(units, *graph.real.shape, dtype=self.subject.dtype, device=edges.device)
        senders, receivers = self._ends
        weights = weights.index_put((torch.arange(units, device=edges.device)[:, None], senders, receivers), edges.to(weights.dtype))
        mixer = Mixer(self.graph, self.wiring, self._other, weights, self.clean_differences(self._shared(first)), learning=learning)
        walk = self._walk(units)
        for layer in range(first // 2, layers):
            if 2 * layer > last:
                hidden = mixer.whole(self._other.before[layer], graph.heads_of(layer).start)
                return self._score(walk.run(hidden.flatten(0, 1), start=layer).unflatten(0, (units, -1)))
            if 2 * layer >= first:
                z = attention_of(walk, layer, *mixer.projections(layer, self._partial(closed, layer, learning=learning)))
                if last == 2 * layer:
                    return self._finish(walk, mixer, layer, z, units)
                mixer.add(self._heads(layer, z, units))
            (read,) = mixer.mixed(self._other.middle(layer, parallel=graph.parallel), [graph.mlp_reader(layer)]).unbind(1)
            mlp = mlp_of(walk, layer, read.flatten(0, 1)).unflatten(0, (units, -1))
            if last == 2 * layer + 1:
                hidden = mixer.whole(self._other.after_heads[layer], graph.heads_of(layer).stop).to(mlp.device) + mlp
                return self._score(walk.run(hidden.flatten(0, 1), start=layer + 1).unflatten(0, (units, -1)))
            mixer.add((mlp - self._other.written.mlp[layer].to(mlp.device))[:, None])
        return self._score(mixer.at_rows(self._other.final, self._reading), read=True)

    def _finish(self, walk: Walk, mixer: Mixer, layer: int, z: Tensor, units: int) -> Tensor:
        """Go on from a layer's z where nothing behind it is closed: heads need not be kept separate any more."""
        before = mixer.whole(self._other.before[layer], self.graph.heads_of(layer).start).flatten(0, 1).to(z.device)
        weight, bias = self.wiring.writer(layer)
        written = scaled(self.wiring, layer, z).flatten(2) @ weight.flatten(0, 1)
        after = before + (written if bias is None else written + bias)
        hidden = after + mlp_of(walk, layer, before if self.graph.parallel else after)
        return self._score(walk.run(hidden, start=layer + 1).unflatten(0, (units, -1)))

    def _heads(self, layer: int, z: Tensor, units: int) -> Tensor:
        """Return what each head writes less what it writes in the other run, ``(unit, head, batch, token, d_model)``."""
        own, other = scaled(self.wiring, layer, z).unflatten(0, (units, -1)), self._other.written
        if other.wiring.subject is self.subject:
            return expanded(self.wiring, layer, (own - other.z[layer]).flatten(0, 1)).unflatten(1, (units, -1)).transpose(0, 1)
        return expanded(self.wiring, layer, own.flatten(0, 1)).unflatten(1, (units, -1)).transpose(0, 1) - other.heads(layer).to(z.device)

    def _partial(self, closed: Tensor, layer: int, *, learning: bool) -> list[int]:
        """Return the receivers of a layer's heads that some unit does not let read everything."""
        readers = self.graph.readers_of(layer)
        if learning:
            return list(range(readers.start, readers.stop))
        receivers = self._edges[:, 1]
        inside = (receivers >= readers.start) & (receivers < readers.stop)
        return sorted(set(receivers[inside & closed.any(0)].tolist()))

    def _score(self, hidden: Tensor, *, read: bool = False) -> Tensor:
        rows = hidden if read else self._reading.take(hidden)
        return score(self.subject, rows, self.metric).to(self._device)

    def _walk(self, units: int) -> Walk:
        if units not in self._walks:
            real = self._clean.real
            repeated = None if real is None else real.repeat(units, 1)
            self._walks = {units: Walk(self.subject, self._clean.input_ids.repeat(units, 1), repeated)}
        return self._walks[units]

    def _shared(self, first: int) -> int:
        """Return how many senders write before a place, so that they write what they write in the clean run."""
        if first == 2 * self.graph.n_layers:
            return len(self.graph.senders)
        heads = self.graph.heads_of(first // 2)
        return heads.stop if first % 2 else heads.start

    def clean_differences(self, senders: int) -> Float[Tensor, "sender batch token d_model"]:
        """Return what the first senders write in the clean run less what they write in the other one; cached for later calls."""
        if self._differences is None or len(self._differences) < senders:
            self._differences = differences(self.graph, self._clean_written, self._other.written, senders=senders)
        return self._differences[:senders]
