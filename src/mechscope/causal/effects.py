"""The result of a sweep: one row per changed place, with intervals over texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechscope.causal.places import Place
from mechscope.stats.inference import benjamini_hochberg, paired_difference

_REPLICATES = 1000


@dataclass(frozen=True)
class Effects:
    """What changing each place did.

    Attributes:
        table: One row per place: `component`, `site`, `layer`, `head` and `feature` (−1 where there is none), `positions`, `metric`, `n`, `value` (mean
            metric of the changed run), `effect` (its mean difference from the unchanged run), `se`, `low`, `high` (95 % interval over texts), `p`,
            `q` (Benjamini–Hochberg over the table); of sweeps between two runs also `normalised` (0: as the corrupt run, 1: as the clean run; a
            ratio of means) with `normalised_low`, `normalised_high` (percentile bootstrap over texts).
        values: ``(place, text)``: the metric of every changed run.
        unchanged: ``(text)``: the metric of the run that was changed.
        clean: ``(text)``: the metric of the clean run, if there is one.
        corrupt: ``(text)``: the metric of the corrupt run.
        notes: What a reader should know of the run.
    """

    table: pd.DataFrame
    values: Float[np.ndarray, "place text"]
    unchanged: Float[np.ndarray, " text"]
    clean: Float[np.ndarray, " text"] | None = None
    corrupt: Float[np.ndarray, " text"] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def matrix(self, column: str = "effect") -> pd.DataFrame:
        """Return a column as layer × head (or layer × positions), as a heatmap wants it."""
        across = "head" if (self.table["head"] >= 0).all() else "positions"
        return self.table.pivot_table(index="layer", columns=across, values=column, sort=False)


def place_columns(place: Place, positions: str = "all") -> dict[str, Any]:
    """Return the columns that name a row's place."""
    head, feature = (-1 if index is None else index for index in (place.head, place.feature))
    where = {"component": str(place), "site": place.site, "layer": place.layer}
    return {**where, "head": head, "feature": feature, "positions": positions}


def effects(
    rows: Sequence[dict[str, Any]],
    values: Float[np.ndarray, "place text"],
    unchanged: Float[np.ndarray, " text"],
    *,
    metric: str,
    clean: Float[np.ndarray, " text"] | None = None,
    corrupt: Float[np.ndarray, " text"] | None = None,
    seed: int = 0,
    **notes: Any,
) -> Effects:
    """Turn per-text metrics into a table with intervals.

    Args:
        rows: What each row is about; its columns come first.
        values: The metric of every changed run; NaN where a text has no such place.
        unchanged: The metric of the run that was changed.
        metric: Its name.
        clean: The metric of the clean run, for `normalised`.
        corrupt: The metric of the corrupt run.
        seed: Seed of the bootstrap.
        notes: Kept with the result.
    """
    table = pd.DataFrame(list(rows))
    change = paired_difference(values.T, np.broadcast_to(unchanged[:, None], values.T.shape))
    table["metric"] = metric
    table["n"] = change.n.astype(int)
    counted = ~np.isnan(values)
    table["value"] = np.where(counted.any(1), np.where(counted, values, 0).sum(1) / np.maximum(counted.sum(1), 1), np.nan)
    table["effect"], table["se"], table["low"], table["high"] = change.mean, change.standard_error, change.low, change.high
    table["p"], table["q"] = change.p, benjamini_hochberg(change.p)
    if clean is not None and corrupt is not None:
        ratio, low, high = _normalised(values, clean, corrupt, seed)
        table["normalised"], table["normalised_low"], table["normalised_high"] = ratio, low, high
    return Effects(table, values, unchanged, clean, corrupt, notes)


def _normalised(values: np.ndarray, clean: np.ndarray, corrupt: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean(value − corrupt) / mean(clean − corrupt) over the texts of each row, with percentile bootstrap intervals.

    A ratio of means: a mean of per-text ratios would be ruled by texts on which the two runs hardly differ.
    """
    counted = ~np.isnan(values)
    above = np.where(counted, values - corrupt, 0.0)
    span = np.where(counted, clean - corrupt, 0.0)
    texts = values.shape[1]
    weights = np.random.default_rng(seed).multinomial(texts, np.full(texts, 1 / texts), size=_REPLICATES).astype(np.float64)

    def ratio(weight: np.ndarray) -> np.ndarray:
        below = span @ weight.T
        return np.divide(above @ weight.T, below, out=np.full(below.shape, np.nan), where=below != 0)

    value = ratio(np.ones((1, texts)))[:, 0]
    if texts < 2:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    replicates = ratio(weights)
    low, high = np.full(len(values), np.nan), np.full(len(values), np.nan)
    some = ~np.isnan(replicates).all(1)  # a place that no text has, or runs that do not differ, have no share
    low[some], high[some] = np.nanquantile(replicates[some], [0.025, 0.975], axis=1)
    return value, low, high
