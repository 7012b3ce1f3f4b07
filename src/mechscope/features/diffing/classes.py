"""Which latents of a crosscoder two models share, which only one of them has, and which of these are there again in another dictionary.

by norm     silent (too few tokens to be judged), first only, second only, shared, between: by the relative norm of the two decoders
judged      of those of one model: shrunk (ν of the error is high: the other model has it too), decoupled (ν of the reconstruction is high: other
            latents say the same there), else new (second only) or lost (first only); unclear where ν is not to be had
found again the largest cosine of a latent's longer decoder with those of the latents of another dictionary that were judged alike, beside the largest with
            as many random mixtures of all that dictionary's decoders
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from mechscope.errors import SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.diffing.by_chance import nearest_by_chance
from mechscope.features.diffing.scaling import Decoders
from mechscope.settings.diffing import ExclusiveSettings

BY_NORM = ("first only", "second only", "shared", "between", "silent")
JUDGED = ("new", "lost", "shrunk", "decoupled", "unclear")


def check_thresholds(settings: ExclusiveSettings) -> None:
    """Refuse thresholds by which what is shared would be exclusive too; `SettingsError`."""
    if settings.shared > settings.exclusive:
        raise SettingsError(f"setting 'shared' is {settings.shared}, above 'exclusive' {settings.exclusive}: no latent can be both")


def classified(latents: pd.DataFrame, settings: ExclusiveSettings) -> pd.DataFrame:
    """Return the table of `scaled_latents` with the columns `by_norm` and `judged` (empty for latents that are not one model's).

    Raises:
        SettingsError: What is shared would be exclusive too.
    """
    check_thresholds(settings)
    relative = latents["relative_norm"].to_numpy()
    active = (latents["tokens"] >= settings.least_tokens).to_numpy()
    by_norm = np.select(
        [
            ~active,
            relative < 1 - settings.exclusive,
            relative > settings.exclusive,
            (relative >= 1 - settings.shared) & (relative <= settings.shared),
        ],
        ["silent", "first only", "second only", "shared"],
        "between",
    )
    error, rebuilt = (latents[f"nu_{name}"].to_numpy() for name in ("error", "reconstruction"))
    judged = np.select(
        [
            np.isnan(error) | np.isnan(rebuilt),
            error >= settings.nu_error,
            rebuilt >= settings.nu_reconstruction,
            by_norm == "second only",
        ],
        ["unclear", "shrunk", "decoupled", "new"],
        "lost",
    )
    return latents.assign(by_norm=by_norm, judged=np.where(np.isin(by_norm, ("first only", "second only")), judged, ""))


def found_again(
    dictionary: Dictionary,
    latents: pd.DataFrame,
    other: Dictionary,
    others: pd.DataFrame,
    *,
    judged: str = "new",
    recurs: float = ExclusiveSettings().recurs,
    seed: int = 0,
) -> pd.DataFrame:
    """Look for latents of one judgement in another dictionary of the same places.

    Args:
        dictionary: A crosscoder.
        latents: Its latents, `classified`.
        other: Another.
        others: Its latents.
        judged: Which latents, and among which.
        recurs: Cosine from which one counts as found again.
        seed: Of the random mixtures.

    Returns:
        One row per latent of that judgement: `latent`, `cosine` (the largest of its longer decoder with one of the other dictionary's; NaN where that has
        none), `match` (that latent; −1 for none), `found` (whether that is enough), and of as many random mixtures of the other's decoders (see
        `nearest_by_chance`) `chance` (the largest cosine, mean over draws) and `chance_found` (share of draws in which it would be enough).
    """
    own, among = (table.loc[table["judged"] == judged, "latent"].to_numpy() for table in (latents, others))
    cosine, match = np.full(len(own), np.nan), np.full(len(own), -1)
    mine, theirs = Decoders.of(dictionary).longer[torch.tensor(own, dtype=torch.int64)], Decoders.of(other).longer
    if len(own) and len(among):
        one, two = (torch.nn.functional.normalize(each.double().cpu(), dim=1) for each in (mine, theirs[torch.tensor(among)]))
        best = (one @ two.T).max(dim=1)
        cosine, match = best.values.numpy(), among[best.indices.numpy()]
    chance, by_chance = nearest_by_chance(mine, theirs, len(among), recurs=recurs, seed=seed)
    return pd.DataFrame(
        {"latent": own, "cosine": cosine, "match": match, "found": cosine >= recurs, "chance": chance, "chance_found": by_chance}
    )
