"""A graph of nodes in rows: places from the first at the bottom to the last on top, at each its nodes by size, and lines for the edges between them."""

from __future__ import annotations

import json

import altair as alt
import pandas as pd

from mechscope.report.marks.circuit_picture import HARMS, HOLDS
from mechscope.report.marks.figure import Figure, Numbers, definition

_WAYS = ("lowers", "raises")
# pixels of a row, and of a node's area
_ROW, _SMALLEST, _LARGEST = 64, 40, 420


def node_graph(nodes: pd.DataFrame, edges: pd.DataFrame, *, rows: list[str], name: str, title: str, caption: str, axis: str) -> Figure:
    """Draw nodes and edges; a node's area and an edge's width grow with the size of their effects, their colours are the signs.

    Args:
        nodes: One row per node: `node`, `row`, `effect`.
        edges: One row per edge: `sender`, `receiver`, `effect`; ends that are no nodes are not drawn.
        rows: The rows from the bottom up.
        name: The figure's name.
        title: Its title.
        caption: How to read it.
        axis: What an effect is, with its unit.
    """
    placed = nodes.assign(size=nodes["effect"].abs(), way=[_WAYS[effect > 0] for effect in nodes["effect"]])
    placed = placed.sort_values(["row", "size"], ascending=[True, False], kind="stable")
    at, parts = {row: number for number, row in enumerate(rows)}, []
    for row, own in placed.groupby("row", sort=False):
        # the largest in the middle, the others to its left and right in turn
        side = [(number + 1) // 2 * (1 if number % 2 else -1) for number in range(len(own))]
        parts.append(own.assign(x=[float(step) for step in side], y=float(at[str(row)])))
    placed = pd.concat(parts, ignore_index=True)
    where = placed.set_index("node")[["x", "y"]]
    drawn = edges[edges["sender"].isin(where.index) & edges["receiver"].isin(where.index)]
    ends = {
        f"{axis_of}{end}": where.loc[drawn[column], axis_of].to_numpy()
        for column, end in (("sender", "1"), ("receiver", "2"))
        for axis_of in "xy"
    }
    lines = drawn.assign(**ends, size=drawn["effect"].abs(), way=[_WAYS[effect > 0] for effect in drawn["effect"]])
    numbers = Numbers()
    colour = alt.Color("way:N", scale=alt.Scale(domain=list(_WAYS), range=[HOLDS, HARMS]), legend=alt.Legend(title=None))
    heights = alt.Scale(domain=[-0.5, len(rows) - 0.5], nice=False, zero=False)
    labels = alt.Axis(
        values=list(range(len(rows))), labelExpr=f"{json.dumps(rows)}[datum.value]", grid=True, title=None, domain=False, ticks=False
    )
    across = alt.Scale(domain=[float(placed["x"].min()) - 0.7, float(placed["x"].max()) + 0.7], nice=False, zero=False)
    marks = []
    if len(lines):
        base = alt.Chart(numbers.add(lines, ["sender", "receiver", "effect", "size", "way", "x1", "x2", "y1", "y2"]))
        told = [alt.Tooltip("sender:N"), alt.Tooltip("receiver:N"), alt.Tooltip("effect:Q", title=axis, format="+.4~g")]
        marks.append(
            base.mark_rule(opacity=0.45, strokeCap="round").encode(
                x=alt.X("x1:Q", scale=across, axis=None),
                x2="x2:Q",
                y=alt.Y("y1:Q", scale=heights, axis=labels),
                y2="y2:Q",
                color=colour,
                strokeWidth=alt.StrokeWidth("size:Q", scale=alt.Scale(range=[0.4, 6], zero=True), legend=None),
                tooltip=told,
            )
        )
    points = alt.Chart(numbers.add(placed, ["node", "effect", "size", "way", "x", "y"])).encode(
        x=alt.X("x:Q", scale=across, axis=None), y=alt.Y("y:Q", scale=heights, axis=labels)
    )
    size = alt.Size("size:Q", scale=alt.Scale(range=[_SMALLEST, _LARGEST], zero=True), legend=None)
    told = [alt.Tooltip("node:N"), alt.Tooltip("effect:Q", title=axis, format="+.4~g")]
    marks.append(points.mark_point(filled=True, opacity=1).encode(size=size, color=colour, tooltip=told))
    marks.append(points.mark_text(dy=-14, fontSize=10).encode(text="node:N", tooltip=told))
    chart = alt.layer(*marks).properties(height=_ROW * len(rows))
    spec = definition(chart, numbers, description=title)
    return Figure(name=name, title=title, caption=caption, spec=spec, width=900, wide=True)
