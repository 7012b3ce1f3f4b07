"""Curves over the steps of a training: small multiples with their intervals, steps on a logarithmic axis that has a place for step 0."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mechscope.report.marks.figure import Figure, Numbers
from mechscope.report.marks.multiples import small_multiples

_LABELS = 5


def step_axis(steps: pd.Series) -> alt.X:
    """Return the axis of steps: linear up to the first step behind 0, logarithmic beyond it."""
    known = sorted(set(steps))
    first = next((step for step in known if step > 0), 1)
    labelled = known if len(known) <= _LABELS else [known[round(i * (len(known) - 1) / (_LABELS - 1))] for i in range(_LABELS)]
    return alt.X(
        "step:Q",
        title="step",
        scale=alt.Scale(type="symlog", constant=int(first), nice=False, padding=8),
        axis=alt.Axis(values=labelled, format="~s", grid=False, labelOverlap=True),
    )


def courses(points: pd.DataFrame, *, name: str, title: str, caption: str) -> Figure:
    """Draw a panel per curve.

    Args:
        points: One row per step and curve: `panel` (its name), `step`, `value`, `low`, `high`, `unit`, `at` (the step of its change point, else none).
        name: The figure's name.
        title: Its title.
        caption: How to read it.
    """
    base = alt.Chart().encode(x=step_axis(points["step"]))
    ticks = alt.Axis(tickCount=4, grid=True, format="~g", labelLimit=48)
    down = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=ticks)
    told = [alt.Tooltip("panel:N", title="of"), alt.Tooltip("step:Q", format=",")]
    told += [
        alt.Tooltip(f"{end}:Q", title=said, format=".4~g") for end, said in (("value", "value"), ("low", "95\u202f% from"), ("high", "to"))
    ]
    marks = []
    if points["at"].notna().any():
        marks.append(base.mark_rule(style="zero", color="#8C8C8C", strokeDash=[3, 3]).encode(x=alt.X("at:Q", title="step")))
    if points["low"].notna().any():
        marks.append(base.mark_area(fillOpacity=0.15).encode(y=alt.Y("low:Q", title=None, scale=alt.Scale(zero=False)), y2="high:Q"))
    marks.append(base.mark_line(strokeWidth=1.8).encode(y=down))
    marks.append(base.mark_point(filled=True, size=24, opacity=1).encode(y=down, tooltip=[*told, alt.Tooltip("unit:N")]))
    return small_multiples(
        marks, points, Numbers(), panel="panel", keep=["step", "value", "low", "high", "unit", "at"], size=(190, 110), each=250, columns=3,
        beside=30, name=name, title=title, caption=caption, own_scales=True,
    )  # fmt: skip
