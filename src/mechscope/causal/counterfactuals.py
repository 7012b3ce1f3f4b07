"""Counterfactual runs: a run declared by where each component takes its value from.

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
from mechscope.data.scoring import PerText, Runs, check_fits, metric_of
from mechscope.errors import SettingsError
from mechscope.instrument import CachedRun
from mechscope.instrument.execution import Execution
from mechscope.subject import Components, Subject

CounterfactualRun = Mapping[str, str | Source]


def run_counterfactuals(
    subject: Subject,
    pairs: Pairs,
    runs: Mapping[str, CounterfactualRun],
    *,
    base: Which = "clean",
    metric: str = "logit-diff",
    execution: Execution = Execution(),
) -> Effects:
    """Run a model as declared.

    Args:
        subject: The model.
        pairs: The texts.
        runs: By name: components in text form, each with its source (`clean`, `corrupt`, `zero`, `resample`, or a `Source`).
        base: Which text is read.
        metric: `logit-diff`, `probability`, `loss` or `kl`.
        execution: Tokens of a batch (1,024 by default).

    Returns:
        One row per run; `component` is its name, `normalised` 0 as the corrupt and 1 as the clean run.

    Raises:
        MechscopeError: A component does not exist or has two sources, or pairs and metric do not fit.
    """
    if base not in ("clean", "corrupt"):
        raise SettingsError(f"base {base!r} is not known: a run reads the clean or the corrupt text")
    declared = {}
    for name, run in runs.items():
        parts = [(places_of(Components.parse(text), subject.anatomy, experts=True), source_named(source)) for text, source in run.items()]
        every = [place for where, _ in parts for place in where]
        if twice := [place for place in every if every.count(place) > 1]:
            raise SettingsError(f"run {name!r} gives {twice[0]} two sources: name it once")
        declared[name] = parts
    if not declared:
        raise SettingsError("no run was declared: give at least one, such as {'without': {'a3.h5': 'zero'}}")
    check_fits(subject, pairs)
    sites = {place.site for parts in declared.values() for where, _ in parts for place in where}
    gathered = PerText(pairs)

    def changed(batch: PairBatch) -> dict[str, np.ndarray]:
        bases = {name: CachedRun(subject, getattr(batch, name), batch.real, sites=sites) for name in ("clean", "corrupt")}
        judged = metric_of(metric, batch, bases["clean"])
        unchanged = {name: Runs(run, judged).unchanged() for name, run in bases.items()}
        units = [
            [edit for where, source in parts for edit in edits_of(where, source.bind(subject, batch, sites, bases))]
            for parts in declared.values()
        ]
        return {**unchanged, "changed": Runs(bases[base], judged).of(units, progress=gathered.step)}

    gathered.run(changed, execution, tokens=1024, label="running counterfactuals", units=len(declared))
    rows = [{"component": name, "site": "counterfactual", "layer": -1, "head": -1, "feature": -1, "positions": "all"} for name in declared]
    clean, corrupt = gathered["clean"], gathered["corrupt"]
    return effects(rows, gathered["changed"], gathered[base], metric=metric, clean=clean, corrupt=corrupt, base=base)
