"""Figures and tables of lenses: what the residual stream predicts layer by layer, and what fine-tuning moved to earlier or later layers.

Base and tuned are told apart by colour, the logit lens and the tuned lens by solid and dashed lines. Bands are 95 % intervals over texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import pandas as pd

from mechscope.report.curves import series_scales
from mechscope.report.figure import Figure, Numbers, definition
from mechscope.report.heatmaps import Q_SIGNIFICANT, head_heatmap
from mechscope.report.tabled import Shown, Table, strongest
from mechscope.report.theme import name_of

MEASURES = {
    "log_probability": ("Log-probability of the next token", "log-probability (nats)", "Of the token that the text really has next."),
    "kl": ("Distance from the final prediction", "KL(final || lens), nats", "Zero: the layer already predicts what the model will."),
    "entropy": ("Entropy by layer", "entropy (nats)", "How undecided the lens is."),
    "agreement": ("Agreement with the final prediction", "share of positions", "How often the lens's likeliest token is the model's."),
    "reciprocal_rank": ("Rank of the next token", "mean of 1 / rank", "1: the next token is always the likeliest."),
}
SITES = {
    "residual": "residual stream",
    "attention_output": "attention output",
    "mlp_output": "MLP output",
    "head_output": "head output",
}
_TOP = 40


def lens_figures(tables: Mapping[str, pd.DataFrame]) -> list[Figure]:
    """Return the curves of the residual stream, those of what attention and MLPs write, and a heatmap per model of what heads write."""
    summary, drawn = tables.get("lens_summary"), list[Figure]()
    if summary is not None:
        residual = summary[summary["site"] == "residual"]
        several = residual["model"].nunique() > 1
        for measure, (title, axis, caption) in MEASURES.items():
            if measure in residual and residual[measure].notna().any():
                series, dash = ("model", "lens") if several else ("lens", None)
                drawn.append(
                    _curves(
                        residual,
                        measure,
                        name=f"lens-{measure.replace('_', '-')}",
                        title=title,
                        axis=axis,
                        caption=caption,
                        series=series,
                        dash=dash,
                    )
                )
        written = first_lens(summary[summary["site"].isin(["attention_output", "mlp_output"])])
        if written["log_probability"].notna().any():
            title, caption = (
                "What attention and MLPs write, through the lens",
                "Each block's own output, read alone: what it says about the next token.",
            )
            drawn.append(
                _curves(
                    written,
                    "log_probability",
                    name="lens-written",
                    title=title,
                    axis="log-probability (nats)",
                    caption=caption,
                    series="site",
                    dash="model",
                )
            )
        drawn += _heads(summary)
    return drawn + _changed_heads(tables.get("lens_change"))


def _curves(table: pd.DataFrame, measure: str, *, name: str, title: str, axis: str, caption: str, series: str, dash: str | None) -> Figure:
    table = table.sort_values("layer", kind="stable")
    order = list(dict.fromkeys(_place(layer) for layer in table["layer"]))
    long = pd.DataFrame(
        {
            "place": [_place(layer) for layer in table["layer"]],
            "series": [_named(series, value) for value in table[series]],
            "dash": [_named(dash, value) for value in table[dash]] if dash else "",
            "value": table[measure].astype(float),
            "low": table.get(f"{measure}_low", pd.Series(float("nan"), index=table.index)).astype(float),
            "high": table.get(f"{measure}_high", pd.Series(float("nan"), index=table.index)).astype(float),
            "n": table.get("n", pd.Series(0, index=table.index)),
        }
    )
    names, dashes, numbers = list(dict.fromkeys(long["series"])), list(dict.fromkeys(long["dash"])), Numbers()
    colour, shape = series_scales(names)
    legend = alt.Legend(title=None) if len(names) > 1 else None
    share = measure == "agreement"
    base = alt.Chart(numbers.add(long, list(long.columns))).encode(
        x=alt.X("place:N", title="layer", sort=order, axis=alt.Axis(labelAngle=0, grid=False)),
        color=alt.Color("series:N", scale=colour, legend=legend),
        detail="dash:N",
    )
    down = alt.Y(
        "value:Q", title=axis, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5, grid=True, **({"format": "%"} if share else {}))
    )
    patterns = alt.StrokeDash(
        "dash:N",
        scale=alt.Scale(domain=dashes, range=[[1, 0], [5, 3], [2, 2], [8, 3]][: len(dashes)]),
        legend=alt.Legend(title=None, symbolType="stroke", symbolStrokeWidth=2) if len(dashes) > 1 else None,
    )
    number = ".1%" if share else ".4~g"
    told = [alt.Tooltip("place:N", title="layer"), alt.Tooltip("series:N", title=series)]
    told += [alt.Tooltip("dash:N", title=dash)] if dash and len(dashes) > 1 else []
    told += [
        alt.Tooltip(f"{column}:Q", title=words, format=number) for column, words in (("value", axis), ("low", "95 % from"), ("high", "to"))
    ]
    marks: list[Any] = [base.mark_line(strokeWidth=2).encode(y=down, strokeDash=patterns)]
    if long["low"].notna().any():
        marks.insert(0, base.mark_area(fillOpacity=0.15).encode(y=alt.Y("low:Q", title=axis), y2="high:Q"))
    points = base.mark_point(filled=True, size=34, opacity=1)
    marks.append(
        points.encode(y=down, shape=alt.Shape("series:N", scale=shape, legend=legend), tooltip=[*told, alt.Tooltip("n:Q", title="texts")])
    )
    chart = alt.layer(*marks).properties(height=220)
    return Figure(name=name, title=title, caption=caption, spec=definition(chart, numbers, description=title))


def _place(layer: object) -> str:
    return "emb" if int(str(layer)) < 0 else str(layer)


def _named(column: str | None, value: object) -> str:
    if column == "site":
        return SITES.get(str(value), name_of(value))
    return f"{name_of(value)} lens" if column == "lens" else name_of(value)


def _heads(summary: pd.DataFrame) -> list[Figure]:
    heads = first_lens(summary[(summary["site"] == "head_output") & (summary["head"] >= 0)])
    if heads.empty or "agreement" not in heads or heads["agreement"].isna().all():
        return []
    tooltip = {"agreement": "agreement, share", "log_probability": "log-probability, nats", "entropy": "entropy, nats", "n": "texts"}
    groups = list(heads.groupby("model", sort=False))
    return [
        head_heatmap(
            own, "agreement", name=f"lens-heads-{i + 1}", title="Heads that say what the model will" + (f": {name_of(model)}" if len(groups) > 1 else ""),
            legend="share of positions, √ scale", tooltip={key: words for key, words in tooltip.items() if key in own},
            caption="How often the likeliest token of the head's own output is the model's final one.",
        )
        for i, (model, own) in enumerate(groups)
    ]  # fmt: skip


def _changed_heads(change: pd.DataFrame | None) -> list[Figure]:
    heads = None if change is None else first_lens(change[(change["site"] == "head_output") & (change["head"] >= 0)])
    if heads is None or heads.empty or "log_probability_change" not in heads:
        return []
    columns = {"base": "base, nats", "tuned": "tuned, nats", "change": "change, nats", "low": "95 % from", "high": "to", "q": "q"}
    tooltip = {f"log_probability_{end}": words for end, words in columns.items() if f"log_probability_{end}" in heads}
    return [
        head_heatmap(
            heads, "log_probability_change", name="lens-heads-change", title="What heads' outputs say about the next token: change",
            legend="log-probability, tuned − base, nats", caption="Each head's own output, read alone.", scale="change", tooltip=tooltip,
            significance="log_probability_change_q" if "log_probability_change_q" in heads else None,
        )
    ]  # fmt: skip


def first_lens(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one lens, the first: a map has one number per head."""
    return table[table["lens"] == table["lens"].iloc[0]] if "lens" in table and len(table) else table


def lens_views(tables: Mapping[str, pd.DataFrame]) -> list[Shown]:
    """Return what the lens shows to have changed, the surest first, as a table."""
    change = tables.get("lens_change")
    if change is None or "log_probability_change" not in change:
        return []
    top = strongest(change, "log_probability_change", _TOP, q="log_probability_change_q")
    table = Table(top).words("component", "at", strong=lambda row: row.get("log_probability_change_q", 1.0) < Q_SIGNIFICANT)
    if "lens" in change and change["lens"].nunique() > 1:
        table = table.mapped("lens", "lens")
    table = table.mapped("site", "what is read", lambda value: SITES.get(str(value), name_of(value)))
    table = table.numbers("log_probability_base", "log-probability, base").numbers("log_probability_tuned", "tuned")
    table = table.numbers("log_probability_change", "change", ends=("log_probability_change_low", "log_probability_change_high"), sign=True)
    table = table.numbers("log_probability_change_q", "q", digits=2)
    table = table.numbers("entropy_change", "entropy change", ends=("entropy_change_low", "entropy_change_high"), sign=True)
    table = table.numbers("kl_change", "KL change", ends=("kl_change_low", "kl_change_high"), sign=True)
    words = f"The {len(top)} of {len(change)} places whose log-probability of the next token changed most; bold: q < {Q_SIGNIFICANT}."
    return [Shown("Where the reading changed", table.view(), words)]
