"""The weights of a series: one model in memory at a time, and how far each step lies from the others.

Public series serve repeated or misplaced weights, so every step's weights are hashed (equal ones are named) and their distances are compared. Two
models are never held: of each step a sketch is kept, the same random entries of every weight, and the squared distance of two models is estimated
without bias as Σ over weights of size/entries · Σ (difference of the entries)². A step whose weights lie far from both of its neighbours, while these lie
close to each other, is not between them: a training moves on, it does not leave and come back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mechscope.errors import ModelError
from mechscope.subject.load import Subject

ENTRIES = 2048
"""Entries of a weight that a sketch keeps: distances of dense changes are then right to about 1/√entries."""
JUMP = 1.5
"""A step jumps where both neighbours lie this many times farther from it than from each other: steps on a line have 1/2, those of a random walk 1/√2."""
_SEED = 20260101


def sketch(subject: Subject, *, entries: int = ENTRIES) -> dict[str, Tensor]:
    """Return the same random entries of every weight of a model, as it acts.

    Args:
        subject: The model; an active adapter's change is included.
        entries: How many of a weight; smaller weights are kept whole.

    Returns:
        By weight the entries, float32 (n), scaled by √(size/n) so that squared differences of sketches add up to those of the models on average.
    """
    kept: dict[str, Tensor] = {}
    for name, weight in subject.weights():
        flat = weight.detach().reshape(-1)
        size = flat.numel()
        if size > entries:
            # seeded by the size: the same entries at every step, whatever else a model holds
            chosen = torch.randint(size, (entries,), generator=torch.Generator().manual_seed(_SEED + size))
            flat = flat[chosen.to(flat.device)]
        kept[name] = flat.float().cpu() * math.sqrt(size / max(flat.numel(), 1))
    return kept


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the distance of two models by their sketches, ‖θ − θ′‖.

    Raises:
        ModelError: They are not of the same weights.
    """
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        raise ModelError("two steps of the series have weights of other names or shapes: they are not of one training")
    return math.sqrt(sum(float((one[name].double() - other[name].double()).square().sum()) for name in one))


def survey(numbers: Sequence[int], fingerprints: Sequence[str], sketches: Sequence[Mapping[str, Tensor]]) -> pd.DataFrame:
    """Say of every step whose weights it repeats, how far it moved, and whether it jumps.

    Args:
        numbers: The steps.
        fingerprints: Hashes of their weights as they act.
        sketches: Their sketches.

    Returns:
        One row per step: `step`, `fingerprint`, `repeats` (the first step with the same weights, none where there is none before), `moved` (distance
        from the step before), `away` (distance from the first step), `size` (norm of the weights), `jumps` (whether it lies far from both neighbours
        while these are close to each other).
    """
    rows: list[dict[str, Any]] = []
    first_with: dict[str, int] = {}
    for i, (number, fingerprint) in enumerate(zip(numbers, fingerprints, strict=True)):
        before = distance(sketches[i - 1], sketches[i]) if i else math.nan
        rows.append(
            {
                "step": number,
                "fingerprint": fingerprint,
                "repeats": first_with.get(fingerprint),
                "moved": before,
                "away": distance(sketches[0], sketches[i]),
                "size": math.sqrt(sum(float(values.double().square().sum()) for values in sketches[i].values())),
                "jumps": False,
            }
        )
        first_with.setdefault(fingerprint, number)
    for i in range(1, len(rows) - 1):
        across = distance(sketches[i - 1], sketches[i + 1])
        rows[i]["jumps"] = bool(min(rows[i]["moved"], rows[i + 1]["moved"]) > JUMP * across)
    return pd.DataFrame(rows).astype({"repeats": "Int64"})
