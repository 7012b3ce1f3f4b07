"""Predicted beside measured: a point for each of both, with the line on which they are equal."""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd

from mechscope.report.marks.curves import series_scales
from mechscope.report.marks.figure import Figure, Numbers, definition


def agreement_chart(table: pd.DataFrame, *, name: str, title: str, caption: str, unit: str) -> Figure:
    """Draw what was predicted across and what was measured upwards.

    Args:
        table: `predicted`, `measured`, `series` (told apart by colour and shape), `label` (what a point is called).
        name: Name of the figure.
        title: What is shown.
        caption: How to read it.
        unit: Of both.
    """
    numbers, names = Numbers(), list(dict.fromkeys(table["series"]))
    colour, shape = series_scales(names)
    both = np.concatenate([table["predicted"], table["measured"]]).astype(float)
    ends = [float(both.min()), float(both.max())]
    line = alt.Chart(numbers.add(pd.DataFrame({"at": ends}), ["at"])).mark_line(style="zero").encode(x=alt.X("at:Q"), y=alt.Y("at:Q"))
    points = (
        alt.Chart(numbers.add(table, ["predicted", "measured", "series", "label"]))
        .mark_point(filled=True, size=55, opacity=0.85)
        .encode(
            x=alt.X("predicted:Q", title=f"predicted change ({unit})", axis=alt.Axis(format="+", tickCount=5)),
            y=alt.Y("measured:Q", title=f"measured change ({unit})", axis=alt.Axis(format="+", tickCount=5)),
            color=alt.Color("series:N", scale=colour, legend=alt.Legend(title=None)),
            shape=alt.Shape("series:N", scale=shape, legend=alt.Legend(title=None)),
            tooltip=[
                alt.Tooltip("label:N", title="changed"),
                alt.Tooltip("predicted:Q", format="+.4f"),
                alt.Tooltip("measured:Q", format="+.4f"),
            ],
        )
    )
    chart = alt.layer(line, points).properties(height=260)
    return Figure(name, title, caption, definition(chart, numbers, description=title), max_width=640)
