"""The numbers of any job's tables, as curves over steps: which columns are values, which say how sure they are, and which tell rows apart.

Sections say what every column is, so nothing is said again for each job. A value is a column with a unit or with an interval. The columns that tell rows
apart are as many of the others, from the left, as it takes until no two rows of a step are alike; a table whose rows are never told apart gives none.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from pandas.api import types

from mechscope.report.section import TableSpec
from mechscope.report.sections import table_specs

STEP = "step"
"""The column that says of which step a row is."""
COLUMNS = ("step", "table", "quantity", "unit", "curve", "component", "value", "low", "high", "n")
MOST_CURVES = 20_000
"""Tables of more rows a step (compositions of all pairs of heads) are left out."""
# what names one text
_SINGLE = frozenset(("text", "document", "prompt", "example"))
# told by the component
_PLACE = ("layer", "head", "component")


def curves(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the numbers of tables as curves over steps.

    Args:
        tables: Tables of a job by name, those of all steps below each other, with a column `step`.

    Returns:
        One row per step, table, quantity and curve (`COLUMNS`): `quantity` is the column, `curve` what tells its rows apart, in words; empty where a step
        has one row. Curves without a number at two steps or more are left out, and those that never move.
    """
    specs = table_specs()
    parts = [_numbers(name, table, specs[name]) for name, table in tables.items() if name in specs and len(table)]
    every = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))
    if every.empty:
        return every
    known = every[every["value"].notna()]
    by_curve = known.groupby(["table", "quantity", "curve"], sort=False)
    moves = (by_curve[STEP].transform("nunique") >= 2) & (by_curve["value"].transform("max") > by_curve["value"].transform("min"))
    return known[moves].reset_index(drop=True)


def meaning(table: str, quantity: str) -> str:
    """Return what a column of a table means, in the words of its section."""
    return table_specs()[table].columns[quantity].meaning


def _numbers(name: str, table: pd.DataFrame, spec: TableSpec) -> pd.DataFrame:
    values = [
        column for column, told in spec.columns.items() if (told.unit or told.behind) and column in table and _is_number(table[column])
    ]
    keys = _keys(table, spec)
    if keys is None or not values or _illustrates(keys, spec) or (len(table) / table[STEP].nunique()) * len(values) > MOST_CURVES:
        return pd.DataFrame(columns=list(COLUMNS))
    component = table["component"].astype(str) if "component" in table else pd.Series("", index=table.index)
    said = [column for column in keys if column not in _PLACE and table[column].nunique() > 1]
    # what stands first in its kind at one step may not at the next
    fixed = bool((component.groupby([table[column] for column in keys]).nunique() == 1).all()) if keys else True
    placed = component.nunique() > 1 and (fixed or any(column in keys for column in _PLACE))
    texts = [table[column].astype(str) for column in said] + ([component] if placed else [])
    if not placed:  # a layer or head without a component's name
        texts += [f"{column} " + table[column].astype(str) for column in keys if column in _PLACE and table[column].nunique() > 1]
    curve = pd.Series([", ".join(parts) for parts in zip(*texts, strict=True)] if texts else "", index=table.index)
    parts = []
    for column in values:
        ends = {end: _end(table, column, end, spec) for end in ("low", "high")}
        parts.append(
            pd.DataFrame(
                {
                    STEP: table[STEP],
                    "table": name,
                    "quantity": column,
                    "unit": spec.columns[column].unit,
                    "curve": curve,
                    "component": component,
                    "value": table[column].astype(float),
                    **ends,
                    "n": table["n"].astype(float) if "n" in table and _is_number(table["n"]) else float("nan"),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _keys(table: pd.DataFrame, spec: TableSpec) -> list[str] | None:
    """Return the columns that tell the rows of a step apart; None where none do."""
    keys: list[str] = []
    if not table.duplicated([STEP]).any():
        return keys
    for column, told in spec.columns.items():
        if column not in table or told.unit or told.behind or column == "n":
            continue
        if types.is_bool_dtype(table[column]) or types.is_float_dtype(table[column]):
            continue
        keys.append(column)
        if not table.duplicated([STEP, *keys]).any():
            return keys
    return None


def _illustrates(keys: list[str], spec: TableSpec) -> bool:
    """Tell whether rows are of single texts, shown as examples."""
    return "n" not in spec.columns and not _SINGLE.isdisjoint(keys)


def _end(table: pd.DataFrame, column: str, end: str, spec: TableSpec) -> pd.Series:
    told = spec.columns[column]
    name = end if told.bare else f"{column}_{end}"
    known = end in told.behind and name in table
    return table[name].astype(float) if known else pd.Series(float("nan"), index=table.index)


def _is_number(column: pd.Series) -> bool:
    return bool(types.is_numeric_dtype(column) and not types.is_bool_dtype(column))
