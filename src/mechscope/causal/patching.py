"""Activation patching: put one run's value into another run, and see what it does.

Denoising starts from the corrupt run and restores one clean value at a time: what is enough to bring the answer back. Noising starts from the
clean run and breaks one value at a time: what is needed. Meng et al. 2022; Zhang & Nanda 2023 on the choice of metric and direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mechscope.causal.effects import Effects, effects, place_columns
from mechscope.causal.places import chosen_places, edits_of
from mechscope.causal.sources import Source, source_named
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, Runs, check_fits, metric_of
from mechscope.errors import SettingsError
from mechscope.features import Standing
from mechscope.instrument import CachedRun
from mechscope.instrument.execution import Execution
from mechscope.subject import Components, Subject

Direction = Literal["denoise", "noise"]
Positions = str | int | Sequence[int | str]


def patch(
    subject: Subject,
    pairs: Pairs,
    *,
    site: str = "head",
    direction: Direction = "denoise",
    metric: str = "logit-diff",
    positions: Positions = "all",
    components: Components | str | None = None,
    source: str | Source | None = None,
    standing: Sequence[Standing] = (),
    execution: Execution = Execution(),
) -> Effects:
    """Patch every place of a site, one at a time.

    Args:
        subject: The model.
        pairs: Clean and corrupt prompts, equally long.
        site: `head` (z), `query`, `key`, `value`, `pattern`, `attention`, `mixer`, `mlp`, `neuron`, `expert`, `residual`, `embedding`, or
            `latent` of dictionaries.
        direction: `denoise` (clean values into the corrupt run) or `noise` (corrupt values into the clean run).
        metric: `logit-diff`, `probability`, `loss` or `kl`.
        positions: Tokens that are patched: `all`, `last`, `changed`, a segment's name, a position or several; `each` makes one row per position, a list
            of names one row per name.
        components: Only these heads, MLPs, layers, experts or latents.
        source: Where the values come from, if not from the other text.
        standing: Dictionaries whose latents are meant.
        execution: Tokens of a batch (1,024 by default), progress.

    Returns:
        One row per place and set of positions.

    Raises:
        MechscopeError: Pairs, positions, components or metric do not fit the model or each other.
    """
    if direction not in ("denoise", "noise"):
        raise SettingsError(f"direction {direction!r} is not known: use denoise (clean into corrupt) or noise (corrupt into clean)")
    check_fits(subject, pairs)
    where = chosen_places(subject.anatomy, site, components, standing)
    recorded = {place.site for place in where}
    origin = source_named(source if source is not None else ("clean" if direction == "denoise" else "corrupt"))
    labels = position_labels(positions, pairs)
    gathered = PerText(pairs)

    def patched(batch: PairBatch) -> dict[str, np.ndarray]:
        runs = {name: CachedRun(subject, getattr(batch, name), batch.real, sites=recorded) for name in ("clean", "corrupt")}
        by = metric_of(metric, batch, runs["clean"])
        unchanged = {name: Runs(run, by).unchanged() for name, run in runs.items()}
        value = origin.bind(subject, batch, recorded, runs)
        base = Runs(runs["corrupt" if direction == "denoise" else "clean"], by)
        units, missing = [], []
        for place in where:
            for _, mask, absent in position_masks(positions, batch, pairs):
                units.append(edits_of((place,), value, mask))
                missing.append(absent)
        values = base.of(units, progress=gathered.step)
        values[np.stack(missing)] = np.nan
        return {**unchanged, "patched": values}

    gathered.run(patched, execution, tokens=1024, label=f"patching {where[0].kind}", units=len(where) * len(labels))
    rows = [place_columns(place, label) for place in where for label in labels]
    values, clean, corrupt = gathered["patched"], gathered["clean"], gathered["corrupt"]
    base = corrupt if direction == "denoise" else clean
    return effects(rows, values, base, metric=metric, clean=clean, corrupt=corrupt, direction=direction)


def position_labels(positions: Positions, pairs: Pairs) -> list[str]:
    """Return the names of the sets of positions that a sweep goes through."""
    if positions == "each":
        return [str(index) for index in range(max(len(pair.clean) for pair in pairs))]
    if isinstance(positions, Sequence) and not isinstance(positions, str) and positions and all(isinstance(x, str) for x in positions):
        return [str(name) for name in positions]
    return [str(positions) if isinstance(positions, str | int) else ",".join(map(str, positions))]


def position_masks(positions: Positions, batch: PairBatch, pairs: Pairs) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    """Yield the sets of positions of a batch: name, ``(batch, token)`` mask, and which texts have no such position.

    Raises:
        DataError: A position lies outside a text, or a segment is not known.
    """
    labels = position_labels(positions, pairs)
    present = np.zeros(len(batch.pairs), dtype=bool)
    if positions == "each":
        for index, label in enumerate(labels):
            mask = torch.zeros_like(batch.real)
            if index < mask.shape[1]:
                mask[:, index] = batch.real[:, index]
            yield label, mask, ~mask.any(1).numpy()
    elif len(labels) > 1 or (isinstance(positions, Sequence) and not isinstance(positions, str) and isinstance(positions[0], str)):
        for label in labels:
            yield label, batch.positions(label), present
    else:
        one = positions if isinstance(positions, str | int) else [int(at) for at in positions]
        yield labels[0], batch.positions(one), present
