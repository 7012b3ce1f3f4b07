"""A fine-tuned model beside its controls as maps: of heads, matrices or rules, side by side on one colour scale."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from mechscope.report.marks.controls import KIND_SHORT, TUNED
from mechscope.report.marks.figure import Figure, Numbers
from mechscope.report.marks.heatmaps import Scale, colour_scale, counted, gradient, matrix_labels
from mechscope.report.marks.multiples import GAP, small_multiples
from mechscope.report.theme import name_of

RESAMPLES = f"{TUNED}, resamples"
_CHOSEN = "chosen in … of resamples, of controls"

# pixels: a map, the least that its heading needs, and a row of them
_MAP, _LEAST, _ROW = 196, 118, 980


def beside_maps(
    table: pd.DataFrame,
    value: str,
    *,
    name: str,
    title: str,
    caption: str,
    legend: str,
    scale: Scale,
    across: tuple[Any, int],
    down: tuple[Any, int, int],
    tooltip: Sequence[Any],
    keep: Sequence[str],
    dotted: str | None = None,
    outlined: str | None = None,
) -> Figure:
    """Draw one map per panel, the tuned model's first, all on one colour scale.

    Args:
        table: One row per panel and cell: `panel` (its heading), `value`; per kind of query rows where it has a column `rows`.
        value: Column that is drawn.
        name: The figure's name.
        title: Its title.
        caption: How to read it.
        legend: Title of the colour scale, with the unit.
        scale: How numbers become colours.
        across: The horizontal encoding, and how many cells it has.
        down: The vertical encoding, how many cells it has, and the width of its labels in pixels.
        tooltip: What is told about the cell under the pointer.
        keep: Columns that encodings and tooltip read.
        dotted: Column of booleans: which cells wear a dot.
        outlined: Column of booleans: which cells wear an outline.
    """
    (x, n_across), (y, n_down, labels) = across, down
    panels = list(dict.fromkeys(table["panel"]))
    # as many in a row as can be read
    room = min(_MAP, max(_LEAST, (_ROW - labels) // len(panels) - GAP))
    wide, high = int(np.clip(room // n_across, 5, 34)), int(np.clip(_MAP // n_down, 5 if labels < 60 else 15, 24))
    colours, clipped = colour_scale(table[value], scale)
    base = alt.Chart().encode(x=x, y=y)
    layers = [
        base.mark_rect(cornerRadius=1).encode(
            color=alt.Color(f"{value}:Q", scale=colours, legend=gradient(legend, share=scale == "share")), tooltip=list(tooltip)
        )
    ]
    if outlined is not None:
        layers.append(base.mark_rect(style="outline", fillOpacity=0, strokeWidth=1.5).transform_filter(f"datum.{outlined}"))
    if dotted is not None:
        size = float(np.clip(0.05 * min(wide, high) ** 2, 4, 20))
        dots = base.mark_point(filled=True, size=size, fill="#ffffff", stroke="#20262d", strokeWidth=0.7, opacity=1)
        layers.append(dots.transform_filter(f"datum.{dotted}"))
    each = max(_LEAST, wide * n_across) + GAP
    return small_multiples(
        layers,
        table,
        Numbers(),
        panel="panel",
        keep=[value, *keep, *(column for column in (dotted, outlined) if column)],
        size=(wide * n_across, high * n_down),
        each=each,
        columns=max(1, min(len(panels), (_ROW - labels) // each)),
        beside=labels + 20,
        name=name,
        title=title,
        caption=caption + clipped,
    )


def head_maps_beside(
    heads: pd.DataFrame,
    controls: pd.DataFrame,
    value: str,
    *,
    name: str,
    title: str,
    caption: str,
    legend: str,
    scale: Scale = "magnitude",
    selected: Collection[tuple[int, int]] = (),
    tooltip: Mapping[str, str],
    changed: str | None = None,
    headings: tuple[str, str] = (TUNED, "mean of"),
) -> Figure:
    """Draw one number per head, layers down and heads across, of the tuned model and of each kind of control.

    Args:
        heads: One row per head of the tuned model, and per kind of query rows where it has a column `rows`.
        controls: The same of controls: their means by kind (`model`), with `count` (of how many).
        value: Column that is drawn.
        name: The figure's name.
        title: Its title.
        caption: How to read it; what is outlined and dotted is added.
        legend: Title of the colour scale, with the unit.
        scale: How numbers become colours.
        selected: (layer, head) of the heads to outline.
        tooltip: Columns told about the head under the pointer, and their names.
        changed: Column of verdicts; heads of the tuned model that changed get a dot.
        headings: Of the tuned model's map, and what stands before the number of controls in those of others.
    """
    own = heads.assign(panel=headings[0], changed=False if changed is None else heads[changed] == "changed")
    others = controls.assign(panel=_panels(controls, headings[1]), changed=False)
    table = pd.concat([own, others], ignore_index=True)
    table["selected"] = [(layer, head) in selected for layer, head in zip(table["layer"], table["head"], strict=True)]
    n_layers, n_heads = int(heads["layer"].max()) + 1, int(heads["head"].max()) + 1
    # named as the axis, it would be left out of a cell's label for screen readers
    told = [alt.Tooltip("component:N", title="component"), alt.Tooltip("panel:N", title="model")]
    told += [alt.Tooltip(f"{column}:Q", title=words, format="" if column == "n" else ".4~g") for column, words in tooltip.items()]
    words = f"{caption}{' A dot marks a change beyond the smallest effect of interest.' if changed is not None else ''}"
    return beside_maps(
        table,
        value,
        name=name,
        title=title,
        caption=f"{words}{' Outlined: the selected heads.' if selected else ''}",
        legend=legend,
        scale=scale,
        across=(alt.X("head:O", title="head", axis=counted(n_heads)), n_heads),
        down=(alt.Y("layer:O", title="layer", axis=counted(n_layers)), n_layers, 40),
        tooltip=told,
        keep=["component", "layer", "head", *tooltip],
        dotted=None if changed is None else "changed",
        outlined="selected" if selected else None,
    )


def matrix_maps_beside(
    weights: pd.DataFrame, controls: pd.DataFrame, value: str, *, name: str, title: str, legend: str, caption: str
) -> Figure:
    """Draw one number per weight matrix, its kind down and its layer across, of the tuned model and of each kind of control.

    Args:
        weights: The table `weights`.
        controls: Of controls the mean `value` per matrix and kind (`model`), with `count`.
        value: Column of `weights` that is drawn.
        name: The figure's name.
        title: Its title.
        legend: Title of the colour scale, with the unit.
        caption: How to read it.
    """
    controls = controls.rename(columns={"value": value}).astype({value: float}).assign(panel=_panels(controls))
    # `rows` are a matrix's own here, not query rows
    table = pd.concat([weights.assign(panel=TUNED), controls], ignore_index=True).drop(columns="rows")
    table = table[(table["layer"] >= 0) & table[value].notna()]
    table = table.assign(matrix=matrix_labels(table))
    order, layers = list(dict.fromkeys(table.sort_values("layer", kind="stable")["matrix"])), int(table["layer"].max()) + 1
    told = [
        alt.Tooltip("name:N", title="matrix"),
        alt.Tooltip("panel:N", title="model"),
        alt.Tooltip(f"{value}:Q", title=legend, format=".4~g"),
    ]
    return beside_maps(
        table,
        value,
        name=name,
        title=title,
        caption=caption,
        legend=legend,
        scale="magnitude",
        across=(alt.X("layer:O", title="layer", axis=counted(layers)), layers),
        down=(alt.Y("matrix:N", title=None, sort=order), len(order), 80),
        tooltip=told,
        keep=["name", "layer", "matrix"],
    )


def rule_maps_beside(selection: pd.DataFrame, controls: pd.DataFrame, *, name: str, title: str, caption: str) -> Figure:
    """Draw how often each layer (across) was chosen by each rule (down): for the tuned model over resampled documents, for controls over controls.

    Args:
        selection: The rows of the table `selection` that are about layers.
        controls: Of controls the share in which a rule chose a layer (`frequency`) per rule, layer and kind (`model`), with `count`.
        name: The figure's name.
        title: Its title.
        caption: How to read it.
    """
    own = selection.assign(panel=RESAMPLES)
    table = pd.concat([own, controls.assign(panel=_panels(controls, "share of"), chosen=False)], ignore_index=True)
    table = table.assign(rule=[name_of(rule) for rule in table["rule"]])
    rules, layers = list(dict.fromkeys(table["rule"])), int(table["layer"].max()) + 1
    told = [alt.Tooltip("rule:N", title="rule"), alt.Tooltip("panel:N", title="model"), alt.Tooltip("layer:O", title="layer")]
    return beside_maps(
        table,
        "frequency",
        name=name,
        title=title,
        caption=caption,
        legend=_CHOSEN,
        scale="share",
        across=(alt.X("layer:O", title="layer", axis=counted(layers)), layers),
        down=(alt.Y("rule:N", title=None, sort=rules, axis=alt.Axis(labelLimit=170)), len(rules), 170),
        tooltip=[*told, alt.Tooltip("frequency:Q", title="chosen in", format=".1%"), alt.Tooltip("score:Q", title="score", format=".4~g")],
        keep=["rule", "layer", "score"],
        outlined="chosen",
    )


def _panels(controls: pd.DataFrame, how: str = "mean of") -> list[str]:
    counts = controls.groupby("model")["count"].max()
    return [panel_of(str(kind), int(counts[kind]), how) for kind in controls["model"]]


def panel_of(kind: str, count: int, how: str = "mean of") -> str:
    """Return the heading of a kind's map: `noise, mean of 5`."""
    return f"{KIND_SHORT[kind]}, {how} {count}" if count > 1 or how != "mean of" else KIND_SHORT[kind]
