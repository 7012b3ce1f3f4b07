"""Ablation: take components out of a run, and see what it costs.

A component's value is replaced by zero (Olsson et al. 2022), by its mean over a reference set (Wang et al. 2022) or by its value on another text
(resample; Chan et al. 2022). Zero and mean can lie far from anything the model ever computes; resampling stays in distribution.

An expert (`m3.e5`) is ablated in what it adds: tokens go to the same experts as before, and gate weights are not shared out anew among the others. Its mean is
over all tokens, zero where it gets none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from mechscope.causal.effects import Effects, effects, place_columns
from mechscope.causal.places import Place, chosen_places, edits_of, places_of
from mechscope.causal.sources import Source, source_named
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, Runs, check_fits, metric_of
from mechscope.errors import SettingsError
from mechscope.features import Standing
from mechscope.instrument import CachedRun
from mechscope.instrument.execution import Execution
from mechscope.subject import Components, Subject
from mechscope.subject.anatomy import Anatomy

Mode = Literal["each", "keep"]


def ablate(
    subject: Subject,
    pairs: Pairs,
    *,
    sites: Sequence[str] = ("head", "mlp"),
    source: str | Source = "zero",
    mode: Mode = "each",
    metric: str = "loss",
    components: Components | str | None = None,
    standing: Sequence[Standing] = (),
    execution: Execution = Execution(),
) -> Effects:
    """Ablate places one at a time, or all but one at a time, on the clean texts.

    Args:
        subject: The model.
        pairs: The texts; only the clean ones are run, and the corrupt ones where they are the source.
        sites: Sites whose places are ablated; `latent` for those of dictionaries.
        source: `zero`, `resample`, `corrupt`, or a `Mean` from `mean_of`.
        mode: `each` leaves one out, `keep` keeps only one (of the places considered).
        metric: `loss`, `logit-diff`, `probability` or `kl`.
        components: Only these.
        standing: Dictionaries whose latents are meant.
        execution: Tokens of a batch (1,024 by default), progress.

    Returns:
        One row per place.

    Raises:
        MechscopeError: Texts, components or metric do not fit the model or each other.
    """
    if mode not in ("each", "keep"):
        raise SettingsError(f"mode {mode!r} is not known: use each (leave one out) or keep (keep only one)")
    where = ablated_places(subject.anatomy, sites, components, standing)
    sets = [(place,) for place in where] if mode == "each" else [tuple(other for other in where if other != place) for place in where]
    values, unchanged = _ablated(subject, pairs, sets, source, metric, execution)
    return effects([place_columns(place) for place in where], values, unchanged, metric=metric, mode=mode)


def ablate_together(
    subject: Subject,
    pairs: Pairs,
    sets: Sequence[Components | str],
    *,
    source: str | Source = "zero",
    metric: str = "loss",
    execution: Execution = Execution(),
) -> Effects:
    """Ablate whole sets of components, one set at a time.

    Args:
        subject: The model.
        pairs: The texts; only the clean ones are run, and the corrupt ones where they are the source.
        sets: Components ablated together.
        source: `zero`, `resample`, `corrupt`, or a `Mean` from `mean_of`.
        metric: `loss`, `logit-diff`, `probability` or `kl`.
        execution: Tokens of a batch (1,024 by default), progress.

    Returns:
        One row per set; `component` is the set's text form.

    Raises:
        MechscopeError: Texts, components or metric do not fit the model or each other.
    """
    parsed = [Components.parse(chosen) if isinstance(chosen, str) else chosen for chosen in sets]
    changed = [places_of(chosen, subject.anatomy, experts=True) for chosen in parsed]
    values, unchanged = _ablated(subject, pairs, changed, source, metric, execution)
    rows = [{"component": str(chosen), "site": "set", "layer": -1, "head": -1, "feature": -1, "positions": "all"} for chosen in parsed]
    return effects(rows, values, unchanged, metric=metric)


def random_like(components: Components, anatomy: Anatomy, n: int, *, seed: int = 0) -> list[Components]:
    """Draw random head sets with as many heads in every layer as a given set: the control for "these heads matter".

    Args:
        components: The set to be matched; a whole layer counts as its heads.
        anatomy: The model's parts.
        n: How many sets.
        seed: Seed of the draw.

    Raises:
        SettingsError: The set has no heads, or fills its layers, so that there is no other set like it.
    """
    heads = components.validate(anatomy).expand(anatomy.n_heads, anatomy.mixing).heads
    profile = Counter(layer for layer, _ in heads)
    if not profile:
        raise SettingsError(f"components {str(components)!r} hold no heads: there are no random head sets like them")
    if all(count == anatomy.n_heads for count in profile.values()):
        raise SettingsError(f"components {str(components)!r} are all heads of their layers: no other set has the same layer profile")
    random = np.random.default_rng(seed)
    return [
        Components.of_heads(
            (layer, int(head)) for layer, count in profile.items() for head in random.choice(anatomy.n_heads, count, replace=False)
        )
        for _ in range(n)
    ]


def ablated_places(
    anatomy: Anatomy, sites: Sequence[str], components: Components | str | None, standing: Sequence[Standing] = ()
) -> list[Place]:
    """List the places of all sites; components that one site does not have may belong to another.

    Raises:
        SettingsError: A site is not known, a component does not exist, or nothing is left to ablate.
    """
    where: list[Place] = []
    failed: SettingsError | None = None
    for site in sites:
        try:
            where += chosen_places(anatomy, site, components, standing)
        except SettingsError as error:
            failed = error
            if components is None or len(sites) == 1:
                raise
    if not where:
        raise failed or SettingsError("no site was given: name at least one, such as head")
    return where


def _ablated(
    subject: Subject, pairs: Pairs, sets: Sequence[Sequence[Place]], source: str | Source, metric: str, execution: Execution
) -> tuple[np.ndarray, np.ndarray]:
    """Return the metric of every ablated run and of the whole model."""
    check_fits(subject, pairs)
    replacement = source_named(source)
    sites = {place.site for chosen in sets for place in chosen}
    gathered = PerText(pairs)

    def ablated(batch: PairBatch) -> dict[str, np.ndarray]:
        clean = CachedRun(subject, batch.clean, batch.real, sites=sites)
        runs = Runs(clean, metric_of(metric, batch, clean))
        value = replacement.bind(subject, batch, sites, {"clean": clean})
        units = [edits_of(chosen, value) for chosen in sets]
        return {"unchanged": runs.unchanged(), "ablated": runs.of(units, progress=gathered.step)}

    gathered.run(ablated, execution, tokens=1024, label="ablating", units=len(sets))
    return gathered["ablated"], gathered["unchanged"]
