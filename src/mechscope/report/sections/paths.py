"""Path patching: what heads and MLPs tell a receiver along the paths to it only."""

from __future__ import annotations

from mechscope.report.marks.curves import layer_curves
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import head_heatmap
from mechscope.report.marks.tables import Shown
from mechscope.report.section import Section, Tables, table
from mechscope.report.shared import (
    NORMALISED,
    WITHHELD,
    effect_columns,
    few_texts,
    largest_effect,
    largest_effects,
    withheld_shares,
)
from mechscope.report.statements import Card, Caveat, Finding
from mechscope.report.theme import label

PATHS = table(
    "One row per sender, or one for all senders together.",
    **effect_columns(
        component="the sender", site="z (a head's output), mlp_output; set where senders were patched together", positions="all"
    ),
    receivers="what the paths lead to",
    normalised=NORMALISED,
    withheld=WITHHELD,
)


def _figures(tables: Tables) -> list[Figure]:
    paths = tables["paths"]
    metric, receivers = paths["metric"].iloc[0], label(paths["receivers"].iloc[0])
    axis = f"change of {metric}"
    heads, mlps = paths[paths["site"] == "z"], paths[paths["site"] == "mlp_output"]
    drawn = []
    if len(heads):
        tooltip = {"effect": "effect", "low": "95\u202f% from", "high": "to", "normalised": "normalised", "q": "q", "n": "texts"}
        drawn.append(
            head_heatmap(
                heads,
                "effect",
                name="paths-heads",
                title=f"Paths from heads to {receivers}",
                legend=axis,
                caption="Mean over texts; hover for the interval.",
                scale="change",
                tooltip=tooltip,
                significance="q",
            )
        )
    if len(mlps):
        drawn.append(
            layer_curves(
                mlps.assign(effect_low=mlps["low"], effect_high=mlps["high"]),
                {"effect": "effect"},
                name="paths-mlps",
                title=f"Paths from MLPs to {receivers}",
                axis=axis,
                caption="Band: 95\u202f% interval over texts; zero is the unchanged run.",
                zero=True,
                counted_in="texts",
            )
        )
    return drawn


def _views(tables: Tables) -> list[Shown]:
    return [Shown("Senders with the largest effects", largest_effects(tables["paths"], "sender"), terminal=True)]


def _findings(tables: Tables) -> list[Finding]:
    top, size, differ, basis = largest_effect(tables, "paths")
    return [
        Finding(
            f"Patching the paths to {label(top['receivers'])} from one sender at a time changes {top['metric']} most for {label(top['component'])}: by "
            f"{size}; {differ}",
            card=Card(
                label(top["component"]),
                f"has the largest effect by way of {label(top['receivers'])}",
                f"{size} on {top['metric']}",
            ),
            **basis,
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [*withheld_shares(tables, "paths"), *few_texts(tables, "paths")]


SECTION = Section(
    id="paths",
    heading="Path patching",
    intro=(
        "A sender takes its value from the other run, and only what that changes in the receivers' inputs is kept: the rest of the run stays as it was up to "
        "the receivers and is computed anew behind them (Wang et al. 2022, “Interpretability in the Wild”; Goldowsky-Dill et al. 2023). Each effect is "
        "the patched run minus the unpatched one on the same text, the mean over texts with a 95\u202f% interval; q is Benjamini–Hochberg over the table. The "
        "other senders are the control."
    ),
    tables={"paths": PATHS},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
