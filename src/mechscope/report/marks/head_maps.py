"""Small maps of all heads, one beside the other: layers down, heads across, a map per role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from mechscope.report.marks.figure import Figure, Numbers, definition
from mechscope.report.theme import name_of

_MAP, _ROW = 200, 980  # pixels: a map, and a row of maps


def head_maps(
    heads: pd.DataFrame,
    value: str,
    *,
    name: str,
    title: str,
    caption: str,
    scale: Any,
    legend: Any,
    tooltip: Mapping[str, str],
    mark: str,
    dot: bool,
) -> Figure:
    """Draw one number per head and role, a map per role in the order of the rows.

    Args:
        heads: One row per role and head: `role`, `component`, `layer`, `head`.
        value: Column that is drawn.
        name: The figure's name.
        title: Its title.
        caption: How to read it.
        scale: The colours' scale.
        legend: Its legend.
        tooltip: Columns told about the head under the pointer, and their names.
        mark: Column of booleans: which heads are marked.
        dot: Whether a mark is a dot; else it is an outline.
    """
    n_layers, n_heads = int(heads["layer"].max()) + 1, int(heads["head"].max()) + 1
    across, down = (int(np.clip(_MAP // count, 5, 17)) for count in (n_heads, n_layers))
    heads = heads.assign(role=[name_of(role) for role in heads["role"]])
    order = list(dict.fromkeys(heads["role"]))
    # one row per map carries its heading
    heads = heads.assign(heading=np.where(heads.duplicated("role"), "", heads["role"]))
    numbers = Numbers()
    told = [alt.Tooltip("role:N"), alt.Tooltip("component:N", title="component")]
    told += [alt.Tooltip(f"{column}:Q", title=words, format="" if column == "n" else ".4~g") for column, words in tooltip.items()]
    base = alt.Chart().encode(x=alt.X("head:O", title=None, axis=_axis(n_heads)), y=alt.Y("layer:O", title=None, axis=_axis(n_layers)))
    cells = base.mark_rect(cornerRadius=1).encode(color=alt.Color(f"{value}:Q", scale=scale, legend=legend), tooltip=told)
    size = float(np.clip(0.05 * min(across, down) ** 2, 4, 20))
    marked = (
        base.mark_point(filled=True, size=size, fill="#ffffff", stroke="#20262d", strokeWidth=0.7, opacity=1)
        if dot
        else base.mark_rect(style="outline", fillOpacity=0, strokeWidth=1)
    )
    headings = alt.Chart().mark_text(align="left", baseline="bottom", fontWeight=600, fontSize=11.5, limit=_MAP + 20)
    headings = headings.encode(x=alt.value(0), y=alt.value(-5), text="heading:N").transform_filter("datum.heading !== ''")
    layered = alt.layer(cells, marked.transform_filter(f"datum.{mark}"), headings).properties(
        width=across * n_heads, height=down * n_layers
    )
    # a heading is wider than a map of few heads
    columns = max(1, min(len(order), _ROW // (max(120, across * n_heads) + 34)))
    kept = list(dict.fromkeys(["role", "heading", "component", "layer", "head", value, mark, *tooltip]))
    # the header's own labels know no colour scheme: the marks above have the page's
    facet = alt.Facet("role:N", sort=order, title=None, header=alt.Header(labelExpr="''", labelFontSize=1, labelPadding=6))
    chart = layered.facet(data=numbers.add(heads, kept), facet=facet, columns=columns, spacing={"row": 30, "column": 26})
    spec = definition(chart, numbers, description=f"{title}: {len(order)} maps of {n_layers} layers by {n_heads} heads")
    return Figure(name=name, title=title, caption=caption, spec=spec, width=_ROW, wide=True)


def _axis(count: int) -> Any:
    every = next(step for step in (2, 4, 8, 16, count) if count <= 8 * step)
    return alt.Axis(labelAngle=0, grid=False, values=list(range(0, count, every)))
