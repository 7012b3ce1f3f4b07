"""How the latents of a dictionary are found again in another: whether a wider one keeps them, splits them, or has new ones.

Two latents are the same where the cosine of what they write is at least 0.7 (Leask et al. 2025, "Sparse autoencoders do not find canonical units"; there too a
wider dictionary's latents are called novel below that). Of every latent of one dictionary:

    largest cosine    with a latent of the other; their mean is the MMCS of Sharkey et al. (2022)
    found again       whether that is at least 0.7
    split into        how many of the other's latents are closest to it of all, and that close

and of every latent of the other whether it is new: closest to none.

The unit is the latent. Random directions, as many as the other dictionary has, stand beside it: in few dimensions much is close to something by chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.stats.shares import Share, share_of

COLUMNS = ("measure", "control", "n", "value", "low", "high", "withheld")
SAME = 0.7
# cosines held at once: rows of one dictionary with all of the other
_ROWS = 1024


def splitting(
    one: Dictionary,
    other: Dictionary,
    *,
    latents: Sequence[int] | None = None,
    others: Sequence[int] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Look for the latents of one dictionary in another.

    Args:
        one: The dictionary, usually the narrower one.
        other: The other; the same where `latents` and `others` are parts of a nested one.
        latents: Which of its latents; None for all.
        others: Which of the other's.
        seed: Of the random directions.

    Returns:
        One row per measure and control: `measure` (largest cosine, found again, split into, new in the other), `control` (empty, or random directions in place
        of the other), `n` (latents), `value`, `low`, `high` (95 %), `withheld`.

    Raises:
        SettingsError: They write different places.
    """
    if one.layout.outputs != other.layout.outputs:
        raise SettingsError(
            f"latents are compared by what they write: one dictionary writes {', '.join(map(str, one.layout.outputs))}, the other "
            f"{', '.join(map(str, other.layout.outputs))}"
        )
    first, second = _directions(one, latents), _directions(other, others)
    random = torch.randn(second.shape, generator=torch.Generator().manual_seed(seed), dtype=second.dtype).to(second)
    rows = []
    for control, there in (("", second), ("random directions", random / random.norm(dim=1, keepdim=True))):
        rows += [(measure, control, *share) for measure, share in _measured(first, there)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _directions(dictionary: Dictionary, latents: Sequence[int] | None) -> Float[Tensor, "latent width"]:
    chosen = range(dictionary.latents) if latents is None else latents
    rows = torch.cat([dictionary.directions(list(chosen), place) for place in dictionary.layout.outputs], dim=1).float()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def _measured(first: Tensor, second: Tensor) -> list[tuple[str, tuple[int, float, float, float, str]]]:
    largest, _ = _closest(first, second)
    back, nearest = _closest(second, first)
    same = back >= SAME
    counts = torch.bincount(nearest[same], minlength=len(first))
    return [
        ("largest cosine", _mean(largest)),
        ("found again", _mean((largest >= SAME).float())),
        ("split into", _mean(counts.float())),
        ("new in the other", _mean((~same).float())),
    ]


def _closest(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    found = [(part @ others.T).max(dim=1) for part in rows.split(_ROWS)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def _mean(values: Tensor) -> tuple[int, float, float, float, str]:
    array = values.double().cpu().numpy()
    share: Share = share_of(array, np.ones(len(array)), unit="latents")
    return share.n, share.value, share.low, share.high, share.withheld
