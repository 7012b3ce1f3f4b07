"""Representations that two models share: how alike the geometry of their residual streams is, whatever the basis.

CKA (Kornblith et al. 2019, debiased) compares which tokens lie near which. Procrustes' similarity ‖XᵀY‖²_* / (‖X‖² ‖Y‖²) is 1 where a rotation and a
scale carry one set of vectors onto the other (Williams et al. 2021). SVCCA (Raghu et al. 2017) is the mean canonical correlation of the principal
directions that keep 99 % of each side's variance; with few rows it is near 1 for anything, so it is withheld below ten rows a direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.stats.geometry import cka

Layers = Sequence[Float[Tensor, "row width"]]
# layers of a model that a grid compares, so that deep models stay readable and cheap
_GRID = 12
_VARIANCE = 0.99
_ROWS_A_DIRECTION = 10


def same_representations(first: Layers, second: Layers, text_of: Int[np.ndarray, " row"]) -> pd.DataFrame:
    """Compare each layer of a model with the layer of another at the same relative depth.

    Args:
        first: The residual stream behind each block at the aligned tokens.
        second: The other model's.
        text_of: The text of every row.

    Returns:
        One row per layer of the first model: `layer`, `other_layer`, `n` (texts), `rows`, `cka`, `cka_shuffled` (each text beside another: what chance gives),
        `procrustes`, `svcca` and `withheld` (why that is NaN; empty where it is not).
    """
    found, apart = [], _shuffled(text_of)
    for layer, mine in enumerate(first):
        other = round(layer * (len(second) - 1) / max(1, len(first) - 1))
        x, y = mine.numpy().astype(np.float64), second[other].numpy().astype(np.float64)
        alike, reason = svcca(x, y)
        found.append(
            {
                "layer": layer,
                "other_layer": other,
                "n": len(np.unique(text_of)),
                "rows": len(x),
                "cka": cka(x, y),
                "cka_shuffled": cka(x, y[apart]),
                "procrustes": procrustes(x, y),
                "svcca": alike,
                "withheld": reason,
            }
        )
    return pd.DataFrame(found)


def similarity_grid(first: Layers, second: Layers) -> pd.DataFrame:
    """Compare layers of a model with layers of another, twelve of each at most.

    Returns:
        One row per two layers: `layer`, `other_layer`, `cka`.
    """
    mine, others = (sorted({round(at) for at in np.linspace(0, len(layers) - 1, _GRID)}) for layers in (first, second))
    rows = [{"layer": a, "other_layer": b, "cka": cka(first[a].numpy(), second[b].numpy())} for a in mine for b in others]
    return pd.DataFrame(rows)


def procrustes(x: Float[np.ndarray, "n d1"], y: Float[np.ndarray, "n d2"]) -> float:
    """Return the share of one set's variance that a rotation and a scale of the other explain; NaN where either does not vary."""
    x, y = x - x.mean(0), y - y.mean(0)
    own = (x**2).sum() * (y**2).sum()
    return float(np.linalg.norm(x.T @ y, "nuc") ** 2 / own) if own > 0 else float("nan")


def svcca(x: Float[np.ndarray, "n d1"], y: Float[np.ndarray, "n d2"]) -> tuple[float, str]:
    """Return the mean canonical correlation of the directions that keep 99 % of each side's variance, or NaN and why it is withheld."""
    bases = [_principal(each - each.mean(0)) for each in (x, y)]
    directions = max(basis.shape[1] for basis in bases)
    if not min(basis.shape[1] for basis in bases):
        return float("nan"), "the representation does not vary"
    if len(x) < _ROWS_A_DIRECTION * directions:
        return float(
            "nan"
        ), f"too few rows: {len(x):,} of at least {_ROWS_A_DIRECTION * directions:,}, ten for each of {directions} directions"
    # of orthonormal bases the singular values of their product are the canonical correlations
    return float(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).clip(0, 1).mean()), ""


def _principal(centred: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n kept"]:
    """Return an orthonormal basis of the principal components that keep 99 % of the variance, as columns over rows."""
    # cheaper than a decomposition of all rows, and small directions do not count
    variance, directions = (part[..., ::-1] for part in np.linalg.eigh(centred.T @ centred))
    if not variance[0] > 0:
        return centred[:, :0]
    kept = int(np.searchsorted(np.cumsum(variance) / variance.sum(), _VARIANCE)) + 1
    return centred @ (directions[:, :kept] / np.sqrt(variance[:kept]))


def _shuffled(text_of: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
    """Return an order of the rows in which each stands beside one of another text: shifted by half of all rows."""
    return np.roll(np.arange(len(text_of)), len(text_of) // 2)
