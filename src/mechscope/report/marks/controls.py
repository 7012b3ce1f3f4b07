"""A fine-tuned model beside its controls: per layer as marks among ticks, per head as points off the diagonal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import pandas as pd

from mechscope.report.marks.curves import series_scales
from mechscope.report.marks.figure import Figure, Numbers, definition
from mechscope.report.marks.heatmaps import counted, rows_parameter

KIND_NAMES = {
    "tuned": "tuned",
    "seed": "other seeds",
    "shuffled": "shuffled summaries",
    "other": "other trainings",
    "noise": "noise of the same size",
}
"""Kinds of controls in the order in which they are shown, and what a reader calls them."""

_SHOWN_ROWS = "datum.rows === query_rows"


def layer_ticks(
    layers: pd.DataFrame, column: str, *, name: str, title: str, axis: str, caption: str, share: bool = False, zero: bool = False
) -> Figure:
    """Draw one number per layer: the tuned model as a mark, every control as a tick.

    Args:
        layers: The table `control_layers`.
        column: What is drawn.
        name: The figure's name.
        title: Its title.
        axis: Title of the vertical axis, with the unit.
        caption: How to read it.
        share: Whether the numbers are fractions to be written as percentages.
        zero: Whether a rule marks zero.
    """
    table = layers.assign(series=layers["kind"].map(KIND_NAMES), value=layers[column].astype(float))
    table = table[table["value"].notna()]
    colour = _colour(table)
    numbers = Numbers()
    rows = numbers.add(table, ["rows", "layer", "control", "series", "kind", "value", "n"])
    number = ".1%" if share else ".4~g"
    down = alt.Y(
        "value:Q",
        title=axis,
        scale=alt.Scale(zero=False, nice=True),
        axis=alt.Axis(**({"format": "%"} if share else {}), tickCount=5, grid=True),
    )
    base = alt.Chart(rows).encode(
        x=alt.X("layer:O", title="layer", axis=counted(int(layers["layer"].max()) + 1)),
        y=down,
        color=colour,
        tooltip=[
            alt.Tooltip("layer:O", title="layer"),
            alt.Tooltip("control:N", title="model"),
            alt.Tooltip("series:N", title="which is"),
            alt.Tooltip("value:Q", title=axis, format=number),
            alt.Tooltip("n:Q", title="documents"),
        ],
    )
    marks: list[Any] = []
    if zero:
        marks.append(
            alt.Chart(numbers.add(pd.DataFrame({"zero": [0]}), ["zero"])).mark_rule(style="zero").encode(y=alt.Y("zero:Q", title=axis))
        )
    ticks = base.transform_filter(_SHOWN_ROWS).transform_filter("datum.kind !== 'tuned'").mark_tick(thickness=2, width={"band": 0.6})
    tuned = base.transform_filter(_SHOWN_ROWS).transform_filter("datum.kind === 'tuned'").mark_point(filled=True, size=70, opacity=1)
    chart = alt.layer(*marks, ticks, tuned).properties(height=220).add_params(rows_parameter(layers))
    words = f"{caption} The tuned model is a point, every control a tick."
    return Figure(name=name, title=title, caption=words, spec=definition(chart, numbers, description=title))


def head_scatter(heads: pd.DataFrame, column: str, *, name: str, title: str, axis: str, caption: str) -> Figure:
    """Draw every head of the tuned model against the mean over each kind of controls; on the diagonal the controls do the same.

    Args:
        heads: The table `control_heads`.
        column: What is drawn.
        name: The figure's name.
        title: Its title.
        axis: What the number is, with the unit.
        caption: How to read it.
    """
    places = ["rows", "layer", "head", "component"]
    values = heads[heads[column].notna()]
    tuned = values[values["kind"] == "tuned"].set_index(places)[column].rename("tuned")
    means = values[values["kind"] != "tuned"].groupby([*places, "kind"], sort=False)[column].agg(["mean", "count"]).reset_index()
    table = means.join(tuned, on=places)
    table = table.assign(series=table["kind"].map(KIND_NAMES))
    ends = pd.concat([table["mean"], table["tuned"]]).agg(["min", "max"])
    numbers = Numbers()
    points = numbers.add(table, [*places, "series", "mean", "count", "tuned"])
    diagonal = numbers.add(pd.DataFrame({"at": ends.to_list()}), ["at"])
    colour, shape = series_scales(_present(table))
    scale = alt.Scale(zero=False, nice=True)
    dots = (
        alt.Chart(points)
        .transform_filter(_SHOWN_ROWS)
        .mark_point(filled=True, size=34, opacity=0.8)
        .encode(
            x=alt.X("mean:Q", title=f"controls, mean: {axis}", scale=scale, axis=alt.Axis(tickCount=5, grid=True)),
            y=alt.Y("tuned:Q", title=f"tuned: {axis}", scale=scale, axis=alt.Axis(tickCount=5, grid=True)),
            color=alt.Color("series:N", scale=colour, legend=alt.Legend(title=None)),
            shape=alt.Shape("series:N", scale=shape, legend=alt.Legend(title=None)),
            tooltip=[
                alt.Tooltip("component:N", title="head"),
                alt.Tooltip("series:N", title="controls"),
                alt.Tooltip("count:Q", title="how many"),
                alt.Tooltip("mean:Q", title="their mean", format=".4~g"),
                alt.Tooltip("tuned:Q", title="tuned", format=".4~g"),
            ],
        )
    )
    line = alt.Chart(diagonal).mark_line(style="zero").encode(x=alt.X("at:Q"), y=alt.Y("at:Q"))
    chart = alt.layer(line, dots).properties(height=260).add_params(rows_parameter(heads))
    return Figure(name=name, title=title, caption=caption, spec=definition(chart, numbers, description=title))


def _present(table: pd.DataFrame) -> list[str]:
    there = set(table["series"])
    return [words for words in KIND_NAMES.values() if words in there]


def _colour(table: pd.DataFrame) -> Any:
    # the order of kinds gives each the same colour in every figure
    scale, _ = series_scales(_present(table))
    return alt.Color("series:N", scale=scale, legend=alt.Legend(title=None))


def ranges(values: Mapping[str, list[float]], say: Any) -> str:
    """Write numbers by kind in words: `2 of shuffled summaries 50 % to 54 %; 5 of noise of the same size 21 % to 54 %`."""
    parts = []
    for kind, words in KIND_NAMES.items():
        if kind != "tuned" and values.get(kind):
            low, high = min(values[kind]), max(values[kind])
            parts.append(f"{words} {say(low) if low == high else f'{say(low)} to {say(high)}'} ({len(values[kind])})")
    return "; ".join(parts)
