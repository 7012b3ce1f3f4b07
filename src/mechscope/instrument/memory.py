"""How many tokens at once: chosen from free memory, and halved once where they do not fit after all.

An estimate of what a token costs can only be rough, so it leaves half of the free memory alone and is rounded down to a power of two: on machines
with memory to spare the number is the same from run to run, and so is the result to the last bit. Where memory runs out nevertheless, the batch
that did not fit is run again as two halves, and so is every batch after it; what was computed before is kept.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, Self, TypeVar

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

from mechscope import ranks
from mechscope.errors import RunError
from mechscope.subject import Subject

log = logging.getLogger(__name__)

# tokens of a batch beyond which nothing gets faster
MOST_ON_CPU, MOST_ON_GPU = 8192, 65536
# fewer are never chosen: a batch of one document runs in any case
FEWEST = 512
# what a token costs each model of a lock-step, in numbers of four bytes per unit of a layer's width: 16.5 measured (GPT-2 small, 512-token documents)
_PER_WIDTH = 24
# what does not grow with the tokens: rows of logits, workspaces
_FIXED = 2**29
_SHARE = 0.5

R = TypeVar("R")


class Halvable(Protocol):
    """A batch that can be cut in two."""

    def __len__(self) -> int:
        """Return the number of texts."""

    def halves(self) -> tuple[Self, Self]:
        """Return the first and the second half of the texts as batches."""


B = TypeVar("B", bound=Halvable)


def free_memory(device: torch.device) -> int:
    """Return the bytes this process may still take on a device: all that is free on a GPU, its share among the machine's ranks on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // ranks.local_size()


def tokens_that_fit(subject: Subject, *, models: int = 2, free: int | None = None) -> int:
    """Return how many tokens of some such models in lock-step fit at once into `free` bytes (by default the machine's): a power of two."""
    anatomy = subject.anatomy
    width = max(anatomy.d_model, anatomy.n_heads * anatomy.d_head)
    free = free_memory(subject.device) if free is None else free
    fit = max(1, int((free - _FIXED) * _SHARE / (4 * _PER_WIDTH * models * width)))
    most = MOST_ON_GPU if subject.device.type == "cuda" else MOST_ON_CPU
    return max(FEWEST, min(most, 2 ** (fit.bit_length() - 1)))


class Halving:
    """Runs work on batches; from the first that does not fit into memory on, every batch is run as two halves (`halved`)."""

    def __init__(self) -> None:
        """Begin with whole batches."""
        self.halved = False

    def run(self, work: Callable[[B], R], batch: B) -> Iterator[R]:
        """Yield what `work` makes of a batch, or of its halves.

        Raises:
            RunError: Not even half of a batch, or a single text, fits.
        """
        if not self.halved:
            result = _attempt(work, batch)
            if result is not None:
                yield result[0]
                return
            self.halved = len(batch) > 1
            if self.halved:
                # every rank has memory of its own
                log.warning("out of memory with a batch of %d texts: going on with half of it", len(batch), extra={"own": True})
        for part in batch.halves() if len(batch) > 1 else (batch,):
            result = _attempt(work, part) if self.halved else None
            if result is None:
                texts = "1 text" if len(part) == 1 else f"{len(part)} texts"
                raise RunError(f"out of memory even with {texts} at a time: lower tokens_per_batch or max_tokens, or free memory")
            yield result[0]


def each(work: Callable[[B], R], batches: Iterable[B]) -> Iterator[R]:
    """Yield what `work` makes of every batch; from the first that does not fit into memory on, of its halves.

    Args:
        work: Begun again with half of the batch where memory runs out, so it may leave nothing behind until it returns.
        batches: What it is given, one after the other.

    Raises:
        RunError: Not even half of a batch, or a single text, fits.
    """
    halving = Halving()
    for batch in batches:
        yield from halving.run(work, batch)


def _attempt(work: Callable[[B], R], batch: B) -> tuple[R] | None:
    """Return what work makes of a batch, or None where memory runs out."""
    try:
        return (work(batch),)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
    # here, where the error no longer holds the tensors of its frames
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
