"""Figures of circuits: how faithful they are, and what fine-tuning changed in them.

A measured line never stands alone: beside it is what random circuits of the same size reach (dashed) and, for the overlap of two models, how much
two circuits of the same model overlap when its texts are resampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from mechscope.report.curves import series_scales
from mechscope.report.figure import Figure, Numbers, definition
from mechscope.report.theme import label, name_of

Tables = Mapping[str, pd.DataFrame]

_KINDS = ("circuit", "random circuits")
# a ratio with a small denominator can lie anywhere; what lies beyond is drawn at the edge and said
_LOWEST, _HIGHEST = -1.0, 2.0


def circuit_figures(tables: Tables) -> dict[str, list[Figure]]:
    """Return the figures of circuits by section (`circuit`, `circuit-change`, `circuit-time`), each only where its table is."""
    drawn = {
        "circuit": _faithfulness(tables["circuit_curve"]) if "circuit_curve" in tables else [],
        "circuit-change": [
            *_overlap(tables.get("circuit_overlap")),
            *_shift(tables.get("circuit_shift")),
            *_gain(tables.get("circuit_gain")),
        ],
        "circuit-time": _time(tables["circuit_time"]) if "circuit_time" in tables else [],
    }
    return {section: found for section, found in drawn.items() if found}


def curves(
    table: pd.DataFrame,
    *,
    name: str,
    title: str,
    caption: str,
    x: tuple[str, str],
    axis: str,
    logarithmic: bool = True,
    unit: bool = True,
    colours: Mapping[str, str] | None = None,
    wide: bool = False,
) -> list[Figure]:
    """Draw series over sizes or checkpoints, each a line with points and its interval as a band; nothing where no value is a number.

    Args:
        table: One row per point: `series`, the column of `x`, `value`, `low`, `high`, and `kind` (``circuit`` or ``random circuits``, which is dashed).
        name: The figure's name.
        title: Its title.
        caption: How to read it.
        x: Column of the horizontal axis, and its title.
        axis: Title of the vertical axis.
        logarithmic: Whether the horizontal axis is; otherwise it has the column's values in their order.
        unit: Whether the numbers are shares: zero and one are ruled, and what lies far outside is drawn at the edge.
        colours: Colours of some series by name.
        wide: Whether the page gives it a whole row.
    """
    column, words_ = x
    table = table[table["value"].notna() & ((table[column] > 0) if logarithmic else True)]
    if table.empty:
        return []
    bounds: dict[str, Any] = {"zero": not unit, "nice": not unit}
    if unit:
        lowest, highest = min(0.0, float(table["value"].min())), max(1.0, float(table["value"].max()))
        caption += (
            f" Drawn from {_LOWEST:g} to {_HIGHEST:g}; the values run from {lowest:.3g} to {highest:.3g}."
            if lowest < _LOWEST or highest > _HIGHEST
            else ""
        )
        bounds["domain"] = [max(_LOWEST, lowest) - 0.04, min(_HIGHEST, highest) + 0.04]
    names, numbers = list(dict.fromkeys(table["series"])), Numbers()
    colour, shape = series_scales(names, colours)
    legend = alt.Legend(title=None, symbolLimit=0) if len(names) > 1 else None
    both = bool((table.groupby("series")["kind"].nunique() > 1).any())
    dash = alt.StrokeDash(
        "kind:N",
        scale=alt.Scale(domain=list(_KINDS), range=[[1, 0], [5, 4]]),
        legend=alt.Legend(title=None, symbolType="stroke", symbolStrokeWidth=2) if both else None,
    )
    scale = alt.Scale(type="log", nice=False, padding=10) if logarithmic else alt.Undefined
    across = (
        alt.X(
            f"{column}:Q",
            title=words_,
            scale=scale,
            axis=alt.Axis(format=".1~%" if column == "fraction" else "~s", tickCount=6, grid=False),
        )
        if logarithmic
        else alt.X(f"{column}:N", title=words_, sort=list(dict.fromkeys(table[column])), axis=alt.Axis(labelAngle=-30, grid=False))
    )
    down = alt.Y("value:Q", title=axis, scale=alt.Scale(**bounds), axis=alt.Axis(tickCount=6, grid=True))
    rows = numbers.add(table, list(dict.fromkeys(["series", "kind", column, "value", "low", "high", *_told(table)])))
    base = alt.Chart(rows).encode(x=across, color=alt.Color("series:N", scale=colour, legend=legend))
    told = [
        alt.Tooltip("series:N"),
        alt.Tooltip("kind:N"),
        alt.Tooltip(
            f"{column}:{'Q' if logarithmic else 'N'}",
            title=words_,
            **({"format": ".3~%" if column == "fraction" else ","} if logarithmic else {}),
        ),
        *(alt.Tooltip(f"{other}:Q", format=".3~%" if other == "fraction" else ",") for other in _told(table) if other != column),
        *(alt.Tooltip(f"{end}:Q", title=title_, format=".4~g") for end, title_ in (("value", axis), ("low", "95 % from"), ("high", "to"))),
    ]
    marks: list[Any] = []
    if unit:
        ruled = numbers.add(pd.DataFrame({"level": [0, 1]}), ["level"])
        marks.append(alt.Chart(ruled).mark_rule(style="zero", color="#8C8C8C").encode(y=alt.Y("level:Q", title=axis)))
    if table["low"].notna().any():
        band = base.mark_area(fillOpacity=0.14, clip=unit).encode(y=alt.Y("low:Q", title=axis), y2="high:Q", detail="kind:N")
        # a band of one point has no width
        marks += [band, base.mark_rule(strokeWidth=1, opacity=0.5, clip=unit).encode(y=alt.Y("low:Q", title=axis), y2="high:Q")]
    marks.append(base.mark_line(strokeWidth=2, clip=unit).encode(y=down, strokeDash=dash))
    points = base.mark_point(filled=True, size=36, opacity=1, clip=unit)
    marks.append(points.encode(y=down, shape=alt.Shape("series:N", scale=shape, legend=legend), tooltip=told))
    chart = alt.layer(*marks).properties(height=250)
    spec = definition(chart, numbers, description=title)
    return [Figure(name=name, title=title, caption=caption, spec=spec, width=760 if wide else 520, wide=wide)]


def _told(table: pd.DataFrame) -> list[str]:
    return [column for column in ("edges", "fraction") if column in table]


def _long(table: pd.DataFrame, series: Sequence[tuple[str, str, str, str | None]], keep: Sequence[str]) -> pd.DataFrame:
    """Return one row per point and series (name, kind, column, prefix of the interval's columns)."""
    parts = []
    for name, kind, column, ends in series:
        part = table[[*keep]].assign(series=name, kind=kind, value=table[column].astype(float))
        for end in ("low", "high"):
            found = None if ends is None else table.get(f"{ends}{end}")
            part[end] = float("nan") if found is None else found.astype(float)
        parts.append(part[part["value"].notna()])
    return pd.concat(parts, ignore_index=True)


def _faithfulness(curve: pd.DataFrame) -> list[Figure]:
    parts, models = [], curve["model"].nunique()
    for model, own in curve.groupby("model", sort=False):
        name = name_of(model) if models > 1 else "the model"
        # the bands of many models' random circuits would cover one another
        around = "random_" if models < 3 else None
        parts.append(_long(own, ((name, _KINDS[0], "faithfulness", ""), (name, _KINDS[1], "random", around)), ("edges", "fraction")))
    return curves(
        pd.concat(parts, ignore_index=True), name="circuit-faithfulness", title="Faithfulness by number of edges", x=("edges", "edges in the circuit"),
        axis="faithfulness (1: as the whole model)",
        caption="How much of the model's behaviour a circuit of that many edges keeps when all other edges carry the other run's values. Bands: 95 % "
        "over texts, and over random circuits with as many edges in every layer.", wide=True,
    )  # fmt: skip


def _overlap(overlap: pd.DataFrame | None) -> list[Figure]:
    drawn: list[Figure] = []
    if overlap is None:
        return drawn
    series = [
        ("base and tuned", _KINDS[0], "jaccard", ""),
        ("base and tuned, halves", _KINDS[0], "across", "across_"),
        ("base, halves", _KINDS[0], "self_base", None),
        ("tuned, halves", _KINDS[0], "self_tuned", None),
        ("random circuits", _KINDS[1], "null", "null_"),
    ]
    for what, own in overlap.groupby("what", sort=False):
        drawn += curves(
            _long(own.sort_values("fraction", kind="stable"), [each for each in series if each[2] in own], ("fraction",)),
            name=f"circuit-overlap-{'nodes' if what == 'nodes' else 'edges'}", title=f"Overlap of the two circuits: {label(what)}",
            x=("fraction", "share of the edges in each circuit"), axis="Jaccard index", colours={"random circuits": "#8C8C8C"},
            caption="Two circuits of one model, found on two halves of the texts, differ by noise alone. Base on one half against tuned on the other "
            "differs by noise and fine-tuning: as high as the same model means that no change was shown.",
        )  # fmt: skip
    return drawn


def _shift(shift: pd.DataFrame | None) -> list[Figure]:
    if shift is None:
        return []
    layers = int(shift[["sender_layer", "receiver_layer"]].max().max())
    named = {-1: "input", layers: "logits"} if (shift["receiver"] == "logits").any() else {-1: "input"}
    cells = shift.assign(size=shift["shift"].abs()).groupby(["sender_layer", "receiver_layer"], as_index=False)
    table = cells.agg(mean=("size", "mean"), largest=("size", "max"), n=("size", "size"))
    for side in ("sender", "receiver"):
        table[side] = [named.get(int(layer), str(int(layer))) for layer in table[f"{side}_layer"]]
    order = [named.get(layer, str(layer)) for layer in range(-1, layers + 1)]
    title = "Where edges' scores shifted"
    numbers = Numbers()
    chart = (
        alt.Chart(numbers.add(table, ["sender", "receiver", "mean", "largest", "n"]))
        .mark_rect(cornerRadius=1)
        .encode(
            x=alt.X("sender:N", title="layer that writes", sort=order, axis=alt.Axis(labelAngle=0, grid=False)),
            y=alt.Y("receiver:N", title="layer that reads", sort=order[::-1]),
            color=alt.Color(
                "mean:Q",
                scale=alt.Scale(type="sqrt", interpolate="rgb", domain=[0, float(table["mean"].max()) or 1e-6]),
                legend=alt.Legend(
                    title="mean |shift|, √ scale", direction="horizontal", gradientLength=230, gradientThickness=10, tickCount=5
                ),
            ),
            tooltip=[
                alt.Tooltip("sender:N", title="from"),
                alt.Tooltip("receiver:N", title="to"),
                alt.Tooltip("mean:Q", title="mean |shift|", format=".4~g"),
                alt.Tooltip("largest:Q", title="largest", format=".4~g"),
                alt.Tooltip("n:Q", title="edges", format=","),
            ],
        )
        .properties(height=max(160, min(26, 560 // (layers + 2)) * (layers + 1)))
    )
    caption = "Mean over all edges between two layers of |score in tuned − score in base|."
    return [Figure(name="circuit-shift", title=title, caption=caption, spec=definition(chart, numbers, description=title), width=480)]


def _gain(gain: pd.DataFrame | None) -> list[Figure]:
    if gain is None:
        return []
    names = {"tuned": "edges chosen by attribution", "random": "random edges"}
    table = gain.assign(
        series=[names.get(str(kind), label(kind)) for kind in gain["kind"]], kind=[_KINDS[kind == "random"] for kind in gain["kind"]], value=gain["share"]
    ).sort_values(["kind", "edges"], kind="stable")  # fmt: skip
    caption = "Share of the change by fine-tuning that appears when these edges of the tuned model are put into the base model. 1: the whole gain."
    return curves(
        table, name="circuit-gain", title="Which tuned edges carry the gain", x=("edges", "tuned edges in the base model"), axis="share of the gain",
        caption=caption, colours={"random edges": "#8C8C8C"},
    )  # fmt: skip


def _time(time: pd.DataFrame) -> list[Figure]:
    ordered = time.sort_values("order", kind="stable").assign(model=lambda table: [name_of(model) for model in table["model"]])
    series = (
        ("faithfulness", _KINDS[0], "faithfulness", ""),
        ("overlap with the first", _KINDS[0], "jaccard_base", None),
        ("overlap with the one before", _KINDS[0], "jaccard_previous", None),
    )
    x = ("model", "checkpoint")
    return [
        *curves(
            _long(ordered, series, ("model",)), name="circuit-time", title="The circuit over training", x=x, axis="faithfulness, Jaccard index",
            caption="Faithfulness of each checkpoint's own circuit, and the overlap of its edges with earlier ones, at one share of edges.", logarithmic=False,
        ),
        *curves(
            _long(ordered, (("edges", _KINDS[0], "edges", None),), ("model",)), name="circuit-size-time", title="Size of the circuit over training",
            x=x, axis="edges", caption="Edges of each checkpoint's circuit.", logarithmic=False, unit=False,
        ),
    ]  # fmt: skip
