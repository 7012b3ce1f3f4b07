"""A fine-tuned model beside its controls: what kinds there are and their colours, and curves with the controls' range as a band."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from mechscope.report.marks.curves import ground, vertical
from mechscope.report.marks.figure import Figure, Numbers, definition
from mechscope.report.marks.heatmaps import counted, rows_parameter
from mechscope.report.marks.multiples import GAP, small_multiples

KIND_NAMES = {
    "tuned": "tuned",
    "seed": "other seeds",
    "shuffled": "shuffled summaries",
    "other": "other trainings",
    "noise": "noise of the same size",
}
"""Kinds of controls in the order in which they are shown, and what a reader calls them."""

KIND_SHORT = {"tuned": "tuned", "seed": "other seeds", "shuffled": "shuffled", "other": "other", "noise": "noise"}
"""The same in a cell of a table or over a small map."""
KIND_COLOURS = {"tuned": "#0072B2", "other seeds": "#56B4E9", "shuffled summaries": "#D55E00", "other trainings": "#CC79A7"}
KIND_COLOURS["noise of the same size"] = "#8C8C8C"
"""Colours of these, equal in every figure; noise, from which all is to be told, is grey."""

TUNED = KIND_NAMES["tuned"]
# pixels: a panel of several
_PANEL = 196


def beside_curves(
    table: pd.DataFrame,
    *,
    name: str,
    title: str,
    axis: str,
    caption: str,
    selected: Sequence[int] = (),
    zero: bool = False,
    share: bool = False,
) -> Figure:
    """Draw curves over layers, the tuned model's beside those of each kind of control: a line with its band.

    Args:
        table: One row per panel, series and layer: `panel` (empty for a single one), `series`, `layer`, `rows`, `value`, `low`, `high` (the ends of
            the band), `n` (documents), `count` (of how many models it is the mean).
        name: The figure's name.
        title: Its title.
        axis: Title of the vertical axis, with the unit.
        caption: How to read it.
        selected: Layers whose ground is shaded.
        zero: Whether a rule marks zero.
        share: Whether the numbers are fractions to be written as percentages.
    """
    table = table[table["value"].notna()]
    # a band without ends is one of no height: Vega has no extent of nothing
    table = table.assign(bottom=table["low"].fillna(table["value"]), top=table["high"].fillna(table["value"]))
    names, panels = list(dict.fromkeys(table["series"])), list(dict.fromkeys(table["panel"]))
    style = ".1%" if share else ".4~g"
    down = vertical(table["value"], axis, share=share)
    layer = alt.X("layer:O", title="layer", axis=counted(int(table["layer"].max()) + 1))
    colour, shape, dash = _series(names)
    legend = alt.Legend(title=None, symbolLimit=0)
    numbers = Numbers()
    keep = ["panel", "series", "layer", "rows", "value", "low", "high", "bottom", "top", "n", "count"]
    told = [
        alt.Tooltip("layer:O", title="layer"),
        alt.Tooltip("series:N", title="model"),
        alt.Tooltip("value:Q", title=axis, format=style),
        alt.Tooltip("low:Q", title="band from", format=style),
        alt.Tooltip("high:Q", title="to", format=style),
        alt.Tooltip("count:Q", title="models"),
        alt.Tooltip("n:Q", title="documents"),
    ]
    base = alt.Chart().encode(x=layer, color=alt.Color("series:N", scale=colour, legend=legend))
    under = ground(numbers, selected, axis if zero else None)
    curves = [
        base.mark_area(fillOpacity=0.2).encode(y=alt.Y("bottom:Q", title=axis), y2="top:Q"),
        base.mark_line(strokeWidth=2).encode(y=down, strokeDash=alt.StrokeDash("series:N", scale=dash, legend=legend)),
        base.mark_point(filled=True, size=34, opacity=1).encode(
            y=down, shape=alt.Shape("series:N", scale=shape, legend=legend), tooltip=told
        ),
    ]
    words = caption + (" Shaded: the selected layers." if selected else "")
    if len(panels) == 1:
        rows = numbers.add(table, keep)
        own = [curve.properties(data=rows).transform_filter("datum.rows === query_rows") for curve in curves]
        chart = alt.layer(*under, *own).properties(height=220).add_params(rows_parameter(table))
        return Figure(name=name, title=title, caption=words, spec=definition(chart, numbers, description=title))
    return small_multiples(
        [*under, *curves],
        table,
        numbers,
        panel="panel",
        keep=keep,
        size=(_PANEL, 200),
        each=_PANEL + GAP,
        columns=len(panels),
        beside=40,
        name=name,
        title=title,
        caption=words,
    )


def curve_of(layers: pd.DataFrame, column: str, series: str, *, panel: str = "") -> pd.DataFrame:
    """Return a model's column as rows of `beside_curves`; its band is its interval over documents."""
    none = pd.Series(np.nan, index=layers.index)
    return layers[["rows", "layer", "n"]].assign(
        panel=panel,
        series=series,
        value=layers[column],
        low=layers.get(f"{column}_low", none),
        high=layers.get(f"{column}_high", none),
        count=1,
    )


def curves_of_controls(spread: pd.DataFrame, *, panel: str = "") -> pd.DataFrame:
    """Return the controls of a column as rows of `beside_curves`: per kind their mean, and their range as the band."""
    return spread[["rows", "layer", "n", "value", "low", "high", "count"]].assign(panel=panel, series=spread["model"].map(KIND_NAMES))


def _series(names: Sequence[str]) -> tuple[Any, Any, Any]:
    """Return the colours, shapes and dashes of series: those of the tuned model are solid, those of controls dashed."""
    spare = ("#009E73", "#E69F00", "#B8A100")
    unknown = [each for each in names if each not in KIND_COLOURS]
    colours = [KIND_COLOURS[each] if each in KIND_COLOURS else spare[unknown.index(each) % len(spare)] for each in names]
    shapes = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left"]
    controls = set(KIND_NAMES.values()) - {TUNED}
    return (
        alt.Scale(domain=list(names), range=colours),
        alt.Scale(domain=list(names), range=[shapes[at % len(shapes)] for at in range(len(names))]),
        alt.Scale(domain=list(names), range=[[5, 3] if each in controls else [1, 0] for each in names]),
    )
