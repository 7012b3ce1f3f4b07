"""What the page's script needs to draw lens grids: every layer (down) by every position (across) of a few real texts.

A grid belongs to a text and a lens and holds all models, so that base and tuned can be looked at in turn and subtracted. Numbers are packed
(`packed`), 38 bytes a cell, and the script draws only the window of positions that is looked at, so a text of 1,024 tokens stays usable. What a
page holds is bounded by `CELLS`: of further texts it says how many the Parquet table has, and of a text that is longer still the end is kept,
because that is where a summary stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from mechscope.report.marks.packed import POWER, Tokens, packed, segment_name, whole
from mechscope.report.theme import label, name_of

CELLS = 160_000
"""Cells (row, position, model) of all grids that a page holds: 6 MB; 48 layers by 1,024 positions by two models are 100,000."""
TOP = 5

_MEASURES = ("probability", "entropy", "kl")


def lens_grids(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any] | None:
    """Return all grids of a run, and how many were left out (`dropped`), as plain JSON values; None without a grid.

    Args:
        tables: The run's tables; `lens_grid` is drawn, with the tokens and segments of `lens_tokens` where that is there.
    """
    table = tables.get("lens_grid")
    if table is None:
        return None
    tokens, left, dropped, spelled = tables.get("lens_tokens"), CELLS, 0, Tokens()
    grids: list[dict[str, Any]] = []
    lenses = dict.fromkeys(table["lens"])
    for text, own in table.groupby("text", sort=False):
        for lens in (lens for lens in lenses if (own["lens"] == lens).any()):
            part = own[own["lens"] == lens]
            columns = len(part.drop_duplicates(["model", "component"]))
            fitting = left // max(1, columns)
            positions = part["position"].drop_duplicates().sort_values()
            # a first text is always shown, its end if not the whole
            if grids and len(positions) > fitting:
                dropped += 1
                continue
            positions = positions.tail(max(1, fitting))
            left -= len(positions) * columns
            grids.append(_grid(part, text, lens, positions.to_numpy(), None if tokens is None else tokens[tokens["text"] == text], spelled))
    return {"tokens": spelled.listed, "grids": grids, "dropped": dropped, "power": POWER, "top": TOP}


def _grid(
    part: pd.DataFrame, text: object, lens: object, positions: np.ndarray, tokens: pd.DataFrame | None, spelled: Tokens
) -> dict[str, Any]:
    rows = part.drop_duplicates("component").sort_values("layer", kind="stable")
    components = {component: i for i, component in enumerate(rows["component"])}
    models = list(dict.fromkeys(part["model"]))
    where = pd.Series(np.arange(len(positions)), index=positions)
    kept = part[part["position"].isin(where.index)]
    own = None if tokens is None else tokens.drop_duplicates("position").set_index("position").reindex(positions)
    empty = np.zeros(len(positions), dtype=np.int64)
    column = {name: empty if own is None else spelled.add(own[name]) for name in ("token", "target")}
    column["segment"] = empty if own is None else spelled.add(own["segment"].map(segment_name))
    return {
        "text": label(text),
        "lens": str(lens),
        "lens_name": f"{name_of(lens)} lens",
        "rows": [label(component) for component in components],
        "positions": [int(position) for position in positions],
        **{name: whole(values) for name, values in column.items()},
        "models": [
            {"model": str(model), "name": name_of(model), **_cells(kept[kept["model"] == model], components, where, spelled)}
            for model in models
        ],
    }


def _cells(cells: pd.DataFrame, components: Mapping[Any, int], where: pd.Series, spelled: Tokens) -> dict[str, Any]:
    """Return one model's numbers, row by row."""
    shape = (len(components), len(where))
    at = (cells["component"].map(components).to_numpy(), cells["position"].map(where).to_numpy())

    def dense(column: str) -> np.ndarray:
        values = np.full(shape, np.nan)
        values[at] = cells[column].astype(float)
        return values

    measured = {name: packed(dense(name)) for name in _MEASURES} | {"rank": whole(dense("rank"))}
    tops = [rank for rank in range(1, TOP + 1) if f"top_{rank}" in cells]
    likeliest, shares = np.zeros((len(tops), *shape), dtype=np.int64), np.full((len(tops), *shape), np.nan)
    for i, rank in enumerate(tops):
        likeliest[i][at] = spelled.add(cells[f"top_{rank}"])
        shares[i] = dense(f"p_{rank}")
    return measured | {"tops": len(tops), "likeliest": whole(likeliest), "shares": packed(shares)}
