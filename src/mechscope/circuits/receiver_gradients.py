"""One forward and one backward pass: the gradient of the metric at what every head, MLP and the logits read.

Inputs are not split. The backward pass gives the gradient at every query, key and value projection and at every MLP's own input; W_Qᵀ, W_Kᵀ, W_Vᵀ and
the norm's vector–Jacobian product carry it to the residual stream, one layer at a time:

    g_v = scale · (G − x̂ · ⟨x̂, G⟩ / d),   G = (W ⊙ gain, rows centred)ᵀ · ∂metric/∂projection

where ⟨x̂, G⟩ is the projection without its constant part times its gradient, so it costs no product of size d_model. Query heads that share a key
and value have a gradient of their own: each member of the groups goes back through rotary embedding and key norm by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechscope.data.metrics import Metric
from mechscope.data.scoring import score
from mechscope.errors import ModelError, SettingsError
from mechscope.instrument import AttentionCall, AttentionInputs, Reading, observed
from mechscope.instrument.outputs import tensor_of
from mechscope.instrument.parts import PARTS
from mechscope.instrument.substitutes import fused_activations, only_at
from mechscope.instrument.walk import Walk
from mechscope.instrument.wiring import Wiring

# what to run: given the pass, the residual stream to begin with and the first block
Begin = Callable[[Walk], tuple[Tensor, int]]


@dataclass(frozen=True)
class HeadGradients:
    """The gradient of each text's metric at a layer's queries, keys and values; receivers are all queries, then all keys, then all values.

    Attributes:
        at: ``(batch, token, receiver, d_head)``: at the projections, times the scale of the norm before them.
        standard: ``(batch, token, d_model)``: x̂, what the norm makes of its input before its gain; None without a norm.
        along: ``(batch, token, receiver)``: how much of x̂ belongs to the gradient at what is read, −⟨x̂, G⟩ / d.
    """

    at: Float[Tensor, "batch token receiver d_head"]
    standard: Float[Tensor, "batch token d_model"] | None
    along: Float[Tensor, "batch token receiver"] | None


class ReceiverGradients:
    """One differentiated pass of a batch.

    Attributes:
        score: ``(batch)``: the metric of each text.
        z: What the heads computed, by layer that was run.
        mlp: What the MLPs wrote, by layer that was run.
        above: ``(read, d_model)``: the gradient at the rows of the last residual stream that are read.
    """

    def __init__(self, walk: Walk, wiring: Wiring, metric: Metric, reading: Reading, begin: Begin) -> None:
        """Run forward and backward.

        Args:
            walk: A pass of the batch.
            wiring: How the model reads and writes.
            metric: What is differentiated.
            reading: The rows it reads.
            begin: Gives the residual stream to begin with, and the first block to run.

        Raises:
            SettingsError: The metric has no gradient.
        """
        self.wiring = wiring
        self.z: dict[int, Tensor] = {}
        self.mlp: dict[int, Tensor] = {}
        self._given: dict[int, Tensor] = {}
        self._before_mlp: dict[int, Tensor] = {}
        self._outputs: dict[int, dict[nn.Module, Tensor]] = {}
        self._mlp_in: dict[int, Tensor] = {}
        self._shared: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._batch = walk.hidden.shape[:2]
        subject = wiring.subject
        self._anatomy = subject.anatomy
        rewrite = self._rewrite if wiring.group > 1 else None
        with (
            torch.enable_grad(),
            observed(subject, self._tap, rewrite=rewrite),
            fused_activations(subject),
            contextlib.ExitStack() as stack,
        ):
            self._hook(stack)
            self._only_where_read(stack, reading)
            hidden, first = begin(walk)
            last = walk.run(hidden, start=first)
            rows = reading.take(last[None])[0]
            leaf = rows.detach().requires_grad_()
            value = score(subject, leaf[None], metric)[0]
            if not value.requires_grad:
                raise SettingsError(f"metric {metric.name!r} cannot be differentiated: use logit-diff, probability, loss or kl")
            (above,) = torch.autograd.grad(value.sum(), [leaf])
            self._differentiate(rows, above)
        self.score = value.detach()
        self.above = above
        if not torch.isfinite(self.score).all():
            raise ModelError("the metric is NaN or infinite: the model's type is too narrow for it, try dtype float32")

    def _differentiate(self, rows: Tensor, above: Tensor) -> None:
        outputs = [(layer, module) for layer, by in self._outputs.items() for module in by]
        wanted = [self._outputs[layer][module] for layer, module in outputs]
        wanted += [self._mlp_in[layer] for layer in self._mlp_in]
        wanted += [own for own, _ in self._shared.values()]
        gradients = list(torch.autograd.grad([rows], wanted, [above], retain_graph=bool(self._shared), allow_unused=True)) if wanted else []
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True)]
        self._at_outputs = dict(zip(outputs, gradients[: len(outputs)], strict=True))
        gradients = gradients[len(outputs) :]
        self._at_mlp = dict(zip(self._mlp_in, gradients[: len(self._mlp_in)], strict=True))
        at_own = dict(zip(self._shared, gradients[len(self._mlp_in) :], strict=True))
        self._at_shared = {where: self._through_front(where, gradient) for where, gradient in at_own.items()}
        self._outputs = {layer: {module: value.detach() for module, value in by.items()} for layer, by in self._outputs.items()}
        self._shared.clear()
        self._mlp_in.clear()

    def _through_front(self, where: tuple[int, str], gradient: Tensor) -> Tensor:
        """Carry the gradient at each query head's own key (or value) to the shared projection, one member of the groups at a time."""
        layer, part = where
        module = getattr(self._anatomy.blocks[layer], part).module
        shared, group = self._shared[where][1], self.wiring.group
        members = []
        for member in range(group):
            (at,) = torch.autograd.grad([shared], [self._outputs[layer][module]], [gradient[:, member::group]], retain_graph=True)
            members.append(self._of_heads(layer, part, at))
        return torch.stack(members, dim=3).flatten(2, 3)  # (batch, token, head, d_head)

    @property
    def layers_of_heads(self) -> list[int]:
        """The layers whose heads were run."""
        return sorted(self._outputs)

    @property
    def layers_of_mlps(self) -> list[int]:
        """The layers whose MLPs were run."""
        return sorted(self._at_mlp)

    @torch.no_grad()
    def heads(self, layer: int) -> HeadGradients:
        """Return the gradient at a layer's projections, with what is needed to carry it to what each head reads."""
        x, norm, heads = self._given[layer], self.wiring.attention_norm(layer), self._anatomy.n_heads
        standard, scale = (None, None) if norm is None else norm.normalised(x)
        gradients = x.new_empty(*x.shape[:2], len(PARTS) * heads, self._anatomy.d_head)
        along = None if norm is None else gradients.new_empty(gradients.shape[:3])
        for number, part in enumerate(PARTS):
            mine = slice(number * heads, (number + 1) * heads)
            at = self._at_projection(layer, part)  # (batch, token, head, d_head)
            gradients[:, :, mine] = at if scale is None else at * scale[..., None]
            if along is not None:
                projected, constant = self._projected(layer, part), self.wiring.constant(layer, part)
                projected = projected if constant is None else projected - constant
                if part != "query" and self.wiring.group > 1:
                    projected = projected.repeat_interleave(self.wiring.group, dim=2)
                along[:, :, mine] = (projected * gradients[:, :, mine]).sum(-1) / -self._anatomy.d_model
        return HeadGradients(gradients, standard, along)

    @torch.no_grad()
    def mlp_input(self, layer: int) -> Float[Tensor, "batch token d_model"]:
        """Return the gradient at what a layer's MLP reads."""
        norm, above = self.wiring.mlp_norm(layer), self._at_mlp[layer].view(*self._batch, -1)
        return above if norm is None else norm.pulled_back(self._before_mlp[layer].view(*self._batch, -1), above)

    def _at_projection(self, layer: int, part: str) -> Tensor:
        if (layer, part) in self._at_shared:
            return self._at_shared[layer, part]
        return self._of_heads(layer, part, self._at_outputs[layer, getattr(self._anatomy.blocks[layer], part).module])

    def _projected(self, layer: int, part: str) -> Tensor:
        return self._of_heads(layer, part, self._outputs[layer][getattr(self._anatomy.blocks[layer], part).module])

    def _of_heads(self, layer: int, part: str, values: Tensor) -> Tensor:
        """Cut the stored heads of one part out of a projection's output, ``(batch, token, stored head, d_head)``."""
        slices = getattr(self._anatomy.blocks[layer], part)
        starts = tuple(dict.fromkeys(slices.starts))
        first, end = starts[0], starts[-1] + slices.width
        if end - first == len(starts) * slices.width:
            return values[..., first:end].unflatten(-1, (len(starts), slices.width))
        return torch.stack([values[..., start : start + slices.width] for start in starts], dim=2)

    def _tap(self, call: AttentionCall) -> None:
        self.z[call.layer] = call.z.detach()

    def _rewrite(self, inputs: AttentionInputs) -> AttentionInputs:
        """Give every query head a key and value of its own."""
        own: dict[str, Any] = {}
        for part in ("key", "value"):
            shared: Tensor = getattr(inputs, part)
            own[part] = shared.repeat_interleave(self.wiring.group, dim=1)
            self._shared[inputs.layer, part] = (own[part], shared)
        return replace(inputs, **own)

    def _hook(self, stack: contextlib.ExitStack) -> None:
        for layer, block in enumerate(self._anatomy.blocks):
            norm = self.wiring.attention_norm(layer)
            first = block.query.module if norm is None else norm.module
            self._on(stack, first, self._note(self._given, layer))
            if (before := self.wiring.mlp_norm(layer)) is not None:
                self._on(stack, before.module, self._note(self._before_mlp, layer))
            for module in {id(part.module): part.module for part in (block.query, block.key, block.value)}.values():
                stack.callback(module.register_forward_hook(self._keep_output(layer)).remove)
            self._on(stack, block.mlp_read, self._branch(layer))
            stack.callback(block.mlp_write.register_forward_hook(self._keep_mlp(layer)).remove)

    @staticmethod
    def _on(stack: contextlib.ExitStack, module: nn.Module, hook: Callable[..., Any]) -> None:
        stack.callback(module.register_forward_pre_hook(hook).remove)

    @staticmethod
    def _note(inputs: dict[int, Tensor], layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[layer] = args[0].detach()

        return hook

    def _branch(self, layer: int) -> Callable[..., Any]:
        """Let the MLP read a tensor of its own: a norm it shares with attention would otherwise collect both gradients."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
            if not args[0].requires_grad:
                return None
            self._mlp_in[layer] = args[0].view_as(args[0])
            return (self._mlp_in[layer], *args[1:])

        return hook

    def _keep_output(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                self._outputs.setdefault(layer, {})[module] = output

        return hook

    def _keep_mlp(self, layer: int) -> Callable[..., None]:
        factor = self._anatomy.blocks[layer].multiplier

        def hook(_: nn.Module, args: Any, output: Any) -> None:
            added = tensor_of(output).detach().view(*self._batch, -1)
            self.mlp[layer] = added if factor == 1.0 else added * factor

        return hook

    def _only_where_read(self, stack: contextlib.ExitStack, reading: Reading) -> None:
        """Let the last block work only where it is read; the hooks that note what its MLP reads stand before."""
        last = self._anatomy.blocks[-1]
        rows = (reading.example * self._batch[1] + reading.position).unique()
        for first, end in ((last.output.module, last.output.module), (last.mlp_read, last.mlp_write)):
            stack.enter_context(only_at(first, end, rows))
