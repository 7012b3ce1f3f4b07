"""What a comparison will cost, before it starts: measured on a few steps and a few texts, not guessed from a table of machines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mechscope.data.pairs import Pairs
from mechscope.features.learner import Learner, memory_of
from mechscope.features.rows import Reader, blocks
from mechscope.features.trainer import Plan
from mechscope.instrument import Execution
from mechscope.settings.features import FeatureTraining

# tokens that are read, and steps that are made, to know how long more will take
_READ, _STEPS = 2048, 2


@dataclass(frozen=True)
class Cost:
    """What reading and training will take.

    Attributes:
        reading: Seconds of one pass over the texts through all models.
        training: Seconds of all steps of all dictionaries.
        memory: Bytes of weights, gradients and moments, of a step's work, and of a block of activations.
        disk: Bytes of the activations; zero where none are kept.
    """

    reading: float
    training: float
    memory: int
    disk: int

    def __str__(self) -> str:
        kept = f", {self.disk / 2**30:.1f} GiB of activations on disk until then" if self.disk else ""
        return (
            f"about {_duration(self.reading)} to read the models and {_duration(self.training)} to train, "
            f"{self.memory / 2**30:.1f} GiB of memory beside the models{kept}"
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def cost_of(
    reader: Reader,
    texts: Pairs,
    plans: Sequence[Plan],
    training: FeatureTraining,
    views: int,
    *,
    rows: int,
    bytes_each: int,
    live: bool,
    execution: Execution,
) -> Cost:
    """Measure what a comparison will take, by reading a few texts and making a few steps that are thrown away.

    Args:
        reader: Reads the models.
        texts: All texts that are read.
        plans: The dictionaries.
        training: How long.
        views: Views that a block is held in.
        rows: Tokens of a block.
        bytes_each: Of a number on disk.
        live: Whether nothing is kept, so that every round reads again.
        execution: Tokens of a batch.
    """
    tokens = sum(len(pair.clean) for pair in texts)
    some = next(blocks(texts, range(len(texts)), _READ, 0))
    began = time.monotonic()
    reader.run(texts, some, Execution(execution.tokens_per_batch))
    speed = (time.monotonic() - began) / sum(len(texts.pairs[index].clean) for index in some)
    rounds = max(1.0, training.steps * training.batch / max(tokens, 1)) if live else 1.0
    seconds: dict[int, float] = {}
    for plan in plans:
        size = plan.layout.latents * sum(plan.layout.input_widths)
        if size not in seconds:
            seconds[size] = _step(plan, training, execution.seed)
    steps = training.steps * sum(seconds[plan.layout.latents * sum(plan.layout.input_widths)] for plan in plans)
    widths = {place: place.width(reader.subjects[place.model]) for place in reader.places}
    held = (
        memory_of([plan.layout for plan in plans], training.batch).total + 4 * rows * (sum(widths.values()) // len(reader.subjects)) * views
    )
    return Cost(speed * tokens * rounds, steps, held, 0 if live else bytes_each * tokens * sum(widths.values()))


def _step(plan: Plan, training: FeatureTraining, seed: int) -> float:
    """Return the seconds of a step; the first, which warms up, is not counted."""
    learner = Learner(plan.layout, plan.objective, training, plan.layout.tensors(seed=seed))
    width = sum(plan.layout.input_widths)
    u = torch.randn(training.batch, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
    took = 0.0
    for _ in range(_STEPS):
        began = time.monotonic()
        learner.advance(u, u)
        took = time.monotonic() - began
    return took
