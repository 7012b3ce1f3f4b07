"""Worlds: a run declared by where each component takes its value from.

    {"a3.h5,m2": "corrupt", "layers:0": Text("clean", model=tuned), "a1.h0": Vector(0.0), "m4": mean_of(…)}

Components that are not named compute on what they are given. A head's value is its z, a whole layer's are its heads' z and its MLP's output.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mechscope.causal.effects import Effects, effects
from mechscope.causal.places import edits_of, places_of
from mechscope.causal.sources import Source, Which, source_named
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.errors import SettingsError
from mechscope.instrument import Prefix
from mechscope.scoring import Gathered, Runs, check_fits, metric_of
from mechscope.subject import Components, Subject

World = Mapping[str, str | Source]


def run_worlds(
    subject: Subject,
    pairs: Pairs,
    worlds: Mapping[str, World],
    *,
    base: Which = "clean",
    metric: str = "logit-diff",
    tokens_per_batch: int = 1024,
    seed: int = 0,
) -> Effects:
    """Run a model in declared worlds.

    Args:
        subject: The model.
        pairs: The texts.
        worlds: By name: components in text form, each with its source (`clean`, `corrupt`, `zero`, `resample`, or a `Source`).
        base: Which text is read.
        metric: As for `patch`.
        tokens_per_batch: Most tokens of a batch of pairs, padding included.
        seed: Seed of the bootstrap.

    Returns:
        One row per world; `component` is its name, `normalised` 0 as the corrupt and 1 as the clean run.

    Raises:
        MechscopeError: A component does not exist or has two sources, or pairs and metric do not fit.
    """
    if base not in ("clean", "corrupt"):
        raise SettingsError(f"base {base!r} is not known: a world is read from the clean or the corrupt text")
    declared = {}
    for name, world in worlds.items():
        parts = [(places_of(Components.parse(text), subject.anatomy), source_named(source)) for text, source in world.items()]
        every = [place for where, _ in parts for place in where]
        if twice := [place for place in every if every.count(place) > 1]:
            raise SettingsError(f"world {name!r} gives {twice[0]} two sources: name it once")
        declared[name] = parts
    if not declared:
        raise SettingsError("no world was declared: give at least one, such as {'without': {'a3.h5': 'zero'}}")
    check_fits(subject, pairs)
    sites = {place.site for parts in declared.values() for where, _ in parts for place in where}
    gathered = Gathered(pairs)

    def in_worlds(batch: PairBatch) -> dict[str, np.ndarray]:
        runs = {name: Prefix(subject, getattr(batch, name), batch.real, sites=sites) for name in ("clean", "corrupt")}
        judged = metric_of(metric, batch, runs["clean"])
        unchanged = {name: Runs(prefix, judged).unchanged() for name, prefix in runs.items()}
        units = [
            [edit for where, source in parts for edit in edits_of(where, source.bind(subject, batch, sites, runs))]
            for parts in declared.values()
        ]
        return {**unchanged, "world": Runs(runs[base], judged).of(units)}

    gathered.run(in_worlds, tokens_per_batch)
    rows = [{"component": name, "site": "world", "layer": -1, "head": -1, "feature": -1, "positions": "all"} for name in declared]
    clean, corrupt = gathered["clean"], gathered["corrupt"]
    return effects(rows, gathered["world"], gathered[base], metric=metric, clean=clean, corrupt=corrupt, seed=seed, base=base)
