"""One rank's share of the documents of a difference: which batches are its own, which are done, and what they gave.

Batches are made of documents sorted by length and dealt out like cards, so that all ranks carry about the same number of tokens. A checkpoint,
written by rank 0, holds every rank's statistics, and of every batch whose it is and whether it is done. Continued by as many ranks as before, each
goes on with its own, to the last bit; by another number, what is done goes to rank 0 and the rest is dealt out anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mechscope import ranks
from mechscope.data.prompt import Batch, Example, collate, packs
from mechscope.difference.accumulate import Accumulated

if TYPE_CHECKING:
    from mechscope.store.stage import Stage


class Share:
    """The batches of one rank, and the statistics over those that are done.

    Attributes:
        accumulated: The statistics, one of each pair of models.
        tokens_per_batch: Most tokens of a batch.
    """

    def __init__(self, examples: Sequence[Example], nothing: Callable[[], list[Accumulated]], tokens_per_batch: int) -> None:
        """Deal out all batches.

        Args:
            examples: All documents.
            nothing: Makes statistics over no documents, of each pair.
            tokens_per_batch: Most tokens of a batch.
        """
        self.accumulated = nothing()
        self.tokens_per_batch = tokens_per_batch
        self._examples, self._nothing = examples, nothing
        self._packs = list(packs(examples, tokens_per_batch=tokens_per_batch))
        self._owner = np.arange(len(self._packs), dtype=np.int32) % ranks.size()
        self._done = np.zeros(len(self._packs), dtype=bool)

    def resume(self, stage: Stage) -> Share:
        """Return the share to go on with: this one, or that of the stage's checkpoint, whose batches are as they were."""
        kept = stage.resume()
        if kept is None:
            return self
        state, meta = kept
        share = Share(self._examples, self._nothing, meta["tokens_per_batch"])
        share._continue(state, meta)
        return share

    def _continue(self, state: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self._done = state["done"].numpy().astype(bool)
        if meta["ranks"] == ranks.size():
            self._owner = state["owner"].numpy()
            _load(self.accumulated, state, ranks.rank())
            return
        left = np.flatnonzero(~self._done)
        self._owner[left] = np.arange(len(left)) % ranks.size()
        if ranks.is_first():
            for number in range(meta["ranks"]):
                part = self._nothing()
                _load(part, state, number)
                _merge(self.accumulated, part)

    @property
    def done(self) -> int:
        """Documents done as far as this rank knows: those that a checkpoint brought and its own since."""
        return sum(len(self._packs[number]) for number in np.flatnonzero(self._done))

    def rounds(self) -> Iterator[tuple[int, Batch | None]]:
        """Yield the number and documents of one batch after the other; no documents where others have more batches, so that all make as many rounds."""
        left = [np.flatnonzero((self._owner == rank) & ~self._done) for rank in range(ranks.size())]
        mine = left[ranks.rank()]
        for turn in range(max(map(len, left))):
            if turn < len(mine):
                # padding on the right is seen by nothing, so any token will do and no tokenizer is needed
                yield int(mine[turn]), collate(self._packs[mine[turn]], pad_id=0)
            else:
                yield -1, None

    def finish(self, number: int) -> None:
        """Mark a batch as done."""
        self._done[number] = True

    def save(self, stage: Stage) -> None:
        """Write the state of all ranks as the stage's checkpoint; every rank calls this."""
        parts = ranks.collect(([each.state() for each in self.accumulated], self._done))
        if not parts:
            return
        tensors = {
            f"{_prefix(rank, number)}{name}": value
            for rank, (states, _) in enumerate(parts)
            for number, state in enumerate(states)
            for name, value in state.items()
        }
        tensors["owner"] = torch.from_numpy(self._owner)
        tensors["done"] = torch.from_numpy(np.logical_or.reduce([done for _, done in parts])).to(torch.uint8)
        stage.checkpoint(tensors, {"ranks": len(parts), "tokens_per_batch": self.tokens_per_batch})

    def together(self) -> list[Accumulated]:
        """Return the statistics over all documents of all ranks; every rank calls this."""
        first, *others = ranks.exchange(self.accumulated)
        for other in others:
            _merge(first, other)
        return first


def _merge(into: list[Accumulated], others: list[Accumulated]) -> None:
    for one, other in zip(into, others, strict=True):
        one.merge(other)


def _load(accumulated: list[Accumulated], state: dict[str, Tensor], rank: int) -> None:
    for number, each in enumerate(accumulated):
        prefix = _prefix(rank, number)
        each.load_state({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})


def _prefix(rank: int, number: int) -> str:
    return f"rank{rank}.pair{number}."
