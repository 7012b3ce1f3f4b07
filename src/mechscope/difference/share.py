"""One rank's share of the documents of a difference: which batches are its own, which are done, and what they gave.

Batches are made of documents sorted by length and dealt out like cards, so that all ranks carry about the same number of tokens. A checkpoint,
written by rank 0, holds every rank's statistics, and of every batch its documents, whose it is and whether it is done. Continued by as many ranks as
before, each goes on with its own, to the last bit; by another number, what is done goes to rank 0 and the rest is dealt out anew. With smaller batches
than before, because those did not fit, the rest is divided anew too.
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
    """

    def __init__(self, examples: Sequence[Example], nothing: Callable[[], list[Accumulated]], tokens_per_batch: int) -> None:
        """Deal out all documents in batches of at most so many tokens; `nothing` makes each pair's statistics over no documents."""
        self.accumulated = nothing()
        self._examples, self._nothing = examples, nothing
        self._tokens_per_batch = tokens_per_batch
        # places among the examples
        self._packs = self._packed(range(len(examples)), tokens_per_batch)
        self._owner = np.arange(len(self._packs), dtype=np.int32) % ranks.size()
        self._done = np.zeros(len(self._packs), dtype=bool)

    def resume(self, stage: Stage, *, most: int | None) -> None:
        """Go on from the stage's checkpoint, if there is one; batches of more than `most` tokens are divided anew, None keeps all as they were."""
        saved = stage.resume()
        if saved is not None:
            self._continue(*saved, most)

    def _continue(self, state: dict[str, Tensor], meta: dict[str, Any], most: int | None) -> None:
        self._packs = [part.tolist() for part in state["documents"].split(state["sizes"].tolist())]
        self._owner, self._done = state["owner"].numpy(), state["done"].numpy().astype(bool)
        self._tokens_per_batch = meta["tokens_per_batch"]
        if meta["ranks"] == ranks.size():
            _load(self.accumulated, state, ranks.rank())
        elif ranks.is_first():
            for number in range(meta["ranks"]):
                part = self._nothing()
                _load(part, state, number)
                _merge(self.accumulated, part)
        if most is not None and most < self._tokens_per_batch:
            self._divide_anew(most)
        elif meta["ranks"] == ranks.size():
            return
        left = np.flatnonzero(~self._done)
        self._owner[left] = np.arange(len(left)) % ranks.size()

    def _divide_anew(self, tokens_per_batch: int) -> None:
        """Make smaller batches of what is not done."""
        done = [pack for pack, is_done in zip(self._packs, self._done, strict=True) if is_done]
        left = [place for pack, is_done in zip(self._packs, self._done, strict=True) if not is_done for place in pack]
        self._packs = done + self._packed(left, tokens_per_batch)
        self._owner = np.zeros(len(self._packs), dtype=np.int32)
        self._done = np.arange(len(self._packs)) < len(done)
        self._tokens_per_batch = tokens_per_batch

    def _packed(self, places: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
        """Divide some of the examples into batches."""
        lengths = [len(self._examples[place]) for place in places]
        return [[places[at] for at in pack] for pack in packs(lengths, tokens_per_batch=tokens_per_batch)]

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
                yield int(mine[turn]), collate([self._examples[place] for place in self._packs[mine[turn]]], pad_id=0)
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
        tensors["documents"] = torch.tensor([place for pack in self._packs for place in pack])
        tensors["sizes"] = torch.tensor([len(pack) for pack in self._packs])
        tensors["owner"] = torch.from_numpy(self._owner)
        tensors["done"] = torch.from_numpy(np.logical_or.reduce([done for _, done in parts])).to(torch.uint8)
        stage.checkpoint(tensors, {"ranks": len(parts), "tokens_per_batch": self._tokens_per_batch})

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
