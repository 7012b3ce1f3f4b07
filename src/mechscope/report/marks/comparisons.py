"""Comparisons of fine-tuning strategies: scores and differences with their intervals, and what a trained parameter buys.

A mean is a point, its interval a rule; a difference whose rule crosses zero has not been shown to differ. Protocols or metrics are told apart
by shape as well as by colour.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from mechscope.report.marks.curves import series_scales, strategy_scales
from mechscope.report.marks.figure import Figure, Numbers, definition
from mechscope.report.theme import METRIC_NAMES, PROTOCOL_NAMES, STRATEGY_COLOURS, name_of


def strategy_order(table: pd.DataFrame) -> list[str]:
    """Return the reading names of the strategies of `table`, in the order that every figure and table keeps."""
    present = list(dict.fromkeys(table["strategy"]))
    return [name_of(s) for s in [*(s for s in STRATEGY_COLOURS if s in present), *(s for s in present if s not in STRATEGY_COLOURS)]]


def _protocols(table: pd.DataFrame) -> list[str]:
    """Return the reading names of the protocols of `table` (already renamed), in the order that every figure keeps."""
    present = list(dict.fromkeys(table["protocol"]))
    return [*(p for p in PROTOCOL_NAMES.values() if p in present), *(p for p in present if p not in PROTOCOL_NAMES.values())]


def _intervals(numbers: Numbers, table: pd.DataFrame, series: str, names: list[str], *, axis: str, zero: bool, signed: bool) -> Any:
    """Return points with rules: strategies down, `series` side by side within each."""
    number = "+.4f" if signed else ".4f"
    colour, shape = series_scales(names)
    legend = alt.Legend(title=None) if len(names) > 1 else None
    tooltip = [
        alt.Tooltip("strategy:N"),
        alt.Tooltip(f"{series}:N"),
        alt.Tooltip("mean:Q", title=axis, format=number),
        alt.Tooltip("low:Q", title="95\u202f% from", format=number),
        alt.Tooltip("high:Q", title="to", format=number),
        alt.Tooltip("n_seeds:Q", title="seeds"),
        alt.Tooltip("n_documents:Q", title="documents"),
    ]
    step = 34 if len(names) < 4 else 42
    order = strategy_order(table)
    table = table.assign(strategy=[name_of(s) for s in table["strategy"]])
    base = alt.Chart().encode(
        y=alt.Y("strategy:N", sort=order, title=None, axis=alt.Axis(grid=True, labelLimit=170), scale=alt.Scale(paddingInner=0.25)),
        yOffset=alt.YOffset(f"{series}:N", scale=alt.Scale(domain=names, paddingOuter=0.35)),
        color=alt.Color(f"{series}:N", scale=colour, legend=legend),
        tooltip=tooltip,
    )
    horizontal = alt.Axis(**({"format": "+"} if signed else {}), tickCount=6, grid=not zero)
    marks = (
        [alt.Chart(numbers.add(pd.DataFrame({"zero": [0]}), ["zero"])).mark_rule(style="zero").encode(x=alt.X("zero:Q"))] if zero else []
    )
    rows = numbers.add(table, ["strategy", series, "mean", "low", "high", "n_seeds", "n_documents"])
    scale = alt.Scale(zero=False, nice=True)
    if table["low"].notna().any():
        rule = base.mark_rule(strokeWidth=2.2, strokeCap="round")
        marks.append(rule.encode(x=alt.X("low:Q", title=axis, scale=scale, axis=horizontal), x2="high:Q").properties(data=rows))
    point = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=alt.X("mean:Q", title=axis, scale=scale, axis=horizontal), shape=alt.Shape(f"{series}:N", scale=shape, legend=legend)
    )
    return alt.layer(*marks, point.properties(data=rows)).properties(height=step * len(order))


def rouge(summary: pd.DataFrame, metric: str) -> Figure:
    """Draw the score of every strategy, per protocol, in one ROUGE metric."""
    table = summary[summary["metric"] == metric]
    table = table.assign(protocol=[name_of(p) for p in table["protocol"]])
    names = _protocols(table)
    words = name_of(metric)
    title = f"{words} on held-out documents"
    numbers = Numbers()
    chart = _intervals(numbers, table, "protocol", names, axis=f"{words} (F-measure, 0–1)", zero=False, signed=False)
    caption = "Point: mean over documents and seeds. Rule: 95\u202f% interval over both; none below three seeds."
    return Figure(
        name=f"rouge-{metric.removeprefix('rouge').lower()}",
        title=title,
        caption=caption,
        spec=definition(chart, numbers, description=title),
    )


def differences(summary: pd.DataFrame, protocol: str, baseline: str) -> Figure | None:
    """Draw the paired ROUGE differences of every strategy from `baseline` (``standard`` or ``random``); None where there are none."""
    column = f"vs_{baseline}"
    table = summary[(summary["protocol"] == protocol) & summary[column].notna()]
    if table.empty:
        return None
    table = table.assign(
        mean=table[column], low=table[f"{column}_low"], high=table[f"{column}_high"], metric=[name_of(m) for m in table["metric"]]
    )
    names = [m for m in METRIC_NAMES.values() if m in set(table["metric"])]
    other = {"standard": "standard LoRA", "random": "random places"}[baseline]
    title = f"ROUGE against {other}, {name_of(protocol)}"
    numbers = Numbers()
    chart = _intervals(numbers, table, "metric", names, axis="difference in ROUGE, same documents", zero=True, signed=True)
    caption = "Right of zero: better. Rule: 95\u202f% interval over trainings and documents, none below three seeds; one that crosses zero shows no difference."
    if baseline == "random":
        caption += " The circuit is compared with random circuits of its shape, all others with random layers."
    name = f"difference-{baseline}-{protocol.replace('_', '-')}"
    return Figure(name=name, title=title, caption=caption, spec=definition(chart, numbers, description=title))


def parameter_price(arms: pd.DataFrame) -> Figure:
    """Draw the best validation loss of every trained arm against the number of parameters it trained."""
    table = arms[arms["trainable_parameters"] > 0]
    order = strategy_order(table)
    colour, _ = strategy_scales([s for s in [*STRATEGY_COLOURS, *table["strategy"]] if name_of(s) in order])
    table = table.assign(strategy=[name_of(s) for s in table["strategy"]], protocol=[name_of(p) for p in table["protocol"]])
    _, shape = series_scales(_protocols(table))
    tooltip = [
        alt.Tooltip("strategy:N"),
        alt.Tooltip("protocol:N"),
        alt.Tooltip("seed:N"),
        alt.Tooltip("trainable_parameters:Q", title="trainable parameters", format=","),
        alt.Tooltip("best_loss:Q", title="best validation loss, nats", format=".4f"),
    ]
    numbers = Numbers()
    chart = (
        alt.Chart(numbers.add(table, ["strategy", "protocol", "seed", "trainable_parameters", "best_loss"]))
        .mark_point(filled=True, size=75, opacity=0.85)
        .encode(
            x=alt.X(
                "trainable_parameters:Q",
                title="trainable parameters",
                scale=alt.Scale(type="log", nice=True),
                axis=alt.Axis(format="~s", tickCount=5),
            ),
            y=alt.Y("best_loss:Q", title="best validation loss (nats per token)", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=6)),
            color=alt.Color("strategy:N", scale=colour, sort=order, legend=alt.Legend(title=None, symbolLimit=0)),
            shape=alt.Shape("protocol:N", scale=shape, legend=alt.Legend(title=None, symbolFillColor="#7a8590")),
            tooltip=tooltip,
        )
        .properties(height=280)
    )
    title = "What a trained parameter buys"
    caption = "One point per arm and seed. Lower is better; further left is cheaper."
    return Figure(
        name="parameter-price", title=title, caption=caption, spec=definition(chart, numbers, description=title), width=620, wide=True
    )
