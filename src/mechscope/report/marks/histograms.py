"""Histograms of several series over one number, on a scale on which one and a thousand can both be seen."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from mechscope.report.marks.curves import series_scales
from mechscope.report.marks.figure import Figure, Numbers, definition


def histogram_lines(
    table: pd.DataFrame, *, name: str, title: str, caption: str, x: tuple[str, str], axis: str, ruled: Sequence[float] = (), unit: str = ""
) -> Figure:
    """Draw counts over a number, one line per series, stepped at the bins; controls dashed, thresholds ruled.

    Args:
        table: One row per series and bin, empty bins too: `series`, `control` (whether it is one), the column of `x` (the bin's middle), `count`.
        name: The figure's name.
        title: Its title.
        caption: How to read it.
        x: Column of the horizontal axis, and its title.
        axis: Title of the vertical axis.
        ruled: Numbers at which a vertical line stands.
        unit: What is counted, for the tooltip; the axis by default.
    """
    column, heading = x
    numbers, names = Numbers(), list(dict.fromkeys(table["series"]))
    colour, _ = series_scales(names)
    across = alt.X(
        f"{column}:Q", title=heading, scale=alt.Scale(nice=False, zero=False, padding=6), axis=alt.Axis(grid=False, tickCount=10)
    )
    down = alt.Y("count:Q", title=axis, scale=alt.Scale(type="symlog", constant=1, nice=False), axis=alt.Axis(tickCount=6, grid=True))
    rows = numbers.add(table, ["series", "control", column, "count"])
    legend = alt.Legend(title=None, symbolLimit=0, symbolType="stroke", symbolStrokeWidth=2)
    lines = (
        alt.Chart(rows)
        .mark_line(interpolate="step", strokeWidth=2)
        .encode(
            x=across,
            y=down,
            color=alt.Color("series:N", scale=colour, legend=legend),
            strokeDash=alt.StrokeDash("control:N", scale=alt.Scale(domain=[False, True], range=[[1, 0], [5, 3]]), legend=None),
            tooltip=[
                alt.Tooltip("series:N"),
                alt.Tooltip(f"{column}:Q", title=heading, format=".3~g"),
                alt.Tooltip("count:Q", title=unit or axis, format=","),
            ],
        )
    )
    layers = [lines]
    if len(ruled):
        marked = numbers.add(pd.DataFrame({"level": list(ruled)}), ["level"])
        layers.insert(0, alt.Chart(marked).mark_rule(strokeDash=[2, 3], opacity=0.6).encode(x=alt.X("level:Q", title=heading)))
    chart = alt.layer(*layers).properties(height=250)
    return Figure(name=name, title=title, caption=caption, spec=definition(chart, numbers, description=title))
