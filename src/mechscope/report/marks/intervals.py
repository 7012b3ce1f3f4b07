"""Numbers with their intervals: one row per thing, or curves over a strength, each beside its control."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from mechscope.report.marks.curves import series_scales
from mechscope.report.marks.figure import Figure, Numbers, definition
from mechscope.report.theme import CATEGORIES


def interval_plot(table: pd.DataFrame, *, name: str, title: str, caption: str, axis: str) -> Figure:
    """Draw one point with its interval per row, in the table's order; zero is ruled.

    Args:
        table: One row per point: `row` (what it is), `value`, `low`, `high`, `n`.
        name: The figure's name.
        title: Its title.
        caption: How to read it.
        axis: Title of the horizontal axis, with the unit.
    """
    numbers, order = Numbers(), list(dict.fromkeys(table["row"]))
    base = alt.Chart(numbers.add(table, ["row", "value", "low", "high", "n"])).encode(
        y=alt.Y("row:N", sort=order, title=None, axis=alt.Axis(grid=True, labelLimit=260)),
        tooltip=[alt.Tooltip("row:N", title="what"), *_told(axis)],
        color=alt.value(CATEGORIES[0]),
    )
    across = alt.Scale(zero=False, nice=True)
    ends = base.mark_rule(strokeWidth=2.2, strokeCap="round").encode(x=alt.X("low:Q", title=axis, scale=across), x2="high:Q")
    chart = alt.layer(
        _zero(numbers).encode(x=alt.X("level:Q")),
        *([ends] if table["low"].notna().any() else []),
        base.mark_point(filled=True, size=70, opacity=1).encode(x=alt.X("value:Q", title=axis, scale=across)),
    ).properties(height=32 * len(order))
    return Figure(name=name, title=title, caption=caption, spec=definition(chart, numbers, description=title), width=520)


def response_curves(table: pd.DataFrame, *, name: str, title: str, caption: str, x: tuple[str, str], axis: str) -> Figure:
    """Draw series over a number, such as a strength: a line with points, its interval as a band; controls are dashed, without one.

    Args:
        table: One row per point: `series`, `line` (which of several lines of a series), the column of `x`, `value`, `low`, `high`, `n`, and `control`
            (whether it is one).
        name: The figure's name.
        title: Its title.
        caption: How to read it.
        x: Column of the horizontal axis, and its title.
        axis: Title of the vertical axis, with the unit.
    """
    column, words = x
    numbers, names = Numbers(), list(dict.fromkeys(table["series"]))
    colour, shape = series_scales(names)
    legend = alt.Legend(title=None, symbolLimit=0)
    rows = numbers.add(table, ["series", "line", column, "value", "low", "high", "n", "control"])
    base = alt.Chart(rows).encode(
        x=alt.X(f"{column}:Q", title=words, scale=alt.Scale(nice=False, padding=10), axis=alt.Axis(grid=False, tickCount=7)),
        color=alt.Color("series:N", scale=colour, legend=legend),
        detail="line:N",
    )
    value = alt.Y("value:Q", title=axis, scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=6, grid=True))
    dash = alt.StrokeDash("control:N", scale=alt.Scale(domain=[False, True], range=[[1, 0], [5, 4]]), legend=None)
    told = [alt.Tooltip("series:N"), alt.Tooltip(f"{column}:Q", title=words, format=".4~g"), *_told(axis)]
    band = base.transform_filter("!datum.control").mark_area(fillOpacity=0.16).encode(y=alt.Y("low:Q", title=axis), y2="high:Q")
    chart = alt.layer(
        _zero(numbers).encode(y=alt.Y("level:Q")),
        *([band] if table.loc[~table["control"].astype(bool), "low"].notna().any() else []),
        base.mark_line(strokeWidth=2).encode(y=value, strokeDash=dash),
        base.mark_point(filled=True, size=40, opacity=1).encode(
            y=value, shape=alt.Shape("series:N", scale=shape, legend=legend), tooltip=told
        ),
    ).properties(height=230)
    return Figure(name=name, title=title, caption=caption, spec=definition(chart, numbers, description=title))


def _zero(numbers: Numbers) -> Any:
    return alt.Chart(numbers.add(pd.DataFrame({"level": [0]}), ["level"])).mark_rule(style="zero")


def _told(axis: str) -> list[Any]:
    ends = (("value", axis), ("low", "95\u202f% from"), ("high", "to"))
    return [*(alt.Tooltip(f"{column}:Q", title=words, format=".4~g") for column, words in ends), alt.Tooltip("n:Q", title="texts")]
