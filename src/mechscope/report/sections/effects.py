"""Effects: what changing one place at a time does to a metric, from a sweep of patches or ablations."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import head_heatmap, position_heatmap
from mechscope.report.marks.tables import Shown
from mechscope.report.section import Section, Tables, optional, table
from mechscope.report.shared import (
    NORMALISED,
    WITHHELD,
    effect_columns,
    few_texts,
    largest_effect,
    largest_effects,
    withheld_shares,
)
from mechscope.report.statements import Card, Finding
from mechscope.report.theme import label

_TOOLTIP = {"effect": "effect", "low": "95\u202f% from", "high": "to", "normalised": "normalised", "q": "q", "n": "texts"}

EFFECTS = table(
    "One row per changed place.",
    **effect_columns(
        component="the changed place",
        site="z (a head's output), query, key, value, pattern, attention_output, mixer_output, mlp_output, neuron, expert_output, residual, embedding, "
        "latent",
    ),
    normalised=replace(NORMALISED, optional=True),
    withheld=replace(WITHHELD, optional=True),
    exact=optional("attribution only: the effect by exact patching, where it was checked", "of the metric"),
)


def _figures(tables: Tables) -> list[Figure]:
    """Draw layer × head where the sweep went over heads, layer × positions where it did not."""
    effects = tables["effects"]
    columns = {"effect": f"change of {effects['metric'].iloc[0]}"}
    if "normalised" in effects:
        columns["normalised"] = "0: as corrupt, 1: as clean"
    drawn: list[Figure] = []
    for site, part in effects[effects["layer"] >= 0].groupby("site", sort=False):
        for column, legend in columns.items():
            name, title = f"{column}-{str(site).replace('_', '-')}", f"{str(site).replace('_', ' ')}: {column}"
            if (part["head"] >= 0).all():
                drawn += _by_head(part, column, name=name, title=title, legend=legend, number=len(drawn))
            elif (part["feature"] < 0).all():
                drawn.append(position_heatmap(part, column, name=name, title=title, legend=legend, caption=_CAPTION))
    return drawn


_CAPTION = "Mean over texts; hover for the interval."


def _by_head(part: pd.DataFrame, column: str, *, name: str, title: str, legend: str, number: int) -> list[Figure]:
    several = part["positions"].nunique() > 1
    return [
        head_heatmap(
            own.drop(columns="positions"),
            column,
            name=f"{name}-{number + at}" if several else name,
            title=f"{title}, {positions}" if several else title,
            legend=legend,
            caption=_CAPTION,
            scale="change",
            tooltip={key: words for key, words in _TOOLTIP.items() if key in own},
            significance="q" if column == "effect" else None,
        )
        for at, (positions, own) in enumerate(part.groupby("positions", sort=False))
    ]


def _views(tables: Tables) -> list[Shown]:
    return [Shown("Largest effects", largest_effects(tables["effects"]), terminal=True)]


def _findings(tables: Tables) -> list[Finding]:
    top, size, differ, basis = largest_effect(tables, "effects")
    where = str(top["component"]) if top["positions"] == "all" else f"{top['component']} at {top['positions']}"
    return [
        Finding(
            f"The largest effect on {top['metric']} is {size}, of {label(where)}; {differ}",
            card=Card(label(top["component"]), "has the largest effect", f"{size} on {top['metric']}"),
            **basis,
        )
    ]


SECTION = Section(
    id="effects",
    heading="Effects",
    intro=(
        "What changing one place at a time does to the metric: the mean over texts of the changed run minus the unchanged run, with a 95\u202f% interval over "
        "texts; q is Benjamini–Hochberg over the table."
    ),
    tables={"effects": EFFECTS},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=lambda tables: [*withheld_shares(tables, "effects"), *few_texts(tables, "effects")],
)
