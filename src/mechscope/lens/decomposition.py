"""The residual decomposition, read in the direction of a metric: what every part of a model wrote, as a share of some logits.

The last residual stream is a sum, x_L = embedding + Σ_l (Σ_h a_l.h + b_l + m_l), and with the final norm's scale frozen at its value in this run logits
are linear in it (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits": direct path and residual stream). So a metric that weighs
logits has a direction u in the residual stream, and a part that wrote w contributes scale · ⟨w, u⟩. Directions are pulled through W_O and the
MLP's last map before they meet z and the neurons: no head's output is ever expanded to d_model. Behind a norm after attention or MLP (Gemma 2/3) what
a head or neuron writes is taken with that norm's gain and frozen scale.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechscope.data.pairs import PairBatch
from mechscope.errors import ModelError
from mechscope.instrument import Reading, Recording, Walk, observed, record, unembed
from mechscope.instrument.kernels import statistics_dtype
from mechscope.instrument.norms import Norm, recognised
from mechscope.instrument.readout import Readout
from mechscope.instrument.record import Site
from mechscope.instrument.wiring import Wiring
from mechscope.lens.question import ROWS, Question
from mechscope.subject import Subject
from mechscope.subject.linear import oriented_weight


@dataclass(frozen=True)
class Part:
    """A summand of a metric.

    Attributes:
        component: Its name: `a3.h5`, `mixer3`, `m3`, `a3 bias`, `m3 bias`, `embed`, `position`, `constant`.
        kind: `embedding`, `position`, `head`, `attention bias`, `mixer` (of a layer that does not attend), `mlp` (what the neurons write), `mlp bias` or
            `constant`.
        layer: −1 where there is none.
        head: −1 where there is none.
    """

    component: str
    kind: str
    layer: int = -1
    head: int = -1


@dataclass(frozen=True)
class Contributions:
    """What every part contributes to each row's metric.

    Attributes:
        parts: ``(read, part)``; their sum, plus what the soft cap changes, is the metric but for rounding.
        neurons: ``(read, neuron)`` of chosen layers: they sum to their MLP's part.
        cap: ``(read)``: what a soft cap on the logits (Gemma 2) changes in the metric; 0 without one.
        metric: ``(read)``: the metric of the logits that the model itself gives out.
    """

    parts: Float[Tensor, "read part"]
    neurons: dict[int, Float[Tensor, "read neuron"]]
    cap: Float[Tensor, " read"]
    metric: Float[Tensor, " read"]


class Decomposition:
    """A model taken apart along its residual stream, with its weights as they act now (an active adapter's change included).

    Attributes:
        subject: The model.
        wiring: How its heads read and write.
        readout: How logits are read off its last residual stream.
        parts: The summands, in the order of the model.
    """

    def __init__(self, subject: Subject) -> None:
        """Find out what writes to the residual stream.

        Raises:
            ModelError: Something stands between the parts and the residual stream, or between it and the logits, that is not supported.
        """
        self.subject, self.dtype = subject, statistics_dtype(subject.dtype)
        self.wiring, self.readout = Wiring(subject), Readout.of(subject)
        blocks = subject.anatomy.blocks
        self._positions = _position_embeddings(subject)
        with subject.active():
            self._mlp_norms = [norm_behind_mlp(subject, layer) for layer in range(len(blocks))]
        self.parts = tuple(self._parts())

    def _parts(self) -> list[Part]:
        anatomy, norm = self.subject.anatomy, self.readout.norm
        parts = [Part("embed", "embedding")]
        if self._positions:
            parts.append(Part("position", "position"))
        for layer in range(anatomy.n_layers):
            if layer in anatomy.mixing:
                parts.append(Part(f"mixer{layer}", "mixer", layer))
            else:
                parts += [Part(f"a{layer}.h{head}", "head", layer, head) for head in range(anatomy.n_heads)]
                if self.wiring.writer(layer)[1] is not None:
                    parts.append(Part(f"a{layer} bias", "attention bias", layer))
            parts.append(Part(f"m{layer}", "mlp", layer))
            if anatomy.blocks[layer].experts is None and self._down(layer)[1] is not None:
                parts.append(Part(f"m{layer} bias", "mlp bias", layer))
        if self.readout.bias is not None or (norm is not None and norm.shift is not None):
            parts.append(Part("constant", "constant"))
        return parts

    @torch.no_grad()
    def of(self, batch: PairBatch, question: Question, *, neurons: Collection[int] = ()) -> Contributions:
        """Run a batch's clean texts and say what every part contributed.

        Args:
            batch: The texts.
            question: The metric.
            neurons: Layers whose neurons are wanted one by one.
        """
        taken, wanted = question.reading, {}
        with self.subject.active(), observed(self.subject):
            direction, constant = question.directions(self.readout, self.dtype)
            walk, position = self.embedded(batch)
            columns = [self._along(taken, walk.hidden, direction)]
            if position is not None:
                of_position = self._along(taken, position.expand_as(walk.hidden), direction)
                columns = [columns[0] - of_position, of_position]
            hidden = walk.hidden
            for layer in range(self.subject.anatomy.n_layers):
                block = self.subject.anatomy.blocks[layer]
                # a mixture of experts has no neurons: its MLP is one part
                inside: tuple[Site, ...] = () if block.last_map is None else ("neuron",)
                with record(self.subject, "z" if block.attends else "mixer_output", *inside, "mlp_output", layers=[layer]) as written:
                    hidden = walk.step(layer, hidden)
                if block.attends:
                    columns.append(self.heads(layer, taken.take(written["z", layer][None])[0], direction))
                    columns += self._bias(self.wiring.writer(layer)[1], direction)
                else:
                    columns.append(self._along(taken, written["mixer_output", layer], direction))
                mlp, each = self._mlp(layer, written, taken, direction, each=layer in neurons)
                columns += mlp
                if each is not None:
                    wanted[layer] = each
            rows = taken.take(hidden[None])[0]
            scale = self.readout.scale(rows.to(self.dtype)).cpu()
            pieces = [slice(start, start + ROWS) for start in range(0, len(rows), ROWS)]
            metric = torch.cat([question.score(unembed(self.subject, rows[piece]).to(self.dtype), piece) for piece in pieces])
            cap = torch.cat([self._cap(rows[piece].to(self.dtype), question, piece) for piece in pieces])
        parts = torch.cat([column.cpu().view(len(taken), -1) for column in columns], dim=1) * scale
        if self.parts[-1].kind == "constant":
            parts = torch.cat([parts, constant.cpu()[:, None]], dim=1)
        each_neuron = {layer: (each.cpu() * scale).double() for layer, each in wanted.items()}
        return Contributions(parts.double(), each_neuron, cap.double().cpu(), metric.double().cpu())

    def heads(self, layer: int, z: Float[Tensor, "read head d_head"], direction: Tensor) -> Float[Tensor, "read head"]:
        """Return ⟨what each head wrote, direction⟩, before the final norm's scale."""
        return (z.to(self.dtype) * self.pulled(layer, z, direction)).sum(-1)

    def pulled(self, layer: int, z: Float[Tensor, "read head d_head"], direction: Tensor) -> Float[Tensor, "read head d_head"]:
        """Pull directions through each head's W_O, and through the norm behind attention with its scale at these z."""
        weight, _ = self.wiring.writer(layer)
        pulled = torch.einsum("rd,hed->rhe", direction.to(weight.device), weight.to(self.dtype))
        scale = self.wiring.written_scale(layer, z)
        return pulled if scale is None else pulled * scale.to(self.dtype)

    def _mlp(
        self, layer: int, written: Recording, taken: Reading, direction: Tensor, *, each: bool
    ) -> tuple[list[Tensor], Float[Tensor, "read neuron"] | None]:
        """Return what an MLP's neurons together and its bias contribute, and with `each` the neurons one by one."""
        whole = self._along(taken, written["mlp_output", layer], direction)
        if not each and self.subject.anatomy.blocks[layer].experts is not None:
            return [whole], None
        weight, bias = self._down(layer)
        if bias is None and not each:
            return [whole], None
        neurons, norm = taken.take(written["neuron", layer][None])[0], self._mlp_norms[layer]
        if norm is not None:
            before = self.subject.anatomy.blocks[layer].mlp_down(neurons)
            direction = direction.to(before.device) * norm.gain.to(self.dtype) * norm.normalised(before.to(self.dtype))[1]
        of_bias = self._bias(bias, direction)
        together = [whole - of_bias[0], *of_bias] if of_bias else [whole]
        if not each:
            return together, None
        return together, neurons.to(self.dtype) * (direction.to(weight.device) @ weight.to(self.dtype))

    def _down(self, layer: int) -> tuple[Float[Tensor, "d_model neuron"], Float[Tensor, " d_model"] | None]:
        """Return the MLP's last map as it acts now."""
        block = self.subject.anatomy.blocks[layer]
        weight, bias = self.subject.linear(block.mlp_down)
        return (weight, bias) if block.multiplier == 1.0 else (weight * block.multiplier, None if bias is None else bias * block.multiplier)

    def _along(self, taken: Reading, values: Float[Tensor, "batch token d_model"], direction: Tensor) -> Float[Tensor, " read"]:
        """Return ⟨what was written at the rows that are read, direction⟩."""
        return (taken.take(values[None])[0].to(self.dtype) * direction.to(values.device)).sum(-1)

    def _bias(self, bias: Tensor | None, direction: Tensor) -> list[Float[Tensor, " read"]]:
        return [] if bias is None else [direction.to(bias.device) @ bias.to(self.dtype)]

    def embedded(self, batch: PairBatch) -> tuple[Walk, Float[Tensor, "batch token d_model"] | None]:
        """Begin a pass, and return what learned positions add to the embedding, in families that have them."""
        seen: list[Tensor] = []
        handles = [module.register_forward_hook(lambda _, args, output: seen.append(output)) for module in self._positions]
        try:
            walk = Walk(self.subject, batch.clean, batch.real)
        finally:
            for handle in handles:
                handle.remove()
        return walk, torch.stack([output.to(walk.hidden.device).expand_as(walk.hidden) for output in seen]).sum(0) if seen else None

    def _cap(self, hidden: Float[Tensor, "some d_model"], question: Question, rows: slice) -> Float[Tensor, " some"]:
        """Return what the soft cap changes in some rows' metric."""
        if self.readout.softcap is None:
            return hidden.new_zeros(len(hidden))
        logits = self.readout.logits(hidden)
        return question.score(self.readout.capped(logits), rows) - question.score(logits, rows)


def _position_embeddings(subject: Subject) -> list[nn.Module]:
    """Find learned embeddings of positions: tables outside the blocks that are not the tokens' (with what an adapter wraps around them)."""
    anatomy = subject.anatomy
    others = {id(part) for module in (anatomy.embedding, *(block.module for block in anatomy.blocks)) for part in module.modules()}
    tables = [
        module
        for module in anatomy.backbone.modules()
        if any(isinstance(part, nn.Embedding) for part in module.modules()) and not any(id(part) in others for part in module.modules())
    ]
    inner = {id(part) for module in tables for part in module.modules() if part is not module}
    return [module for module in tables if id(module) not in inner]


def norm_behind_mlp(subject: Subject, layer: int) -> Norm | None:
    """Return the norm between an MLP and the residual stream, of families that have one (Gemma 2/3)."""
    block = subject.anatomy.blocks[layer]
    if block.mlp_behind is None:
        return None
    some = block if block.attends else subject.anatomy.blocks[subject.anatomy.attending[0]]
    norm = recognised(subject.family, block.mlp_behind, oriented_weight(some.output.module)[:, 0])
    if norm.centred or norm.shift is not None:
        raise ModelError(f"{subject.family}: a norm with a mean or bias stands behind the MLP of block {layer}: it cannot be taken apart")
    return norm
