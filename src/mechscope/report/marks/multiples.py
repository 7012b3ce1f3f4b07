"""Small multiples: one panel beside the other on the same scales, each under its name, with the page's switch of query rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from mechscope.report.marks.figure import Figure, Numbers, definition
from mechscope.report.marks.heatmaps import rows_parameter

GAP = 26
"""Pixels between two panels."""
# pixels of half a row of the page: beyond, a figure has a whole one
_HALF = 500


def small_multiples(
    layers: Sequence[Any],
    table: pd.DataFrame,
    numbers: Numbers,
    *,
    panel: str,
    keep: Sequence[str],
    size: tuple[int, int],
    each: int,
    columns: int,
    beside: int,
    name: str,
    title: str,
    caption: str,
    own_scales: bool = False,
) -> Figure:
    """Draw the same marks in a panel for every value of a column.

    Args:
        layers: The marks, without data.
        table: The data of all; where it has a column `rows`, the page's switch chooses among them.
        numbers: Where the data go.
        panel: The column, in the order of its values; they head the panels.
        keep: Columns that the marks read.
        size: Width and height of a panel, in pixels.
        each: Width that a panel takes, the gap included.
        columns: Panels in a row.
        beside: Width of what stands beside the panels: the labels of an axis.
        name: The figure's name.
        title: Its title.
        caption: How to read it.
        own_scales: Whether every panel has a vertical scale of its own, as numbers of several units need.
    """
    panels = list(dict.fromkeys(table[panel]))
    # the header's own labels know no colour scheme: marks have the page's
    headings = alt.Chart().mark_text(align="left", baseline="bottom", fontWeight=600, fontSize=11.5, limit=each)
    headings = headings.encode(x=alt.value(0), y=alt.value(-5), text=f"{panel}:N").transform_aggregate(groupby=[panel])
    width, height = size
    layered = alt.layer(*layers, headings).properties(width=width, height=height)
    facet = alt.Facet(f"{panel}:N", sort=panels, title=None, header=alt.Header(labelExpr="''", labelFontSize=1, labelPadding=6))
    switched = [column for column in ("rows",) if column in table]
    data = numbers.add(table, list(dict.fromkeys([panel, *keep, *switched])))
    chart = layered.facet(data=data, facet=facet, columns=columns, spacing={"row": 30, "column": GAP})
    if own_scales:
        chart = chart.resolve_scale(y="independent").resolve_axis(y="independent")
    if switched:
        chart = chart.transform_filter("datum.rows === query_rows")
    spec = definition(chart, numbers, description=f"{title}: {len(panels)} panels, {', '.join(map(str, panels))}")
    if switched:
        # altair would put it into the panels, where neither the filter nor the page finds it
        spec["params"] = [rows_parameter(table).param.to_dict()]
    total = min(columns, len(panels)) * each + beside
    return Figure(name=name, title=title, caption=caption, spec=spec, width=total, max_width=total, wide=total > _HALF)
