"""What changed when: of every curve over the steps of a series its largest change between neighbours, and its change point beside a null."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mechscope.stats.change_points import change_points, separate
from mechscope.stats.inference import benjamini_hochberg

CURVE = ["table", "quantity", "curve"]
LEVEL = 0.05


def changes(values: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Say of every curve what changed when.

    Args:
        values: Curves as `mechscope.report.course.curves` gives them.
        seed: Of the null and of the bootstrap.

    Returns:
        One row per curve, those of the same steps tested together; see the section `dynamics` for the columns. q is Benjamini–Hochberg's over all curves
        that were tested, and `found` says that it is at most .05 and BIC prefers two segments.
    """
    labels = values.drop_duplicates(CURVE).set_index(CURVE)[["unit", "component"]]
    wide = {
        name: values.pivot_table(index=CURVE, columns="step", values=name, sort=False, dropna=False)
        for name in ("value", "low", "high", "n")
    }
    order = pd.MultiIndex.from_frame(values[CURVE].drop_duplicates())
    steps = np.sort(values["step"].unique())
    matrix = {name: table.reindex(index=order, columns=steps).to_numpy(dtype=float) for name, table in wide.items()}
    present = np.isfinite(matrix["value"])
    parts = []
    for pattern in np.unique(present, axis=0):
        rows = np.flatnonzero((present == pattern).all(axis=1))
        own = {name: table[rows][:, pattern] for name, table in matrix.items()}
        parts.append(_changes(own, steps[pattern], seed).assign(row=rows))
    found = pd.concat(parts, ignore_index=True).sort_values("row", kind="stable").drop(columns="row").reset_index(drop=True)
    found.insert(0, "component", labels.loc[order, "component"].to_numpy())
    found.insert(0, "unit", labels.loc[order, "unit"].to_numpy())
    for position, name in enumerate(CURVE):
        found.insert(position, name, order.get_level_values(name).to_numpy())
    tested = found["jump_p"].notna()
    found["jump_q"] = np.nan
    if tested.any():
        found.loc[tested, "jump_q"] = benjamini_hochberg(found.loc[tested, "jump_p"].to_numpy())
    found["found"] = (found["jump_q"] <= LEVEL) & (found["bic"] > 0)
    return found


def _changes(own: dict[str, np.ndarray], steps: np.ndarray, seed: int) -> pd.DataFrame:
    value, low, high = own["value"], own["low"], own["high"]
    rows = np.arange(len(value))
    between = np.diff(value, axis=1)
    largest = np.abs(between).argmax(axis=1) + 1
    points = change_points(value, seed=seed)
    known = points.at >= 0

    def at(index: np.ndarray) -> pd.Series:
        return pd.Series(np.where(known, steps[np.where(known, index, 0)], -1)).astype("Int64").mask(~known)

    counted = np.where(np.isfinite(own["n"]), own["n"], np.inf).min(axis=1)
    return pd.DataFrame(
        {
            "steps": len(steps),
            "n": np.where(np.isfinite(counted), counted, np.nan),
            "first": value[:, 0],
            "first_low": low[:, 0],
            "first_high": high[:, 0],
            "last": value[:, -1],
            "last_low": low[:, -1],
            "last_high": high[:, -1],
            "change": value[:, -1] - value[:, 0],
            "largest": between[rows, largest - 1],
            "from_step": steps[largest - 1],
            "to_step": steps[largest],
            "before": value[rows, largest - 1],
            "before_low": low[rows, largest - 1],
            "before_high": high[rows, largest - 1],
            "after": value[rows, largest],
            "after_low": low[rows, largest],
            "after_high": high[rows, largest],
            "apart": separate(low, high, largest),
            "jump": points.jump,
            "jump_step": at(points.at),
            "jump_step_low": at(points.low),
            "jump_step_high": at(points.high),
            "bic": points.bic,
            "jump_p": points.p,
        }
    )
