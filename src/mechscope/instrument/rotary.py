"""Rotary frequencies that depend on how long a text is (LongRoPE, dynamic NTK), for each text of a batch by its own length.

Such families choose one set of frequencies for a whole batch by its longest text, and dynamic NTK keeps what an earlier, longer text set: a text's
numbers would depend on its neighbours. Here every row gets what it would get alone, in a fresh model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from mechscope.instrument.substitutes import acting_as
from mechscope.subject.load import Subject


@contextlib.contextmanager
def by_own_length(subject: Subject, lengths: Int[Tensor, " batch"] | None = None) -> Iterator[None]:
    """Let every row of a batch have the frequencies of its own length; a no-op for all families whose frequencies do not depend on it.

    Args:
        subject: The model.
        lengths: ``(batch,)``: each row's number of real tokens; None where the highest position of a row says it.
    """
    with contextlib.ExitStack() as stack:
        for module in subject.anatomy.rotaries:
            stack.enter_context(_kept(module))
            own: Any = module.forward
            stack.enter_context(acting_as(module, partial(_by_rows, module, own, lengths)))
        yield


@contextlib.contextmanager
def as_if_fresh(rotaries: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules with frequencies that depend on the length begin as in a fresh model, whatever text came before; what they held is put back."""
    with contextlib.ExitStack() as stack:
        for module in rotaries:
            stack.enter_context(_kept(module))
            _reset(module)
        yield


def _by_rows(module: nn.Module, own: Any, lengths: Tensor | None, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    each = position_ids.amax(-1) + 1 if lengths is None else lengths.to(position_ids.device)
    if len(each) != len(position_ids):  # one row of positions stands for all
        position_ids = position_ids.expand(len(each), -1)
    x = x if len(x) == len(each) else x.expand(len(each), *x.shape[1:])
    whole: list[Tensor] = []
    for length in each.unique():
        rows = (each == length).nonzero().flatten()
        _reset(module)
        # positions of padding count for none: the longest position decides
        parts = own(x[rows], position_ids[rows].clamp(max=length - 1), *args, **kwargs)
        if not whole:
            whole = [part.new_empty(len(each), *part.shape[1:]) for part in parts]
        for into, part in zip(whole, parts, strict=True):
            into[rows] = part
    return tuple(whole)


def _reset(module: Any) -> None:
    """Put frequencies back to those of short texts: transformers does so only when a text is shorter than the original length by one or more."""
    for name, buffer in list(module.named_buffers()):
        if name.endswith("original_inv_freq"):
            setattr(module, name.replace("original_inv_freq", "inv_freq"), buffer.clone())
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        setattr(module, name, module.original_max_seq_len)


@contextlib.contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    lengths = {name: value for name, value in vars(module).items() if name.endswith("max_seq_len_cached")}
    try:
        yield
    finally:
        for name, value in {**buffers, **lengths}.items():
            setattr(module, name, value)
