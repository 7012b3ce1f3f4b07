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
from mechscope.stats.shares import shares_of

# KL (nats) of a run with itself, but for rounding
_NO_DIVERGENCE = 1e-6


@dataclass(frozen=True)
class Effects:
    """What changing each place did.

    Attributes:
        table: One row per place: `component`, `site`, `layer`, `head` and `feature` (−1 where there is none), `positions`, `metric`, `n`, `value` (mean
            metric of the changed run), `effect` (its mean difference from the unchanged run), `se`, `low`, `high` (95 % interval over texts), `p`,
            `q` (Benjamini–Hochberg over the table; both NaN for a divergence from the unchanged run, which cannot be zero on average); of sweeps
            between two runs also `normalised` (0: as the corrupt run, 1: as the clean run; a ratio of means) with `normalised_low`,
            `normalised_high` (Fieller's interval over texts) and `withheld`: why these three are NaN, in words, empty where they are not
            (`mechscope.stats.shares`).
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

    def __repr__(self) -> str:
        places, texts = self.values.shape
        largest = self.table.loc[self.table["effect"].abs().sort_values(ascending=False, kind="stable").index[:1]]
        named = [
            f"; largest: {row.component} at {row.positions} {row.effect:+.3g} [{row.low:+.3g}, {row.high:+.3g}]"
            for row in largest.itertuples()
        ]
        metrics = ", ".join(dict.fromkeys(self.table["metric"]))
        return f"Effects({metrics} of {places:,} place{'s' * (places != 1)} over {texts:,} text{'s' * (texts != 1)}{''.join(named)})"

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The table by the name that it has in a run folder, so that the page's figures can be drawn of it (`mechscope.plot`)."""
        return {"effects": self.table}

    def matrix(self, column: str = "effect") -> pd.DataFrame:
        """Return a column as layer × head (or layer × positions), as a heatmap wants it."""
        across = "head" if (self.table["head"] >= 0).all() else "positions"
        return self.table.pivot_table(index="layer", columns=across, values=column, sort=False)


def place_columns(place: Place, positions: str = "all") -> dict[str, Any]:
    """Return the columns that name a row's place."""
    head, feature = (-1 if index is None else index for index in (place.head, place.feature))
    where = {"component": str(place), "site": place.kind, "layer": place.layer}
    return {**where, "head": head, "feature": feature, "positions": positions}


def effects(
    rows: Sequence[dict[str, Any]],
    values: Float[np.ndarray, "place text"],
    unchanged: Float[np.ndarray, " text"],
    *,
    metric: str,
    clean: Float[np.ndarray, " text"] | None = None,
    corrupt: Float[np.ndarray, " text"] | None = None,
    better: int = 0,
    absent: str = "the two runs do not differ in the metric",
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
        better: Which way the clean run has to differ from the corrupt one so that there is something to take shares of: 1 where its metric has to be
            higher, −1 lower, 0 either way.
        absent: What is said where it does not, before the difference (in the direction of `better`) and its interval.
        notes: Kept with the result.
    """
    table = pd.DataFrame(list(rows))
    change = paired_difference(values.T, np.broadcast_to(unchanged[:, None], values.T.shape))
    table["metric"] = metric
    table["n"] = change.n.astype(int)
    counted = ~np.isnan(values)
    table["value"] = np.where(counted.any(1), np.where(counted, values, 0).sum(1) / np.maximum(counted.sum(1), 1), np.nan)
    table["effect"], table["se"], table["low"], table["high"] = change.mean, change.standard_error, change.low, change.high
    # where the run that is changed is the reference of a KL divergence, no effect is negative, and none is zero on average
    p = np.full(change.p.shape, np.nan) if metric == "kl" and (np.abs(unchanged) < _NO_DIVERGENCE).all() else change.p
    table["p"], table["q"] = p, benjamini_hochberg(p)
    if clean is not None and corrupt is not None:
        sign = better or 1
        share = shares_of(sign * (values - corrupt), sign * (clean - corrupt), absent=absent, positive=better != 0)
        table["normalised"], table["normalised_low"], table["normalised_high"] = share.value, share.low, share.high
        table["withheld"] = share.withheld
    return Effects(table, values, unchanged, clean, corrupt, notes)
