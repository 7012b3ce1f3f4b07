"""Series over sizes or checkpoints: every series a line with points, its interval a band in its colour, and what it is compared with dashed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd

from mechscope.report.marks.curves import series_scales
from mechscope.report.marks.figure import Figure, Numbers, definition

# a ratio with a small denominator can lie anywhere; what lies beyond is drawn at the edge and said
_LOWEST, _HIGHEST = -1.0, 2.0


@dataclass(frozen=True)
class Series:
    """One series of a table.

    Attributes:
        name: What it is called.
        column: Column of its values.
        ends: What stands before `low` and `high` in the names of the columns of its interval; None where it has none.
        chance: Whether it is what chance gives, which is drawn dashed.
    """

    name: str
    column: str
    ends: str | None = None
    chance: bool = False


def long(table: pd.DataFrame, series: Sequence[Series], keep: Sequence[str]) -> pd.DataFrame:
    """Return one row per point and series, as `curves` draws them: `series`, `chance`, `value`, `low`, `high` and the columns `keep`."""
    parts = []
    for each in series:
        part = table[[*keep]].assign(series=each.name, chance=each.chance, value=table[each.column].astype(float))
        for end in ("low", "high"):
            values = None if each.ends is None else table.get(f"{each.ends}{end}")
            part[end] = float("nan") if values is None else values.astype(float)
        parts.append(part[part["value"].notna()])
    return pd.concat(parts, ignore_index=True)


def curves(
    table: pd.DataFrame,
    *,
    name: str,
    title: str,
    caption: str,
    x: tuple[str, str],
    axis: str,
    logarithmic: bool = True,
    unit: bool = True,
    kinds: tuple[str, str] = ("measured", "chance"),
    colours: Mapping[str, str] | None = None,
    wide: bool = False,
) -> list[Figure]:
    """Draw series over sizes or checkpoints, each a line with points and its interval as a band; nothing where no value is a number.

    Args:
        table: One row per point: `series`, the column of `x`, `value`, `low`, `high`, and `chance` (whether it is dashed), see `long`.
        name: The figure's name.
        title: Its title.
        caption: How to read it.
        x: Column of the horizontal axis, and its title.
        axis: Title of the vertical axis.
        logarithmic: Whether the horizontal axis is; otherwise it has the column's values in their order.
        unit: Whether the numbers are shares: zero and one are ruled, and what lies far outside is drawn at the edge.
        kinds: What solid and dashed lines are called.
        colours: Colours of some series by name.
        wide: Whether the page gives it a whole row.
    """
    column, heading = x
    table = table.assign(kind=[kinds[bool(chance)] for chance in table["chance"]])
    table = table[table["value"].notna() & ((table[column] > 0) if logarithmic else True)]
    if table.empty:
        return []
    bounds: dict[str, Any] = {"zero": not unit, "nice": not unit}
    if unit:
        lowest, highest = min(0.0, float(table["value"].min())), max(1.0, float(table["value"].max()))
        caption += (
            f" Drawn from {_LOWEST:g} to {_HIGHEST:g}; the values run from {lowest:.3g} to {highest:.3g}."
            if lowest < _LOWEST or highest > _HIGHEST
            else ""
        )
        bounds["domain"] = [max(_LOWEST, lowest) - 0.04, min(_HIGHEST, highest) + 0.04]
    names, numbers = list(dict.fromkeys(table["series"])), Numbers()
    colour, shape = series_scales(names, colours)
    legend = alt.Legend(title=None, symbolLimit=0) if len(names) > 1 else None
    both = bool((table.groupby("series")["kind"].nunique() > 1).any())
    dash = alt.StrokeDash(
        "kind:N",
        scale=alt.Scale(domain=list(kinds), range=[[1, 0], [5, 4]]),
        legend=alt.Legend(title=None, symbolType="stroke", symbolStrokeWidth=2) if both else None,
    )
    scale = alt.Scale(type="log", nice=False, padding=10) if logarithmic else alt.Undefined
    across = (
        alt.X(
            f"{column}:Q",
            title=heading,
            scale=scale,
            axis=alt.Axis(format=".1~%" if column == "fraction" else "~s", tickCount=6, grid=False),
        )
        if logarithmic
        else alt.X(f"{column}:N", title=heading, sort=list(dict.fromkeys(table[column])), axis=alt.Axis(labelAngle=-30, grid=False))
    )
    down = alt.Y("value:Q", title=axis, scale=alt.Scale(**bounds), axis=alt.Axis(tickCount=6, grid=True))
    rows = numbers.add(table, list(dict.fromkeys(["series", "kind", column, "value", "low", "high", *_sizes(table)])))
    base = alt.Chart(rows).encode(x=across, color=alt.Color("series:N", scale=colour, legend=legend))
    tooltip = [
        alt.Tooltip("series:N"),
        alt.Tooltip("kind:N"),
        alt.Tooltip(
            f"{column}:{'Q' if logarithmic else 'N'}",
            title=heading,
            **({"format": ".3~%" if column == "fraction" else ","} if logarithmic else {}),
        ),
        *(alt.Tooltip(f"{other}:Q", format=".3~%" if other == "fraction" else ",") for other in _sizes(table) if other != column),
        *(
            alt.Tooltip(f"{end}:Q", title=words, format=".4~g")
            for end, words in (("value", axis), ("low", "95\u202f% from"), ("high", "to"))
        ),
    ]
    marks: list[Any] = []
    if unit:
        ruled = numbers.add(pd.DataFrame({"level": [0, 1]}), ["level"])
        marks.append(alt.Chart(ruled).mark_rule(style="zero", color="#8C8C8C").encode(y=alt.Y("level:Q", title=axis)))
    if table["low"].notna().any():
        band = base.mark_area(fillOpacity=0.14, clip=unit).encode(y=alt.Y("low:Q", title=axis), y2="high:Q", detail="kind:N")
        # a band of one point has no width
        marks += [band, base.mark_rule(strokeWidth=1, opacity=0.5, clip=unit).encode(y=alt.Y("low:Q", title=axis), y2="high:Q")]
    marks.append(base.mark_line(strokeWidth=2, clip=unit).encode(y=down, strokeDash=dash))
    points = base.mark_point(filled=True, size=36, opacity=1, clip=unit)
    marks.append(points.encode(y=down, shape=alt.Shape("series:N", scale=shape, legend=legend), tooltip=tooltip))
    chart = alt.layer(*marks).properties(height=250)
    spec = definition(chart, numbers, description=title)
    return [Figure(name=name, title=title, caption=caption, spec=spec, width=760 if wide else 520, wide=wide)]


def _sizes(table: pd.DataFrame) -> list[str]:
    return [column for column in ("edges", "fraction") if column in table]
