"""Batches to train on, of blocks of activations, with a position from which to go on.

Training takes blocks in a new random order in every round, and the rows of a block in random order: a row meets those of other texts, and nothing but one
block is held. What is left of a block that fills no batch is left out of that round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mechscope.errors import DataError
from mechscope.features.activations import Block, Source


@dataclass(frozen=True)
class Position:
    """Where training is in its source: the round, how many of its blocks are done, and how many batches of the one at hand."""

    round: int = 0
    block: int = 0
    batch: int = 0


def batches(source: Source, batch: int, seed: int, start: Position = Position()) -> Iterator[tuple[Position, Block]]:
    """Yield shuffled batches for ever, each with the position behind it.

    Args:
        source: The activations.
        batch: Rows of a batch.
        seed: Of all orders: the same seed and position give the same batches.
        start: Where to go on.

    Raises:
        DataError: No block holds as many rows as a batch.
    """
    number, block, done = start.round, start.block, start.batch
    while True:
        order = torch.randperm(source.blocks, generator=_drawn(seed, number, -1)).tolist()
        given = 0
        for at in range(block, source.blocks):
            rows = source.block(order[at])
            count = len(rows[source.places[0]])
            shuffled = torch.randperm(count, generator=_drawn(seed, number, order[at]))
            for first in range(done * batch, count - batch + 1, batch):
                done += 1
                given += 1
                chosen = shuffled[first : first + batch]
                yield Position(number, at, done), {place: value[chosen].float() for place, value in rows.items()}
            done = 0
        if not given and not block:
            raise DataError(
                f"no block of activations holds the {batch:,} rows of a batch: give more texts, larger blocks or smaller batches"
            )
        number, block = number + 1, 0


def _drawn(seed: int, number: int, block: int) -> torch.Generator:
    # block −1: the order of blocks
    return torch.Generator().manual_seed(((seed * 1_000_003 + number) * 1_000_003 + block + 1) % 2**63)
