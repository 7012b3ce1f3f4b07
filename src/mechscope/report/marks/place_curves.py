"""Curves over the places of the residual stream: the embedding, then layer by layer; up to two things told apart, by colour and by dashes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import pandas as pd

from mechscope.report.marks.curves import series_scales
from mechscope.report.marks.figure import Figure, Numbers, definition


def place_curves(
    points: pd.DataFrame, *, name: str, title: str, axis: str, caption: str, words: Mapping[str, str], share: bool = False
) -> Figure:
    """Draw one curve per series and kind of dash, with its interval as a band where it has one.

    Args:
        points: One row per point, in the order of the axis: `place`, `series`, `dash`, `value`, `low`, `high`, `n`.
        name: The figure's name.
        title: Its title.
        axis: Title of the vertical axis, with the unit.
        caption: How to read it.
        words: What `series` and `dash` tell apart.
        share: Whether the numbers are fractions to be written as percentages.
    """
    names, dashes, numbers = list(dict.fromkeys(points["series"])), list(dict.fromkeys(points["dash"])), Numbers()
    colour, shape = series_scales(names)
    legend = alt.Legend(title=None) if len(names) > 1 else None
    base = alt.Chart(numbers.add(points, list(points.columns))).encode(
        x=alt.X("place:N", title="layer", sort=list(dict.fromkeys(points["place"])), axis=alt.Axis(labelAngle=0, grid=False)),
        color=alt.Color("series:N", scale=colour, legend=legend),
        detail="dash:N",
    )
    ticks = alt.Axis(tickCount=5, grid=True, **({"format": "%"} if share else {}))
    down = alt.Y("value:Q", title=axis, scale=alt.Scale(zero=False), axis=ticks)
    patterns = alt.StrokeDash(
        "dash:N",
        scale=alt.Scale(domain=dashes, range=[[1, 0], [5, 3], [2, 2], [8, 3]][: len(dashes)]),
        legend=alt.Legend(title=None, symbolType="stroke", symbolStrokeWidth=2) if len(dashes) > 1 else None,
    )
    style = ".1%" if share else ".4~g"
    told = [alt.Tooltip("place:N", title="layer"), alt.Tooltip("series:N", title=words["series"])]
    told += [alt.Tooltip("dash:N", title=words["dash"])] if len(dashes) > 1 else []
    told += [
        alt.Tooltip(f"{end}:Q", title=said, format=style) for end, said in (("value", axis), ("low", "95\u202f% from"), ("high", "to"))
    ]
    marks: list[Any] = [base.mark_line(strokeWidth=2).encode(y=down, strokeDash=patterns)]
    if points["low"].notna().any():
        marks.insert(0, base.mark_area(fillOpacity=0.15).encode(y=alt.Y("low:Q", title=axis), y2="high:Q"))
    shapes, dots = alt.Shape("series:N", scale=shape, legend=legend), base.mark_point(filled=True, size=34, opacity=1)
    marks.append(dots.encode(y=down, shape=shapes, tooltip=[*told, alt.Tooltip("n:Q", title="texts")]))
    chart = alt.layer(*marks).properties(height=220)
    return Figure(name=name, title=title, caption=caption, spec=definition(chart, numbers, description=title))
