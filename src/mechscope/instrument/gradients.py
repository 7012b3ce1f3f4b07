"""One forward and one backward pass: the gradient of a number at a site of every layer.

Parameters get no gradient, only activations do. What is read is differentiated a few rows at a time, so that logits are never whole; in the last
block the MLP runs only where it is read. With `drop`, the backward pass is taken once more for every layer with the gradient through that layer's
sublayers dropped (GradDrop of AtP*, Kramár et al. 2024).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechscope.errors import SettingsError
from mechscope.instrument.attention import AttentionCall, AttentionInputs, observed
from mechscope.instrument.edits import EditSite
from mechscope.instrument.outputs import tensor_of
from mechscope.instrument.patterns import pattern
from mechscope.instrument.rerun import Reading
from mechscope.instrument.substitutes import only_at
from mechscope.instrument.walk import Walk
from mechscope.shapes import by_shape
from mechscope.subject.load import Subject

# gives one number per text from some rows of the last residual stream, differentiably
Scored = Callable[[Float[Tensor, "read d_model"]], Float[Tensor, " batch"]]


@dataclass(frozen=True)
class Gradients:
    """What a backward pass gave.

    Values and gradients have the layout of `record`, but key and value have one entry per query head, each with a gradient of its own.

    Attributes:
        score: ``(batch)``: the number per text.
        values: The site's values by layer.
        gradients: The gradient of each text's number, by layer; a list with one entry per dropped layer if `drop`.
        z: What the heads computed, with its gradient, by layer; of the sites query and key only.
        calls: What attention computed with, by layer; of the sites query and key only.
    """

    score: Float[Tensor, " batch"]
    values: dict[int, Tensor]
    gradients: list[dict[int, Tensor]]
    z: dict[int, tuple[Tensor, list[Tensor]]]
    calls: dict[int, AttentionCall]

    __repr__ = by_shape


def gradients(
    subject: Subject,
    input_ids: Int[Tensor, "batch token"],
    real: Bool[Tensor, "batch token"] | None,
    site: EditSite,
    reading: Reading,
    scored: Scored,
    *,
    drop: bool = False,
) -> Gradients:
    """Run a batch forward and backward.

    Args:
        subject: The model.
        input_ids: Tokens.
        real: True where a token is real.
        site: Where gradients are wanted.
        reading: Rows of the last residual stream that are read.
        scored: Turns them into one number per text.
        drop: One backward pass per layer, each with that layer's gradient dropped, instead of one.

    Raises:
        SettingsError: Of single experts there is none: which of them a token is sent to has no gradient.
    """
    if site == "expert_output":
        raise SettingsError("there is no gradient at single experts: which of them a token is sent to has none; use mlp_output")
    graph = _Graph(subject, site, keep_z=site in ("query", "key"))
    anatomy = subject.anatomy
    with torch.enable_grad(), observed(subject, graph.tap, rewrite=graph.rewrite), contextlib.ExitStack() as stack:
        walk = Walk(subject, input_ids, None if real is None or bool(real.all()) else real)
        graph.hook(stack, drop=drop)
        if site not in ("attention_output", "mixer_output", "neuron", "mlp_output"):
            last = anatomy.blocks[-1]
            rows = (reading.example * input_ids.shape[1] + reading.position).unique()
            if last.attends:
                stack.enter_context(only_at(last.output.module, last.output.module, rows))
            stack.enter_context(only_at(last.mlp_read, last.mlp_write, rows))
        start = walk.hidden.detach().requires_grad_()
        if site == "embedding":
            graph.values[0] = start
        read = reading.take(walk.run(start)[None])[0]
        leaf = read.detach().requires_grad_()
        score = scored(leaf)
        (above,) = torch.autograd.grad(score.sum(), [leaf])
        layers = sorted(graph.values)
        wanted = [*(graph.values[layer] for layer in layers), *(graph.z[layer] for layer in sorted(graph.z))]
        passes: list[list[Tensor]] = []
        for dropped in range(anatomy.n_layers) if drop else (None,):
            graph.dropped = dropped
            again = drop and dropped != anatomy.n_layers - 1
            taken = torch.autograd.grad([read], wanted, [above], retain_graph=again, allow_unused=True)
            passes.append([torch.zeros_like(x) if g is None else g for x, g in zip(wanted, taken, strict=True)])
    batch, length = input_ids.shape

    def by_token(value: Tensor) -> Tensor:
        return value.unflatten(0, (batch, length)) if value.ndim == 2 else value

    def shaped(value: Tensor, factor: float = 1.0) -> Tensor:
        value = value.detach() if factor == 1.0 else value.detach() * factor
        return value.transpose(1, 2) if site in ("query", "key", "value") else by_token(value)

    # of what is added to the residual stream, not of what the module gives
    factors = [anatomy.blocks[layer].multiplier if site in ("attention_output", "mixer_output", "mlp_output") else 1.0 for layer in layers]
    values = {layer: shaped(graph.values[layer], factor) for layer, factor in zip(layers, factors, strict=True)}
    by_layer = [
        {layer: shaped(g, 1 / factor) for layer, g, factor in zip(layers, one[: len(layers)], factors, strict=True)} for one in passes
    ]
    z = {layer: (graph.z[layer].detach(), [one[len(layers) + at].detach() for one in passes]) for at, layer in enumerate(sorted(graph.z))}
    return Gradients(score.detach(), values, by_layer, z, graph.calls)


class _Graph:
    """Catches the tensors of a forward pass at which gradients are wanted: those that flow on, not views of them."""

    def __init__(self, subject: Subject, site: EditSite, *, keep_z: bool) -> None:
        self.subject = subject
        self.site = site
        self.keep_z = keep_z
        self.values: dict[int, Tensor] = {}
        self.z: dict[int, Tensor] = {}
        self.calls: dict[int, AttentionCall] = {}
        self.dropped: int | None = None

    def rewrite(self, inputs: AttentionInputs) -> AttentionInputs:
        if self.site in ("key", "value"):
            shared: Tensor = getattr(inputs, self.site)
            # a tensor of its own for every query head
            own = shared.repeat_interleave(inputs.query.shape[1] // shared.shape[1], dim=1)
            changed: dict[str, Any] = {self.site: own}
            inputs = replace(inputs, **changed)
            self.values[inputs.layer] = own
        elif self.site == "query":
            self.values[inputs.layer] = inputs.query
        return inputs

    def tap(self, call: AttentionCall) -> Tensor | None:
        if self.site == "z":
            self.values[call.layer] = call.z
        if self.keep_z:
            self.z[call.layer] = call.z
            own: dict[str, Any] = {name: value.detach() if isinstance(value, Tensor) else value for name, value in vars(call).items()}
            self.calls[call.layer] = AttentionCall(**own)
        if self.site != "pattern":
            return None
        p = pattern(call, dtype=call.query.dtype)
        self.values[call.layer] = p
        return (p @ call.value.repeat_interleave(p.shape[1] // call.value.shape[1], dim=1)).transpose(1, 2)

    def hook(self, stack: contextlib.ExitStack, *, drop: bool) -> None:
        for layer, block in enumerate(self.subject.anatomy.blocks):
            match self.site:
                case "residual":
                    self._catch(stack, block.module, layer)
                case "attention_output" | "mixer_output" if self.site == block.mixing_site:
                    self._catch(stack, block.mixing.write, layer)
                case "mlp_output":
                    self._catch(stack, block.mlp_write, layer)
                case "neuron":
                    self._catch_input(stack, block.mlp_down, layer)
            if drop:
                for module in (block.mixing.write, block.mlp_write):
                    self._drop(stack, module, layer)

    def _catch(self, stack: contextlib.ExitStack, module: nn.Module, layer: int) -> None:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            self.values[layer] = tensor_of(output)

        stack.callback(module.register_forward_hook(hook).remove)

    def _catch_input(self, stack: contextlib.ExitStack, module: nn.Module, layer: int) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.values[layer] = args[0]

        stack.callback(module.register_forward_pre_hook(hook).remove)

    def _drop(self, stack: contextlib.ExitStack, module: nn.Module, layer: int) -> None:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            written = tensor_of(output)
            written.register_hook(lambda gradient: torch.zeros_like(gradient) if self.dropped == layer else gradient)

        stack.callback(module.register_forward_hook(hook).remove)
