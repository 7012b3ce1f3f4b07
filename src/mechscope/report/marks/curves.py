"""Curves over layers, over the rank of a singular value, and over training tokens.

Every curve is a line with points; an interval is a band in the line's colour; single layers or seeds are thin lines under their thick mean.
Series are told apart by shape as well as by colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from mechscope.report.marks.figure import Figure, Numbers, definition
from mechscope.report.marks.heatmaps import counted, matrix_labels, rows_parameter
from mechscope.report.marks.multiples import small_multiples
from mechscope.report.theme import CATEGORIES, STRATEGY_COLOURS, name_of

# Half-width of a 95 % interval in standard errors, where a table has the error but no interval.
Z_95 = 1.959964


def series_scales(names: Sequence[str], colours: Mapping[str, str] | None = None) -> tuple[Any, Any]:
    """Return the colour and the shape scale of named series, equal in every figure that shows the same series."""
    known = {name: colour for name, colour in (colours or {}).items() if name in names}
    unknown = [name for name in names if name not in known]
    spare = [colour for colour in CATEGORIES if colour not in known.values()] or list(CATEGORIES)
    chosen = [known[name] if name in known else spare[unknown.index(name) % len(spare)] for name in names]
    shapes = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left"]
    return alt.Scale(domain=list(names), range=chosen), alt.Scale(domain=list(names), range=[shapes[i % 8] for i in range(len(names))])


def strategy_scales(strategies: Sequence[str]) -> tuple[Any, Any]:
    """Return the scales of strategies under their reading names."""
    return series_scales([name_of(s) for s in strategies], {name_of(s): colour for s, colour in STRATEGY_COLOURS.items()})


def layer_curves(
    layers: pd.DataFrame,
    columns: Mapping[str, str],
    *,
    name: str,
    title: str,
    axis: str,
    caption: str,
    selected: Sequence[int] = (),
    zero: bool = False,
    share: bool = False,
    counted_in: str = "documents",
) -> Figure:
    """Draw one or more numbers per layer.

    Args:
        layers: One row per layer, and per kind of query rows where it has a column `rows`. Of a column `c`, the interval is `c_low` to `c_high`,
            or 95 % by `c_se`, where the table has them.
        columns: Columns that are drawn, and the names of their series.
        name: The figure's name.
        title: Its title.
        axis: Title of the vertical axis, with the unit.
        caption: How to read it.
        selected: Layers whose ground is shaded.
        zero: Whether a rule marks zero.
        share: Whether the numbers are fractions to be written as percentages.
        counted_in: What `n` counts.
    """
    table = _long(layers, columns)
    several = len(columns) > 1
    number = ".1%" if share else ".4~g"
    tooltip = [
        alt.Tooltip("layer:O", title="layer"),
        alt.Tooltip("series:N", title="series"),
        alt.Tooltip("value:Q", title=axis, format=number),
    ]
    tooltip += (
        [alt.Tooltip("low:Q", title="95\u202f% from", format=number), alt.Tooltip("high:Q", title="to", format=number)]
        if table["low"].notna().any()
        else []
    )
    tooltip += [alt.Tooltip("n:Q", title=counted_in)]
    colour, shape = series_scales(list(columns.values()))
    legend = alt.Legend(title=None) if several else None
    base = alt.Chart().encode(
        x=alt.X("layer:O", title="layer", axis=counted(int(layers["layer"].max()) + 1)),
        color=alt.Color("series:N", scale=colour, legend=legend),
    )
    numbers = Numbers()
    marks = ground(numbers, selected, axis if zero else None)
    rows = numbers.add(table, list(table.columns))
    filtered = [alt.FilterTransform("datum.rows === query_rows")] if "rows" in table else []
    curves = [
        base.mark_line(strokeWidth=2).encode(y=vertical(table["value"], axis, share=share)),
        base.mark_point(filled=True, size=46, opacity=1).encode(
            y=alt.Y("value:Q"), shape=alt.Shape("series:N", scale=shape, legend=legend), tooltip=tooltip
        ),
    ]
    if table["low"].notna().any():
        curves.insert(0, base.mark_area(fillOpacity=0.18).encode(y=alt.Y("low:Q", title=axis), y2="high:Q"))
    for curve in curves:
        layer = curve.properties(data=rows)
        marks.append(layer.properties(transform=filtered) if filtered else layer)
    chart = alt.layer(*marks).properties(height=220)
    if filtered:
        chart = chart.add_params(rows_parameter(layers))
    words = caption + (" Shaded: the selected layers." if selected else "")
    return Figure(name=name, title=title, caption=words, spec=definition(chart, numbers, description=title))


def vertical(values: pd.Series, axis: str, *, share: bool) -> alt.Y:
    """Return the vertical axis of curves over layers: logarithmic where positive numbers span a large range.

    Args:
        values: All numbers that are drawn.
        axis: Its title, with the unit.
        share: Whether the numbers are fractions to be written as percentages.
    """
    numbers = values.dropna()
    # activation norms differ a hundredfold between the first and the last layers of GPT-2
    logarithmic = len(numbers) > 0 and float(numbers.min()) > 0 and not share and float(numbers.max()) > 60 * float(numbers.min())
    scale = alt.Scale(type="log") if logarithmic else alt.Scale(zero=False, nice=True)
    return alt.Y("value:Q", title=axis, scale=scale, axis=alt.Axis(**({"format": "%"} if share else {}), tickCount=5, grid=True))


def ground(numbers: Numbers, selected: Sequence[int], axis: str | None) -> list[Any]:
    """Return what lies under curves over layers: shaded selected layers, and a rule at zero of the axis with this title, where one is given."""
    marks: list[Any] = []
    if selected:
        shaded = alt.Chart(numbers.add(pd.DataFrame({"layer": list(selected)}), ["layer"]))
        marks.append(shaded.mark_bar(color="#8a94a0", opacity=0.16, width={"band": 1}).encode(x=alt.X("layer:O"), tooltip=alt.value(None)))
    if axis is not None:
        ruled = alt.Chart(numbers.add(pd.DataFrame({"zero": [0]}), ["zero"])).mark_rule(style="zero")
        marks.append(ruled.encode(y=alt.Y("zero:Q", title=axis)))
    return marks


def _long(layers: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Return one row per layer and series: value, low, high, n."""
    parts = []
    for column, series in columns.items():
        none = pd.Series(np.nan, index=layers.index)
        low, high = layers.get(f"{column}_low", none), layers.get(f"{column}_high", none)
        if f"{column}_se" in layers and f"{column}_low" not in layers:
            half = Z_95 * layers[f"{column}_se"]
            low, high = layers[column] - half, layers[column] + half
        part = layers[[c for c in ("rows", "layer", "n") if c in layers]]
        parts.append(part.assign(series=series, value=layers[column], low=low, high=high))
    return pd.concat(parts, ignore_index=True)


def scree(weights: pd.DataFrame, *, name: str, title: str, caption: str, controls: pd.DataFrame | None = None) -> Figure:
    """Draw the top singular values of each weight change: thin per layer, thick the geometric mean over layers, one colour per kind of matrix.

    Args:
        weights: The table `weights`.
        name: The figure's name.
        title: Its title.
        caption: How to read it.
        controls: The same of controls, with what each is in `model`: their geometric means have a panel for each of these.
    """
    several = controls is not None and len(controls) > 0
    models = [weights.assign(model="tuned"), *([controls] if controls is not None and several else [])]
    long = pd.concat([_singular_values(table) for table in models], ignore_index=True)
    mean = long.assign(value=np.log(long["value"])).groupby(["model", "matrix", "rank"], sort=False, as_index=False)["value"].mean()
    mean = mean.assign(value=np.exp(mean["value"]))
    # single layers of controls would hide what is to be seen
    thin = long[long["model"] == "tuned"]
    table = pd.concat([thin.assign(layers="one"), mean.assign(layers="all", layer=-1)], ignore_index=True)
    keep = ["model", "matrix", "layer", "rank", "value", "layers"]
    colour, shape = series_scales(list(dict.fromkeys(table["matrix"])))
    legend, numbers = alt.Legend(title=None), Numbers()
    base = alt.Chart().encode(
        x=alt.X("rank:O", title="rank of the singular value", axis=alt.Axis(labelAngle=0, grid=False)),
        y=alt.Y("value:Q", title="singular value of ΔW", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(tickCount=5)),
        color=alt.Color("matrix:N", scale=colour, legend=legend),
    )
    tooltip = [alt.Tooltip("matrix:N"), alt.Tooltip("rank:O"), alt.Tooltip("value:Q", title="geometric mean over layers", format=".4~g")]
    one, every = (base.transform_filter(f"datum.layers === '{which}'") for which in ("one", "all"))
    points = every.mark_point(filled=True, size=42, opacity=1).encode(
        shape=alt.Shape("matrix:N", scale=shape, legend=legend), tooltip=tooltip
    )
    layers = [one.mark_line(strokeWidth=0.7, strokeOpacity=0.25).encode(detail="layer:N"), every.mark_line(strokeWidth=2.4), points]
    if not several:
        chart = alt.layer(*layers, data=numbers.add(table, keep)).properties(height=240)
        return Figure(name=name, title=title, caption=caption, spec=definition(chart, numbers, description=title), width=620, wide=True)
    return small_multiples(
        layers, table, Numbers(), panel="model", keep=keep, size=(205, 220), each=231, columns=4, beside=50, name=name, title=title, caption=caption
    )  # fmt: skip


def _singular_values(weights: pd.DataFrame) -> pd.DataFrame:
    """Return one row per matrix inside the layers and singular value above zero: `model`, `matrix`, `layer`, `rank`, `value`."""
    ranks = [column for column in weights if str(column).startswith("sv") and str(column)[2:].isdigit()]
    table = weights[weights["sv1"].notna() & (weights["layer"] >= 0)]
    table = table.assign(matrix=matrix_labels(table))
    long = table.melt(id_vars=["model", "matrix", "layer"], value_vars=ranks, var_name="rank", value_name="value")
    # zero singular values (a matrix LoRA never touched) have no place on a logarithmic axis
    return long.assign(rank=long["rank"].str[2:].astype(int))[long["value"] > 0]


def learning_curves(curves: pd.DataFrame, *, name: str, title: str, caption: str) -> Figure:
    """Draw validation loss by training tokens: thin per seed, thick the mean over the steps that every seed reached.

    Clicking a strategy in the legend lets the others step back.
    """
    table = curves[curves["validation_loss"].notna()].sort_values(["strategy", "seed", "step"], kind="stable")
    strategies = [s for s in STRATEGY_COLOURS if s in set(table["strategy"])]
    strategies += [s for s in dict.fromkeys(table["strategy"]) if s not in strategies]
    table = table.assign(strategy=[name_of(s) for s in table["strategy"]])
    seeds = table.groupby("strategy")["seed"].transform("nunique")
    by_step = table.assign(seeds=seeds).groupby(["strategy", "step", "seeds"], sort=False, as_index=False)
    mean = by_step.agg(tokens=("tokens", "mean"), validation_loss=("validation_loss", "mean"), n=("seed", "nunique"))
    # past the first seed that stopped early a mean would jump for no reason but a change of company
    mean = mean[mean["n"] == mean["seeds"]]
    colour, shape = strategy_scales(strategies)
    legend, numbers = alt.Legend(title=None, symbolLimit=0), Numbers()
    pick = alt.selection_point(name="pick", fields=["strategy"], bind="legend")
    base = alt.Chart().encode(
        x=alt.X("tokens:Q", title="training tokens seen", axis=alt.Axis(format="~s", tickCount=6, grid=False)),
        y=alt.Y("validation_loss:Q", title="validation loss (nats per token)", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=6)),
        color=alt.Color("strategy:N", scale=colour, legend=legend),
    )
    thin = (
        base.mark_line(strokeWidth=0.8)
        .encode(detail="seed:N", strokeOpacity=alt.condition(pick, alt.value(0.45), alt.value(0.05)))
        .properties(data=numbers.add(table, ["strategy", "seed", "tokens", "validation_loss"]))
    )
    means = numbers.add(mean, ["strategy", "step", "tokens", "validation_loss", "n"])
    tooltip = [
        alt.Tooltip("strategy:N"),
        alt.Tooltip("step:Q", format=","),
        alt.Tooltip("tokens:Q", format=",.0f"),
        alt.Tooltip("validation_loss:Q", title="validation loss, nats", format=".4f"),
        alt.Tooltip("n:Q", title="seeds"),
    ]
    faint = alt.condition(pick, alt.value(1), alt.value(0.12))
    thick = base.mark_line(strokeWidth=2.4).encode(strokeOpacity=faint).properties(data=means).add_params(pick)
    points = base.mark_point(filled=True, size=34).encode(
        shape=alt.Shape("strategy:N", scale=shape, legend=legend), opacity=faint, tooltip=tooltip
    )
    chart = alt.layer(thin, thick, points.properties(data=means)).properties(height=330)
    return Figure(name=name, title=title, caption=caption, spec=definition(chart, numbers, description=title), width=620, wide=True)
