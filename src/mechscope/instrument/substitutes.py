"""Modules that act otherwise for a while: by a faster kernel, by an output that is given, or on a few rows only.

A model's own code runs around them, with its hooks; every substitute is taken back when its context ends, however it ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mechscope.instrument.outputs import tensor_of, with_tensor
from mechscope.subject.anatomy import Block
from mechscope.subject.load import Subject
from mechscope.subject.placement import sent


@contextlib.contextmanager
def fused_activations(subject: Subject) -> Iterator[None]:
    """Compute GPT-2's GELU by one kernel instead of the seven that transformers composes it of: the same function, equal to rounding.

    It is a seventh of a sweep's time (12 layers, 4,096 tokens at once).
    """
    with contextlib.ExitStack() as stack:
        for block in subject.anatomy.blocks:
            for module in block.module.modules():
                if type(module).__name__ == "NewGELUActivation" and "forward" not in vars(module):
                    vars(module)["forward"] = partial(nn.functional.gelu, approximate="tanh")
                    stack.callback(vars(module).pop, "forward")
        yield


@contextlib.contextmanager
def stubbed(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return a given output instead of running; its hooks still see it."""
    with acting_as(module, lambda *args, **kwargs: output):
        yield


@contextlib.contextmanager
def writing_instead(block: Block, written: Tensor, given: Tensor) -> Iterator[None]:
    """Let a block's attention, or what mixes tokens there instead, write something given without running; `given` is any tensor of the stream's shape."""
    mixing = block.mixing
    alone = mixing.write is mixing.module
    first = written if alone else given
    pair = block.mixer is None or block.mixer.pair
    with stubbed(mixing.module, (first, None) if pair else first), contextlib.ExitStack() as stack:
        if not alone:
            stack.enter_context(stubbed(mixing.write, written))
        yield


@contextlib.contextmanager
def acting_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run other code for the duration."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


@contextlib.contextmanager
def only_at(first: nn.Module, last: nn.Module, rows: Int[Tensor, " some"]) -> Iterator[None]:
    """Run a chain of modules that work token by token only on some rows of the flattened batch; it writes zeros elsewhere."""
    shape: list[torch.Size] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> Any:
        shape[:] = [args[0].shape]
        few = args[0].flatten(0, -2)[sent(rows, args[0].device)]
        return (few if args[0].ndim == 2 else few[None], *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        few = tensor_of(output)
        whole = few.new_zeros(*shape[0][:-1], few.shape[-1])
        whole.flatten(0, -2)[sent(rows, few.device)] = few.flatten(0, -2)
        # some mixtures of experts give rows of one matrix whatever they were given
        return with_tensor(output, whole.flatten(0, -2) if few.ndim == 2 else whole)

    handles = [first.register_forward_pre_hook(before), last.register_forward_hook(after, prepend=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
