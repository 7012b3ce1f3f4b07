"""One forward pass, taken block by block.

A dry pass runs the model's own code with every block replaced by a stand-in that notes its arguments and hands the residual stream on. So the
embedding, the masks, the rotary angles and whatever else a family passes to its blocks come from the model itself. After that the real blocks
can be called one at a time: two models in lock-step, so that only one layer of both is ever held; from the middle, because a change in layer l
leaves the layers before it untouched (idea 7 of the design); and with logits computed only for the rows that are read.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechscope.subject.load import Subject


class Walk:
    """A forward pass under the caller's control.

    Padding is handled here once: tokens padded on the right need no mask at all under a causal pattern, so none is built; otherwise the mask and
    the positions that count only real tokens are given to the model. Values at padded tokens hold no meaning.

    Attributes:
        subject: The model.
        hidden: ``(batch, token, d_model)``: the residual stream before the first block.
    """

    def __init__(self, subject: Subject, input_ids: Int[Tensor, "batch token"], real: Bool[Tensor, "batch token"] | None = None) -> None:
        """Run the embedding and note every block's arguments.

        Args:
            subject: The model.
            input_ids: Tokens.
            real: True where a token is real, False where it is padding; None if there is no padding.
        """
        self.subject = subject
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        with subject.active(), _stand_ins([block.module for block in subject.anatomy.blocks], self._note):
            subject.anatomy.backbone(**model_inputs(input_ids.to(subject.device), real), use_cache=False)

    def _note(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if not self._arguments:
            self.hidden: Float[Tensor, "batch token d_model"] = hidden
        self._arguments.append((args[1:], kwargs))
        return hidden

    def step(self, layer: int, hidden: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
        """Run one block on a residual stream and return the residual stream after it."""
        args, kwargs = self._arguments[layer]
        with self.subject.active():
            output = self.subject.anatomy.blocks[layer].module(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def run(self, hidden: Float[Tensor, "batch token d_model"] | None = None, *, start: int = 0) -> Float[Tensor, "batch token d_model"]:
        """Run the blocks from `start` to the last one."""
        hidden = self.hidden if hidden is None else hidden
        for layer in range(start, self.subject.anatomy.n_layers):
            hidden = self.step(layer, hidden)
        return hidden

    def logits(self, hidden: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """Turn the last residual stream, or any rows of it, into logits: final norm, unembedding, and the family's scaling and cap."""
        return unembed(self.subject, hidden)


def unembed(subject: Subject, hidden: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
    """Apply the final norm, the unembedding and the family's logit scaling and soft cap to a residual stream."""
    anatomy = subject.anatomy
    with subject.active():
        if anatomy.final_norm is not None:
            hidden = anatomy.final_norm(hidden)
        if anatomy.projection_out is not None:
            hidden = anatomy.projection_out(hidden)
        logits = anatomy.unembedding(hidden)
    if anatomy.logit_multiplier != 1.0:
        logits = logits * anatomy.logit_multiplier
    if anatomy.logit_softcap is not None:
        logits = torch.tanh(logits / anatomy.logit_softcap) * anatomy.logit_softcap
    return logits


def model_inputs(input_ids: Int[Tensor, "batch token"], real: Bool[Tensor, "batch token"] | None) -> dict[str, Tensor | None]:
    """Return the model's keyword arguments for padded tokens: equal results wherever the padding is.

    Args:
        input_ids: Tokens.
        real: True where a token is real; None if all are.
    """
    batch, length = input_ids.shape
    # under a causal pattern nothing looks at padding on the right, so no mask is needed and the fused causal kernel stays in use
    if real is None or (not bool((real[:, 1:] & ~real[:, :-1]).any()) and bool(real[:, 0].all())):
        positions = torch.arange(length, device=input_ids.device).expand(batch, length)
        return {"input_ids": input_ids, "attention_mask": None, "position_ids": positions}
    real = real.to(input_ids.device)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": real.to(torch.int64), "position_ids": positions}


@contextlib.contextmanager
def _stand_ins(blocks: list[nn.Module], stand_in: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the blocks' forward for the duration; what stood there (accelerate puts its own) is put back in any case.

    Hooks are taken off with it: a recording around a walk must not take what the stand-ins hand on for a residual stream.
    """
    replaced = {"forward": stand_in, "_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    before = [{name: vars(block)[name] for name in replaced if name in vars(block)} for block in blocks]
    for block in blocks:
        vars(block).update(replaced)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            for name in replaced:
                del vars(block)[name]
            vars(block).update(own)
