"""One run by several processes, called ranks: who does which part, and how the parts come together.

`accelerate launch` (or `torchrun`) starts the same program once per device. Every rank runs the same lines: batches are dealt out like cards, each
rank measures its own, what was found is exchanged, and all go on with the same numbers. Whole batches, because the last digits of a text's numbers
depend on the texts beside it: so they are the same however many ranks there are. Only rank 0 writes. Started alone, a process is rank 0 of one, and
everything here costs nothing.

Two rules keep ranks from waiting for each other for ever: what is exchanged is exchanged by all of them in the same order, and whatever may fail on
rank 0 alone (files) is done through `by_first`, which hands the failure to all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from mechscope.errors import MechscopeError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# a stage that only rank 0 works on can take days; the others wait for it
_PATIENCE = timedelta(days=30)
# whether the ranks of this run have found each other
_joined = False
# whether this process works alone for a while although there are others
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


class ElsewhereError(MechscopeError):
    """An error that rank 0 met and reports: the other ranks end with it in silence."""


def launched() -> bool:
    """Tell whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return 0 if _ALONE.get() else _state()[0]


def size() -> int:
    """Return the number of processes."""
    return 1 if _ALONE.get() else _state()[1]


def is_first() -> bool:
    """Tell whether this process is the one that writes."""
    return rank() == 0


def label() -> str:
    """Return which rank speaks, where there are several: ` (rank 1)`; joins nobody."""
    return f" (rank {os.environ.get('RANK', '0')})" if launched() else ""


def is_echo() -> bool:
    """Tell whether an error met now is one that rank 0 meets too: before ranks have joined, all do the same with the same settings."""
    return launched() and os.environ.get("RANK", "0") != "0" and not _joined


def local_rank() -> int:
    """Return the number of this process on its machine: which of its devices is its own."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def local_size() -> int:
    """Return how many processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1


def _state() -> tuple[int, int]:
    if not launched():
        return 0, 1
    import torch
    from accelerate import PartialState

    global _joined
    # joins the others on the first call; the Trainer finds the same state later
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    _joined = True
    return int(state.process_index), int(state.num_processes)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Work as if there were no other ranks; what is inside exchanges nothing."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def own(items: Iterable[T]) -> Iterator[T]:
    """Yield this rank's share: every `size`-th item, so that items sorted by length are dealt out fairly."""
    return itertools.islice(items, rank(), None, size())


def exchange(value: T) -> list[T]:
    """Give every rank what each of them brings, in the order of ranks."""
    if size() == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * size()
    distributed.all_gather_object(found, value)
    return found


def wait() -> None:
    """Wait until all ranks are here."""
    exchange(None)


def collect(value: T) -> list[T]:
    """Give rank 0 what each rank brings; the others get an empty list."""
    if size() == 1:
        return [value]
    from torch import distributed

    found: list[Any] | None = [None] * size() if is_first() else None
    distributed.gather_object(value, found, dst=0)
    return found or []


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all ranks: the same bits on each of them. All bring the same shapes in the same order."""
    if size() == 1:
        return
    from torch import distributed

    for tensor in tensors:
        distributed.all_reduce(tensor)


def agreed(value: T) -> T:
    """Return rank 0's value on every rank."""
    if size() == 1:
        return value
    from torch import distributed

    box: list[Any] = [value if is_first() else None]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def by_first(work: Callable[[], T]) -> T:
    """Let rank 0 do something and give every rank what it returned.

    Raises:
        MechscopeError: What `work` raised; on the other ranks an `ElsewhereError` with its message.
    """
    if size() == 1:
        return work()
    error: MechscopeError | None = None
    value: Any = None
    if is_first():
        try:
            with alone():
                value = work()
        except MechscopeError as raised:
            error = raised
    failed, value = agreed((None if error is None else str(error), value))
    if error is not None:
        raise error
    if failed is not None:
        raise ElsewhereError(failed)
    return value
