"""What latents that fine-tuning added carry of its gain: put into the base and taken out of the tuned model, beside as many others and all there is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mechscope.stats.shares import share_of
from mechscope.studies.feature_difference import Request, trained_of
from mechscope.studies.run import Tables

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.features.diffing import Carried, LatentSet

_NO_GAIN = "fine-tuning did not lower the loss on these summaries"
# latents of the dictionary of differences that are put in together, at least
_STRONGEST = 10


def carry_all(request: Request) -> Tables:
    """Put what is new into the base and take it out of the tuned model, beside as many others and all there is."""
    import pandas as pd

    from mechscope.features.diffing import CROSSCODER, DIFFERENCE, LatentSet, carried, contributed

    settings, both = request.settings, request.pair
    trained = trained_of(request, {"base": both.base, "tuned": both.tuned})
    texts = request.texts.judged.first(settings.causal_documents)
    table = request.run.table("feature_latents")
    own = table[table["comparison"] == CROSSCODER].reset_index(drop=True)
    judged = own["judged"]
    groups = {"new by thresholds": np.flatnonzero(judged == "new"), "lost": np.flatnonzero(judged == "lost")}
    new = groups["new by thresholds"]
    # without another half of the documents, what is new by thresholds is all that can be said
    if own["beyond"].notna().any():
        new = np.flatnonzero(own["beyond"].astype(bool))
        if set(groups["new by thresholds"]) == set(new):
            del groups["new by thresholds"]
        groups = {"new": new, **groups}
    rows = []
    for name in (CROSSCODER, *((DIFFERENCE,) if settings.difference else ())):
        dictionary = trained.dictionaries[name]
        # what latents say of the difference is compared, not how active they are: both models may have them alike
        latents = own if name == CROSSCODER else request.run.table("feature_differences")
        energy = contributed(dictionary, latents["squares"].to_numpy())
        if name != CROSSCODER:
            groups = {"strongest": strongest(energy, max(_STRONGEST, len(new)))}
        sets = _sets(groups, energy, draws=settings.random_draws, seed=request.run.settings.seed)
        first = next(iter(groups))
        if name == CROSSCODER:
            sets |= {"mean difference": LatentSet(instead="mean"), "whole difference": LatentSet(instead="whole")}
        found = carried(
            both,
            dictionary,
            texts,
            sets,
            tokens=trained.reader.tokens,
            limits=dictionary.about["limits"],
            execution=request.run.execution,
        )
        rows.append(carried_rows(found, sets, first).assign(comparison=name))
    whole = pd.concat(rows, ignore_index=True)
    return {"feature_carried": whole[["comparison", *(column for column in whole if column != "comparison")]]}


def strongest(energy: np.ndarray, most: int) -> np.ndarray:
    """Return the latents that say most of the difference, by the energy of what they write of it."""
    latents: np.ndarray = np.argsort(-energy, kind="stable")[:most]
    return latents


def _sets(groups: Mapping[str, np.ndarray], energy: np.ndarray, *, draws: int, seed: int) -> dict[str, LatentSet]:
    """Return sets of latents by name: those of each group, beside the first one draws of as many others and of random vectors; then all latents."""
    from mechscope.features.diffing import LatentSet, alike

    chosen = {group: tuple(int(latent) for latent in latents) for group, latents in groups.items() if len(latents)}
    first, *others = groups
    sets = {first: LatentSet(chosen[first])} if first in chosen else {}
    for draw in range(draws if first in chosen else 0):
        # where no other latent is active there is none to draw
        if like := alike(chosen[first], energy, seed=seed * 1009 + draw):
            sets[f"other latents {draw}"] = LatentSet(like)
        sets[f"random vectors {draw}"] = LatentSet(chosen[first], draw=seed * 1009 + draw)
    sets |= {group: LatentSet(chosen[group]) for group in others if group in chosen}
    return sets | {"all latents": LatentSet()}


def carried_rows(found: Carried, sets: Mapping[str, LatentSet], first: str) -> pd.DataFrame:
    """Return which share of the gain every set carries, draws of one kind together.

    Args:
        found: Losses by set.
        sets: The sets; names of draws end in their number.
        first: The set whose share is compared with those of as many other latents and of random vectors.

    Returns:
        Two rows per set: `set`, `change` (`put into base`, `taken from tuned`), `latents`, `draws`, `n` (texts), `energy` (mean ‖c‖² per token), `loss` (of
        the changed model), `share` with `share_low` and `share_high` (of the gain, 95 % over texts), `least` and `most` (of the draws' shares),
        `withheld`; and of the first set how much more it carries than the mean of as many other latents: `more`, `more_low`, `more_high`.
    """
    import pandas as pd

    gain = found.base - found.tuned
    groups: dict[str, list[str]] = {}
    for name in sets:
        groups.setdefault(re.sub(r" \d+$", "", name), []).append(name)
    rows = []
    for change, losses, parts in (
        ("put into base", found.into_base, {name: found.base - loss for name, loss in found.into_base.items()}),
        ("taken from tuned", found.out_of_tuned, {name: loss - found.tuned for name, loss in found.out_of_tuned.items()}),
    ):
        for group, names in groups.items():
            part = np.mean([parts[name] for name in names], axis=0)
            share = share_of(part, gain, absent=_NO_GAIN, positive=True)
            each = [share_of(parts[name], gain, absent=_NO_GAIN, positive=True).value for name in names]
            row = {
                "set": group,
                "change": change,
                "latents": len(sets[names[0]].latents or ()),
                "draws": len(names),
                "n": share.n,
                "energy": float(np.mean([found.energy[name] for name in names])),
                "loss": float(np.mean([losses[name].mean() for name in names])),
                "share": share.value,
                "share_low": share.low,
                "share_high": share.high,
                "least": min(each),
                "most": max(each),
                "withheld": share.withheld,
            }
            if group == first and "other latents" in groups:
                others = np.mean([parts[name] for name in groups["other latents"]], axis=0)
                more = share_of(part - others, gain, absent=_NO_GAIN, positive=True)
                row |= {"more": more.value, "more_low": more.low, "more_high": more.high}
            rows.append(row)
    table = pd.DataFrame(rows)
    return table.assign(gain=float(gain.mean()), **{name: np.nan for name in ("more", "more_low", "more_high") if name not in table})
