"""Heatmaps: a number per layer and head, per layer and matrix, or per layer and rule, as coloured cells.

Magnitudes run on a square-root colour scale, because attention KL spans two orders of magnitude and a linear scale shows one head and eleven
blank layers. Changes run on a diverging scale centred at zero; it ends at the 98th percentile where a few cells would wash out all others, and
the caption says so. What was selected wears an outline, what is significant wears a dot: neither is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import altair as alt
import numpy as np
import pandas as pd

from mechscope.report.marks.figure import Figure, Numbers, definition
from mechscope.report.theme import label, name_of

Scale = Literal["magnitude", "change", "share"]
"""From zero on by square root; from blue through zero to orange; from 0 to 100 %."""

Q_SIGNIFICANT = 0.05
"""False-discovery rate under which a head's entropy change is marked."""


_SHARE = alt.Scale(domain=[0, 1], clamp=True, interpolate="rgb")


def rows_parameter(table: pd.DataFrame) -> Any:
    """Return the chart parameter that the page's "query rows" switch turns; files show all tokens where there are any."""
    kinds = list(dict.fromkeys(table["rows"]))
    return alt.param(name="query_rows", value="all" if "all" in kinds else str(kinds[0]))


def counted(count: int) -> Any:
    """Return the axis of `count` layers or heads, with labels at even distances that leave room for one another."""
    every = next(step for step in (1, 2, 4, 8, 16, 32, count) if count <= 20 * step)
    return alt.Axis(labelAngle=0, grid=False, values=list(range(0, count, every)))


def _cell(count: int, available: int, *, smallest: int, largest: int) -> int:
    """Return the size of a cell, in pixels, with which `count` of them fill what is available."""
    return int(np.clip(available // max(1, count), smallest, largest))


def diverging(changes: pd.Series) -> tuple[Any, str]:
    """Return the symmetric colour scale of `changes` and the words for its end."""
    magnitudes = changes.abs().dropna()
    largest = float(magnitudes.max()) if len(magnitudes) else 0.0
    end = float(np.quantile(magnitudes, 0.98)) if len(magnitudes) else 0.0
    if largest <= 1.5 * end:
        end = largest
    # a model compared with itself changes nowhere: any width will do, as long as it is one
    end = float(f"{end:.3g}") or 1e-6
    words = f" Colours end at ±{end:g}; the largest change is {largest:.3g}." if largest > end * 1.01 else ""
    return alt.Scale(domain=[-end, end], domainMid=0, clamp=True, interpolate="rgb"), words


def _magnitude(numbers: pd.Series) -> Any:
    largest = float(numbers.max()) if numbers.notna().any() else 0.0
    return alt.Scale(type="sqrt", domain=[0, largest if largest > 0 else 1e-6], clamp=True, interpolate="rgb")


def colour_scale(numbers: pd.Series, scale: Scale) -> tuple[Any, str]:
    """Return the colour scale of numbers and, where it does not reach their largest, the words that say so."""
    if scale == "change":
        return diverging(numbers)
    return (_SHARE if scale == "share" else _magnitude(numbers)), ""


def gradient(title: str, *, share: bool = False) -> Any:
    """Return the legend of a colour scale, above the map; `share` counts it in per cent."""
    words = {"format": ".0%"} if share else {}
    return alt.Legend(
        title=title, orient="top", direction="horizontal", gradientLength=230, gradientThickness=10, titleLimit=330, tickCount=5, **words
    )


def head_heatmap(
    heads: pd.DataFrame,
    value: str,
    *,
    name: str,
    title: str,
    legend: str,
    caption: str,
    scale: Scale = "magnitude",
    selected: Collection[tuple[int, int]] = (),
    tooltip: Mapping[str, str],
    significance: str | None = None,
    verdict: str | None = None,
) -> Figure:
    """Draw one number per layer (down) and head (across).

    Args:
        heads: One row per head, and per kind of query rows where it has a column `rows`.
        value: Column that is drawn.
        name: The figure's name.
        title: Its title.
        legend: Title of the colour scale, with the unit.
        caption: How to read it; what is outlined and dotted is added.
        scale: How numbers become colours.
        selected: (layer, head) of the heads to outline.
        tooltip: Columns told about the head under the pointer, and their names. Heatmaps with equal columns share their numbers in the page.
        significance: Column of q values; cells under `Q_SIGNIFICANT` get a dot.
        verdict: Column of verdicts by size; cells that changed get a dot.
    """
    n_layers, n_heads = int(heads["layer"].max()) + 1, int(heads["head"].max()) + 1
    numbers = Numbers()
    step, across = _cell(n_layers, 560, smallest=11, largest=30), _cell(n_heads, 800, smallest=11, largest=38)
    table = heads.assign(selected=[(layer, head) in selected for layer, head in zip(heads["layer"], heads["head"], strict=True)])
    shown = list(dict.fromkeys(["component", "layer", "head", "selected", value, *tooltip]))
    if verdict is not None:
        table["changed"] = table[verdict] == "changed"
        shown.append("changed")
    shown += [column for column in ("rows", significance or value) if column in table and column not in shown]
    colours, clipped = colour_scale(table[value], scale)
    told = [alt.Tooltip("component:N", title="component")]
    told += [alt.Tooltip(f"{column}:Q", title=words, format="" if column == "n" else ".4~g") for column, words in tooltip.items()]
    base = alt.Chart().encode(
        x=alt.X("head:O", title="head", axis=counted(n_heads)), y=alt.Y("layer:O", title="layer", axis=counted(n_layers)), tooltip=told
    )
    layers = [
        base.mark_rect(cornerRadius=1).encode(color=alt.Color(f"{value}:Q", scale=colours, legend=gradient(legend, share=scale == "share")))
    ]
    words = caption + clipped
    dotted = f"datum.{significance} !== null && datum.{significance} < {Q_SIGNIFICANT}" if verdict is None else "datum.changed"
    if significance is not None or verdict is not None:
        size = int(np.clip(min(step, across) ** 2 * 0.045, 5, 26))
        dots = base.mark_point(filled=True, size=size, fill="#ffffff", stroke="#20262d", strokeWidth=0.7, opacity=1)
        layers.append(dots.transform_filter(dotted))
        means = (
            f"q < {Q_SIGNIFICANT} (Benjamini–Hochberg over all heads)"
            if verdict is None
            else "a change beyond the smallest effect of interest"
        )
        words += f" A dot marks {means}."
    if selected:
        layers.append(base.mark_rect(style="outline", fillOpacity=0).transform_filter("datum.selected"))
        words += " Outlined: the selected heads."
    chart = alt.layer(*layers, data=numbers.add(table, shown)).properties(height=n_layers * step)
    if "rows" in heads:
        chart = chart.add_params(rows_parameter(heads)).transform_filter("datum.rows === query_rows")
    most = max(360, n_heads * across + 90)
    return Figure(
        name=name,
        title=title,
        caption=words,
        spec=definition(chart, numbers, description=f"{title}: heatmap of {n_layers} layers by {n_heads} heads"),
        width=max(300, n_heads * across),
        max_width=most,
        wide=most > 560,
    )


def position_heatmap(effects: pd.DataFrame, value: str, *, name: str, title: str, legend: str, caption: str) -> Figure:
    """Draw one number per layer (down) and set of positions (across), on a diverging scale.

    Args:
        effects: One row per layer and set of positions (`layer`, `positions`, `component`), with intervals `low` and `high`.
        value: Column that is drawn.
        name: The figure's name.
        title: Its title.
        legend: Title of the colour scale, with the unit.
        caption: How to read it.
    """
    numbers, order = Numbers(), list(dict.fromkeys(effects["positions"]))
    across = _cell(len(order), 800, smallest=11, largest=60)
    colours, clipped = diverging(effects[value])
    tooltip = [alt.Tooltip("component:N"), alt.Tooltip("positions:N")]
    tooltip += [alt.Tooltip(f"{column}:Q", format=".4~g") for column in dict.fromkeys((value, "effect", "low", "high"))]
    layers = int(effects["layer"].max()) + 1
    # some seven pixels a letter
    crowded = len(order) > 6 or 7 * max(len(str(name)) for name in order) > across
    chart = (
        alt.Chart(numbers.add(effects, list(dict.fromkeys(["component", "layer", "positions", value, "effect", "low", "high"]))))
        .mark_rect(cornerRadius=1)
        .encode(
            x=alt.X(
                "positions:N", title="positions", sort=order, axis=alt.Axis(labelAngle=-40 if crowded else 0, labelOverlap=not crowded)
            ),
            y=alt.Y("layer:O", title="layer", axis=counted(layers)),
            color=alt.Color(f"{value}:Q", scale=colours, legend=gradient(legend)),
            tooltip=tooltip,
        )
        .properties(height=layers * _cell(layers, 560, smallest=11, largest=30))
    )
    most = max(360, len(order) * across + 90)
    return Figure(
        name=name, title=title, caption=caption + clipped, spec=definition(chart, numbers, description=title),
        width=max(300, len(order) * across), max_width=most, wide=most > 560,
    )  # fmt: skip


def grid_heatmap(
    cells: pd.DataFrame,
    value: str,
    *,
    across: tuple[str, str],
    down: tuple[str, str],
    name: str,
    title: str,
    legend: str,
    caption: str,
    scale: Scale = "change",
    tooltip: Mapping[str, str],
) -> Figure:
    """Draw one number per cell of a grid with named rows and columns, both in the table's order.

    Args:
        cells: One row per cell.
        value: Column that is drawn.
        across: Column that names the grid's columns, and the axis's title.
        down: Column that names its rows, and the axis's title.
        name: The figure's name.
        title: Its title.
        legend: Title of the colour scale, with the unit.
        caption: How to read it.
        scale: How numbers become colours.
        tooltip: Columns told about the cell under the pointer, and their names; numbers and texts.
    """
    names = {column: list(dict.fromkeys(label(text) for text in cells[column])) for column, _ in (across, down)}
    columns, rows = len(names[across[0]]), len(names[down[0]])
    width = _cell(columns, 800, smallest=14, largest=60)
    colours, clipped = colour_scale(cells[value], scale)
    crowded = 7 * max(len(text) for text in names[across[0]]) > width  # some seven pixels a letter
    told = [alt.Tooltip(f"{column}:N", title=words) for column, words in (down, across)]
    for column, words in tooltip.items():
        numeric = pd.api.types.is_numeric_dtype(cells[column])
        told.append(alt.Tooltip(f"{column}:Q", title=words, format=".4~g") if numeric else alt.Tooltip(f"{column}:N", title=words))
    numbers = Numbers()
    chart = (
        alt.Chart(numbers.add(cells, list(dict.fromkeys([across[0], down[0], value, *tooltip]))))
        .mark_rect(cornerRadius=1)
        .encode(
            x=alt.X(
                f"{across[0]}:N",
                title=across[1],
                sort=names[across[0]],
                axis=alt.Axis(labelAngle=-45 if crowded else 0, labelOverlap=False, labelLimit=110, grid=False),
            ),
            y=alt.Y(f"{down[0]}:N", title=down[1], sort=names[down[0]], axis=alt.Axis(labelLimit=140, grid=False)),
            color=alt.Color(f"{value}:Q", scale=colours, legend=gradient(legend, share=scale == "share")),
            tooltip=told,
        )
        .properties(height=rows * _cell(rows, 560, smallest=13, largest=30))
    )
    most = max(360, columns * width + 150)
    return Figure(
        name=name, title=title, caption=caption + clipped, spec=definition(chart, numbers, description=title),
        width=max(300, columns * width), max_width=most, wide=most > 560,
    )  # fmt: skip


def matrix_heatmap(weights: pd.DataFrame, value: str, *, name: str, title: str, legend: str, caption: str) -> Figure:
    """Draw one number per weight matrix: its kind (down) and its layer (across); matrices outside the layers are left to the table."""
    table = weights[(weights["layer"] >= 0) & weights[value].notna()]
    table = table.assign(matrix=matrix_labels(table))
    order = list(dict.fromkeys(table.sort_values("layer", kind="stable")["matrix"]))
    tooltip = [
        alt.Tooltip("name:N", title="matrix"),
        alt.Tooltip("size:N", title="size"),
        alt.Tooltip(f"{value}:Q", title=legend, format=".4~g"),
    ]
    table = table.assign(size=[f"{rows} × {columns}" for rows, columns in zip(table["rows"], table["columns"], strict=True)])
    numbers = Numbers()
    chart = (
        alt.Chart(numbers.add(table, ["name", "layer", "matrix", "size", value]))
        .mark_rect(cornerRadius=1)
        .encode(
            x=alt.X("layer:O", title="layer", axis=counted(int(table["layer"].max()) + 1)),
            y=alt.Y("matrix:N", title=None, sort=order),
            color=alt.Color(f"{value}:Q", scale=_magnitude(table[value]), legend=gradient(legend)),
            tooltip=tooltip,
        )
        .properties(height=24 * len(order))
    )
    return Figure(name=name, title=title, caption=caption, spec=definition(chart, numbers, description=title), width=480)


def matrix_labels(weights: pd.DataFrame) -> list[str]:
    """Name every matrix by its kind, and by the end of its path where a layer has several of that kind (``mlp · c_fc``)."""
    several = weights.groupby(["layer", "kind"])["name"].transform("nunique") > 1
    ends = [str(name).removesuffix(".weight").rsplit(".", 1)[-1] for name in weights["name"]]
    return [label(f"{kind} · {end}" if many else kind) for kind, end, many in zip(weights["kind"], ends, several, strict=True)]


def rule_heatmap(selection: pd.DataFrame, *, name: str, title: str, caption: str) -> Figure:
    """Draw how often each layer (across) was chosen by each rule (down) when the documents were resampled."""
    table = selection.assign(rule=[name_of(rule) for rule in selection["rule"]])
    tooltip = [
        alt.Tooltip("rule:N", title="rule"),
        alt.Tooltip("layer:O", title="layer"),
        alt.Tooltip("frequency:Q", title="chosen in", format=".1%"),
        alt.Tooltip("score:Q", title="score", format=".4~g"),
        alt.Tooltip("n_resamples:Q", title="resamples"),
    ]
    base = alt.Chart().encode(
        x=alt.X("layer:O", title="layer", axis=counted(int(table["layer"].max()) + 1)),
        y=alt.Y("rule:N", title=None, sort=list(dict.fromkeys(table["rule"])), axis=alt.Axis(labelLimit=170)),
        tooltip=tooltip,
    )
    legend = gradient("chosen in … of resamples", share=True)
    cells = base.mark_rect(cornerRadius=1).encode(color=alt.Color("frequency:Q", scale=_SHARE, legend=legend))
    outline = base.mark_rect(style="outline", fillOpacity=0).transform_filter("datum.chosen")
    numbers = Numbers()
    rows = numbers.add(table, ["rule", "layer", "frequency", "score", "n_resamples", "chosen"])
    chart = alt.layer(cells, outline, data=rows).properties(height=30 * table["rule"].nunique())
    return Figure(
        name=name, title=title, caption=caption, spec=definition(chart, numbers, description=title), width=520, wide=True, max_width=900
    )
