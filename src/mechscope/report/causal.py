"""Figures and tables of interventions: single sweeps, who carries the gain of fine-tuning, and what ablating the selected heads costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pandas as pd

from mechscope.report.curves import layer_curves
from mechscope.report.figure import Figure
from mechscope.report.heatmaps import head_heatmap, position_heatmap
from mechscope.report.theme import interval, number, percent
from mechscope.report.views import Cell, View, value, words

_INTO = {"into_base": "carried alone", "into_tuned": "lost without"}
_TOP = 40
_SWEEP_TOOLTIP = {
    "effect": "effect",
    "low": "95 % from",
    "high": "to",
    "normalised": "normalised",
    "q": "q",
    "n": "texts",
}
_TOOLTIP = {
    "normalised": "share of the gain",
    "normalised_low": "95 % from",
    "normalised_high": "to",
    "effect": "change of loss, nats per token",
    "low": "95 % from",
    "high": "to",
    "n": "documents",
}


def matters(tables: Mapping[str, pd.DataFrame], layers: Collection[int], heads: Collection[tuple[int, int]]) -> list[Figure]:
    """Return the figures of cross-model patching.

    Args:
        tables: The run's tables.
        layers: Selected layers, to be shaded.
        heads: Selected heads, to be outlined.
    """
    cross = tables.get("cross_model")
    if cross is None:
        return []
    drawn = [
        _by_layer(
            cross[(cross["by"] == by) & (cross["site"] == "layer")],
            layers,
            name=f"gain-by-layer-{by}",
            title=f"Who carries the gain: {by} of whole layers",
            caption=f"A layer's {by} exchanged between the models, as a share of the whole change in loss: tuned into base (carried alone) and base "
            "into tuned (lost without). Shares need not add up to one.",
        )
        for by in ("activations", "weights")
        if ((cross["by"] == by) & (cross["site"] == "layer")).any()
    ]
    for into, words_ in _INTO.items():
        part = cross[(cross["by"] == "activations") & (cross["site"] == "z") & (cross["into"] == into)]
        if len(part):
            drawn.append(
                head_heatmap(
                    part.drop(columns="positions", errors="ignore"),
                    "normalised",
                    name=f"gain-by-head-{into.replace('_', '-')}",
                    title=f"Heads: gain {words_}",
                    legend="share of the gain (orange: for it)",
                    caption="Each head's output (z) exchanged between the models on the same documents.",
                    scale="change",
                    selected=heads,
                    tooltip=_TOOLTIP,
                )
            )
    return drawn


def _by_layer(part: pd.DataFrame, layers: Collection[int], *, name: str, title: str, caption: str) -> Figure:
    wide = part[["layer", "n"]].drop_duplicates("layer").sort_values("layer")
    columns = {}
    for into, words_ in _INTO.items():
        own = part[part["into"] == into].set_index("layer")
        for end in ("", "_low", "_high"):
            wide[f"{into}{end}"] = wide["layer"].map(own[f"normalised{end}"])
        columns[into] = words_
    return layer_curves(
        wide, columns, name=name, title=title, axis="share of the gain", caption=caption, selected=sorted(layers), zero=True, share=True
    )


def effects_figures(tables: Mapping[str, pd.DataFrame]) -> list[Figure]:
    """Return the figures of one sweep: layer × head where it went over heads, layer × positions where it did not."""
    effects = tables.get("effects")
    if effects is None:
        return []
    drawn: list[Figure] = []
    columns = {"effect": f"change of {effects['metric'].iloc[0]}"}
    if "normalised" in effects:
        columns["normalised"] = "0: as corrupt, 1: as clean"
    for site, part in effects[effects["layer"] >= 0].groupby("site", sort=False):
        for column, legend in columns.items():
            name, title = f"{column}-{str(site).replace('_', '-')}", f"{str(site).replace('_', ' ')}: {column}"
            caption = "Mean over texts; hover for the interval."
            if (part["head"] >= 0).all():
                for label_, own in part.groupby("positions", sort=False):
                    several = part["positions"].nunique() > 1
                    tooltip = {key: words_ for key, words_ in _SWEEP_TOOLTIP.items() if key in own}
                    drawn.append(
                        head_heatmap(
                            own.drop(columns="positions"),
                            column,
                            name=f"{name}-{len(drawn)}" if several else name,
                            title=f"{title}, {label_}" if several else title,
                            legend=legend,
                            caption=caption,
                            scale="change",
                            tooltip=tooltip,
                            significance="q" if column == "effect" else None,
                        )
                    )
            elif (part["feature"] < 0).all():
                drawn.append(position_heatmap(part, column, name=name, title=title, legend=legend, caption=caption))
    return drawn


def effects_view(effects: pd.DataFrame) -> View:
    """Return the largest effects of a sweep, as a table."""
    top = effects.reindex(effects["effect"].abs().sort_values(ascending=False, kind="stable").index).head(_TOP)
    normalised = "normalised" in effects
    rows = tuple(
        (
            words(row["component"]),
            words(row["positions"]),
            value(row["effect"], note=interval(row["low"], row["high"], sign=True), sign=True),
            *((value(row["normalised"], note=interval(row["normalised_low"], row["normalised_high"])),) if normalised else ()),
            value(row["q"]),
            value(row["n"]),
        )
        for row in top.to_dict("records")
    )
    return View(("component", "positions", "effect", *(("normalised",) if normalised else ()), "q", "texts"), rows)


def ablation_view(ablation: pd.DataFrame) -> View:
    """Return what ablating the selected heads costs beside random sets, as a table."""
    chosen = ablation[ablation["kind"] == "selected"].iloc[0]
    random = ablation.loc[ablation["kind"] == "random", "effect"]
    rows = [
        (
            words("selected heads"),
            value(chosen["effect"], note=interval(chosen["low"], chosen["high"], sign=True), sign=True),
            Cell(number(chosen["p_random"])),
        )
    ]
    if len(random):
        low, high = random.quantile([0.025, 0.975])
        rows.append(
            (
                words(f"{len(random)} random sets, same layers"),
                value(random.mean(), note=f"95 % of them {interval(low, high, sign=True)}", sign=True),
                Cell(""),
            )
        )
    return View(("ablated in the tuned model", "cost, nats per token", "p against random"), tuple(rows))


def importance_view(importance: pd.DataFrame) -> View:
    """Return the rank correlations of change and importance, as a table."""
    rows = tuple(
        (
            words(f"{row['level']}s, {row['by']}, {_INTO.get(str(row['into']), row['into'])}"),
            value(row["rho"], note=interval(row["low"], row["high"], sign=True), sign=True),
            value(row["p"]),
            value(row["n"]),
        )
        for row in importance.to_dict("records")
    )
    return View(("attention KL against the gain", "rank correlation", "p", "parts"), rows)


def sets_sentence(sets: pd.DataFrame | None) -> str:
    """Say what the selected layers carry together beside other sets of as many layers."""
    if sets is None or not sets["selected"].any():
        return ""
    row, others = sets[sets["selected"]].iloc[0], sets.loc[~sets["selected"], "share"]
    beside = f"; {len(others)} other sets of as many layers carry {percent(others.min())} to {percent(others.max())}" if len(others) else ""
    return f"Together the selected {row['component']} carry {percent(row['share'])} of the gain{beside}."
