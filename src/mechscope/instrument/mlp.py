"""MLPs taken apart: neurons = act(W_in x̂ + b), or act(W_gate x̂ + b) ⊙ (W_in x̂ + b) where they are gated, written by W_out.

Which map is which is decided by what it does on four tokens and not by its name: the map (or the half of a fused one) whose output goes into the
activation, the one it is multiplied with, and that their product is what the last map reads. What does something else is refused by name.
The norm an MLP reads through, and a norm behind it (Gemma 2/3), are folded into the weights: gain and centring; their scales are a token's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechscope.errors import ModelError, SettingsError
from mechscope.instrument.norms import Norm, recognised
from mechscope.instrument.walk import Walk
from mechscope.instrument.wiring import Wiring
from mechscope.subject import Subject
from mechscope.subject.anatomy import Block


@dataclass(frozen=True)
class Reading:
    """What neurons read, on one side: weight · x̂ + constant goes into the activation (or is multiplied with what comes out of it).

    Attributes:
        weight: ``(neuron, d_model)``, the norm's gain and centring folded in.
        constant: ``(neuron,)``: the bias and what the norm's shift brings.
    """

    weight: Float[Tensor, "neuron d_model"]
    constant: Float[Tensor, " neuron"]


@dataclass(frozen=True)
class Mlp:
    """One layer's neurons.

    Attributes:
        norm: What they read through; None for the bare residual stream.
        up: What is multiplied with the activation in gated MLPs, what goes into the activation in others.
        gate: What goes into the activation of gated MLPs; None in others.
        down: ``(neuron, d_model)``: what a neuron writes per unit of its activation; behind a norm, its gain is folded in and its scale is not.
        bias: ``(d_model,)``: what is written for no neuron; None for nothing.
    """

    norm: Norm | None
    up: Reading
    gate: Reading | None
    down: Float[Tensor, "neuron d_model"]
    bias: Float[Tensor, " d_model"] | None


@dataclass(frozen=True)
class _Piece:
    """A linear map of an MLP, or a half of a fused one: `width` output features from `start`."""

    name: str
    start: int


@dataclass(frozen=True)
class Parts:
    """The modules of a block's MLP.

    Attributes:
        activation: The activation function.
        up: The map multiplied with the activation in gated MLPs, or the one that goes into the activation.
        gate: The map that goes into the activation of gated MLPs.
        behind: A norm behind the MLP.
    """

    activation: nn.Module
    up: _Piece
    gate: _Piece | None
    behind: Norm | None


@dataclass
class Seen:
    """What a block's MLP computed: neurons, and what came out of the activation (in gated MLPs: how far the gates are open)."""

    neurons: Float[Tensor, "... neuron"]
    activation: Float[Tensor, "... neuron"]


class Mlps:
    """A model's MLPs, with the weights as they act now (an active adapter's change included).

    Attributes:
        subject: The model.
        parts: The modules of each layer's MLP.
        widths: The number of neurons of each layer.
    """

    def __init__(self, subject: Subject) -> None:
        """Find the maps, activations and norms of every layer.

        Raises:
            ModelError: An MLP is not of a known kind; the message says how.
        """
        for block in subject.anatomy.blocks:
            _ = block.mlp_down  # a mixture of experts says that it has no neurons
        self.subject, self._wiring = subject, Wiring(subject)
        self.parts = _discovered(subject)
        self.widths = tuple(block.d_mlp for block in subject.anatomy.blocks)
        self._linears: dict[str, tuple[Tensor, Tensor | None]] = {}

    def __getitem__(self, layer: int) -> Mlp:
        """Return one layer's weights."""
        parts, block = self.parts[layer], self.subject.anatomy.blocks[layer]
        down, bias = self._linear(block.mlp_linears[-1])
        gain = None if parts.behind is None else parts.behind.gain
        if block.multiplier != 1.0:
            gain = down.new_tensor(block.multiplier) if gain is None else gain * block.multiplier
        return Mlp(
            self._wiring.mlp_norm(layer),
            self._reading(layer, parts.up),
            None if parts.gate is None else self._reading(layer, parts.gate),
            down.T if gain is None else down.T * gain,
            bias if gain is None or bias is None else bias * gain,
        )

    @contextlib.contextmanager
    def watched(self, layer: int) -> Iterator[Seen]:
        """Keep what a layer's MLP computes inside the context."""
        nothing = torch.empty(0)
        seen = Seen(nothing, nothing)

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.neurons = args[0]

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen.activation = output

        handles = [
            self.subject.anatomy.blocks[layer].mlp_down.register_forward_pre_hook(before),
            self.parts[layer].activation.register_forward_hook(after),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def chosen(
        self, layers: Collection[int] | None, neurons: Collection[tuple[int, int]] | None
    ) -> Iterator[tuple[int, Int[Tensor, " some"]]]:
        """Yield every layer of a choice with its chosen neurons, both in ascending order.

        Args:
            layers: Whole layers.
            neurons: Single neurons as (layer, neuron); with neither, all neurons of all layers.

        Raises:
            SettingsError: One does not exist, or both are given.
        """
        if layers is not None and neurons is not None:
            raise SettingsError("give either layers or neurons, not both: neurons are (layer, neuron) and say their layers themselves")
        wanted = {layer for layer, _ in neurons} if neurons is not None else set(range(len(self.widths)) if layers is None else layers)
        if not wanted:
            raise SettingsError("no neurons are chosen: name layers or neurons, or leave both out for all")
        for layer in sorted(wanted):
            if not 0 <= layer < len(self.widths):
                raise SettingsError(f"layer {layer} does not exist: the model has layers 0-{len(self.widths) - 1}")
            width = self.widths[layer]
            own = range(width) if neurons is None else sorted({neuron for at, neuron in neurons if at == layer})
            for neuron in (own[0], own[-1]):
                if not 0 <= neuron < width:
                    raise SettingsError(f"neuron m{layer}.n{neuron} does not exist: the layer has neurons 0-{width - 1}")
            yield layer, torch.tensor(own)

    def _reading(self, layer: int, piece: _Piece) -> Reading:
        weight, bias = self._linear(piece.name)
        rows = slice(piece.start, piece.start + self.widths[layer])
        weight, norm = weight[rows], self._wiring.mlp_norm(layer)
        constant = weight.new_zeros(len(weight)) if bias is None else bias[rows]
        if norm is None:
            return Reading(weight, constant)
        if norm.shift is not None:
            constant = constant + weight @ norm.shift
        weight = weight * norm.gain
        return Reading(weight - weight.mean(1, keepdim=True) if norm.centred else weight, constant)

    def _linear(self, name: str) -> tuple[Float[Tensor, "output input"], Float[Tensor, " output"] | None]:
        if name not in self._linears:
            self._linears[name] = self.subject.linear(self.subject.plain.get_submodule(name))
        weight, bias = self._linears[name]
        # products of many terms are not taken in half precision
        kind = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(kind), None if bias is None else bias.to(kind)


_Flow = dict[nn.Module, tuple[Tensor, Tensor]]


@torch.no_grad()
def _discovered(subject: Subject) -> tuple[Parts, ...]:
    size = subject.anatomy.vocab_size
    walk = Walk(subject, torch.arange(max(size - 4, 0), size)[None])  # not the first tokens: one of them often stands for padding
    hidden, parts = walk.hidden, []
    for layer, block in enumerate(subject.anatomy.blocks):
        flow, hidden = _flow(walk, layer, hidden)
        where = f"{subject.family}: the MLP of block {layer}"
        pieces = _pieces(subject, block, flow, where)
        activation, gate, up = _roles(block, flow, pieces, where)
        parts.append(Parts(activation, up, gate, _behind(subject.family, block, flow, where)))
    return tuple(parts)


def _flow(walk: Walk, layer: int, hidden: Tensor) -> tuple[_Flow, Tensor]:
    """Run a block and note what each of its modules read and returned."""
    flow: _Flow = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        if isinstance(given, Tensor) and isinstance(output, Tensor):
            flow[module] = given.reshape(-1, given.shape[-1]), output.reshape(-1, output.shape[-1])

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in walk.subject.anatomy.blocks[layer].module.modules()]
    try:
        return flow, walk.step(layer, hidden)
    finally:
        for handle in handles:
            handle.remove()


def _pieces(subject: Subject, block: Block, flow: _Flow, where: str) -> dict[_Piece, Tensor]:
    """Return the outputs of the maps that read the MLP's input, cut into pieces of one feature per neuron."""
    width, pieces = block.d_mlp, {}
    for name in block.mlp_linears:
        module = subject.plain.get_submodule(name)
        if module is block.mlp_down:
            continue
        if module not in flow or not torch.equal(flow[module][0], flow[block.mlp_read][0]):
            raise ModelError(f"{where} holds {name}, which does not read what the MLP reads: its neurons are not taken apart here")
        output = flow[module][1]
        pieces.update({_Piece(name, start): output[:, start : start + width] for start in range(0, output.shape[1], width)})
    return pieces


def _roles(block: Block, flow: _Flow, pieces: dict[_Piece, Tensor], where: str) -> tuple[nn.Module, _Piece | None, _Piece]:
    """Find the activation, the gate (if any) and the other side, by what they do."""
    neurons = flow[block.mlp_down][0]
    for module in block.module.modules():
        if module not in flow or next(module.parameters(), None) is not None:
            continue
        given, output = flow[module]
        entering = [piece for piece, value in pieces.items() if torch.equal(value, given)]
        for piece in entering:
            others = [other for other in pieces if other != piece]
            if not others and torch.equal(output, neurons):
                return module, None, piece
            if len(others) == 1 and torch.equal(output * pieces[others[0]], neurons):
                return module, piece, others[0]
    maps = ", ".join(dict.fromkeys(piece.name.rpartition(".")[2] for piece in pieces))
    raise ModelError(
        f"{where} is neither act(up) nor act(gate) · up with its maps {maps or '(none)'}: its neurons are not taken apart here"
    )


def _behind(family: str, block: Block, flow: _Flow, where: str) -> Norm | None:
    """Return the norm between the MLP's last map and the residual stream; None where that is what is added."""
    written, (given, added) = flow[block.mlp_down][1], flow[block.mlp_write]
    if torch.equal(written, added):
        return None
    # an adapter that trains norms too keeps two of them behind one
    innermost = [module for module in block.mlp_write.modules() if module in flow][-1]
    norm = recognised(family, innermost, given) if torch.equal(given, written) else None
    if norm is None or norm.centred or norm.shift is not None:
        raise ModelError(f"{where} changes what its last map gives before it is added: its neurons are not taken apart here")
    return norm
