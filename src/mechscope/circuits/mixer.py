"""What every receiver reads in a run of some edge sets: its own mixture of what was written in this run and in the other one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.circuits.graph import Graph
from mechscope.circuits.sender_outputs import SenderOutputs
from mechscope.instrument import Reading
from mechscope.instrument.parts import PARTS
from mechscope.instrument.wiring import Wiring
from mechscope.subject.placement import index_for


class Other:
    """The run that closed edges take their values from.

    Attributes:
        written: What its senders write.
        before: Its residual stream before each block.
        after_heads: The same with what the block's heads write.
        final: Behind the last block.
    """

    def __init__(self, written: SenderOutputs, before: list[Tensor], after_heads: list[Tensor], final: Tensor) -> None:
        self.written, self.before, self.after_heads, self.final = written, before, after_heads, final

    @classmethod
    def of(cls, written: SenderOutputs, wiring: Wiring, like: Float[Tensor, "batch token d_model"]) -> Other:
        """Add up what every sender writes, on the device of the embedding.

        The biases of output projections, which are no sender's, are those of the model that is run.

        Args:
            written: What the senders write.
            wiring: The model that is run.
            like: A residual stream of the batch.
        """
        before, after, stream = [], [], written.embedding.expand_as(like)
        for layer, mlp in enumerate(written.mlp):
            before.append(stream)
            _, bias = wiring.writer(layer)
            stream = stream + written.attention(layer).to(stream.device)
            stream = stream if bias is None else stream + bias.to(stream.device)
            after.append(stream)
            stream = stream + mlp.to(stream.device)
        return cls(written, before, after, stream)

    def middle(self, layer: int, *, parallel: bool) -> Tensor:
        """Return what a layer's MLP reads."""
        return self.before[layer] if parallel else self.after_heads[layer]


class Mixer:
    """Mixes what senders write into what receivers read, for some edge sets side by side.

    Senders before the first closed edge wrote what they write in the clean run: they are shared by all sets.
    """

    def __init__(
        self,
        graph: Graph,
        wiring: Wiring,
        other: Other,
        weights: Float[Tensor, "unit sender receiver"],
        shared: Float[Tensor, "sender batch token d_model"],
        *,
        learning: bool,
    ) -> None:
        """Begin with the senders that all sets share.

        Args:
            graph: The model's edges.
            wiring: How the model reads and writes.
            other: The run that closed edges take their values from.
            weights: How much of the clean value each edge carries in each set.
            shared: What the first senders write in the clean run less what they write in the other one.
            learning: Keep what a backward pass needs.
        """
        self.graph, self.wiring, self.other, self.learning = graph, wiring, other, learning
        self.weights, self.shared = weights, shared
        self._own: list[Tensor] = []
        units, stream = len(weights), self.shared.shape[1:]
        room = 0 if learning else len(graph.senders) - len(self.shared)
        # no memory is touched before something is written into it
        self._buffer = self.shared.new_empty(units, room, *stream)
        self._held = 0

    @property
    def own(self) -> Float[Tensor, "unit sender batch token d_model"]:
        """What the senders write that differ between the sets."""
        if self.learning:
            return torch.cat(self._own, dim=1) if self._own else self._buffer
        return self._buffer[:, : self._held]

    def add(self, differences: Float[Tensor, "unit sender batch token d_model"]) -> None:
        """Add the next senders."""
        differences = differences.to(self.shared.device)
        if self.learning:
            self._own.append(differences)
        else:
            self._buffer[:, self._held : self._held + differences.shape[1]] = differences
        self._held += differences.shape[1]

    def mixed(self, stream: Tensor, receivers: list[int]) -> Float[Tensor, "unit receiver batch token d_model"]:
        """Return what receivers that read the same stream read, each with its own edges open."""
        return self._mix(stream, receivers, self.shared, self.own)

    def at_rows(self, stream: Tensor, reading: Reading) -> Float[Tensor, "unit read d_model"]:
        """Return what the logits read at the rows that are read."""
        own = self.own
        rows = reading.take(own.flatten(0, 1)).unflatten(0, own.shape[:2])
        return self._mix(reading.take(stream[None])[0], [-1], reading.take(self.shared), rows)[:, 0]

    def _mix(self, stream: Tensor, receivers: list[int], shared: Tensor, own: Tensor) -> Tensor:
        units, few = len(self.weights), len(receivers)
        weights = self.weights[:, :, index_for(receivers, self.weights)].transpose(1, 2)  # (unit, receiver, sender)
        alike = weights[..., : len(shared)].flatten(0, 1)
        mixed = torch.addmm(stream.reshape(1, -1), alike, shared.flatten(1)).unflatten(0, (units, few))
        if own.shape[1]:
            # a sender of the same or a later layer has no edge here, so its weight is 0
            rest = weights[..., len(shared) : len(shared) + own.shape[1]]
            mixed = torch.baddbmm(mixed, rest, own.flatten(2))
        return mixed.unflatten(-1, stream.shape)

    def whole(self, stream: Tensor, senders: int) -> Float[Tensor, "unit batch token d_model"]:
        """Return the stream in which all of the first senders have written."""
        hidden = stream + self.shared[:senders].sum(0)
        rest = max(0, senders - len(self.shared))
        return hidden + self.own[:, :rest].sum(1)

    def projections(self, layer: int, partial: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return each head's query, key and value of a layer from what each reads, ``(unit · batch, token, head, d_head)``.

        Args:
            layer: Which block.
            partial: Receivers with a mixture of their own; the others read the whole stream.
        """
        graph, wiring = self.graph, self.wiring
        readers, heads = graph.readers_of(layer), graph.n_heads
        stream, norm = self.other.before[layer], wiring.attention_norm(layer)
        whole = None
        if len(partial) < 3 * heads:
            whole = self.whole(stream, graph.heads_of(layer).start)
            whole = whole if norm is None else norm.module(whole)
        projections = []
        for number, part in enumerate(PARTS):
            reader = wiring.reader(layer, part)
            group = heads // len(reader.weight)
            first = readers.start + number * heads
            own = [receiver for receiver in partial if first <= receiver < first + heads]
            chosen = [receiver - first for receiver in own]
            projected = None
            if whole is not None and len(own) < heads:
                projected = torch.einsum("ubtd,hed->ubthe", whole.to(reader.weight.device), reader.weight)
                projected = projected if reader.bias is None else projected + reader.bias
                projected = projected.repeat_interleave(group, dim=3) if group > 1 else projected
            if own:
                stored = [head // group for head in chosen]
                read = self.mixed(stream, own)
                read = (read if norm is None else norm.module(read)).to(reader.weight.device)
                weight = reader.weight if stored == list(range(len(reader.weight))) else reader.weight[index_for(stored, reader.weight)]
                # (unit, head, batch · token, d_head)
                mine = torch.matmul(read.flatten(2, 3), weight.transpose(1, 2))
                if reader.bias is not None:
                    mine = mine + reader.bias[index_for(stored, reader.bias)][:, None]
                mine = mine.unflatten(2, read.shape[2:4]).permute(0, 2, 3, 1, 4)
                if projected is None:
                    projected = mine
                else:
                    projected = projected.contiguous()
                    projected[:, :, :, index_for(chosen, projected)] = mine
            assert projected is not None  # every head is either partial or not
            projections.append(projected.flatten(0, 1))
        query, key, value = projections
        return query, key, value
