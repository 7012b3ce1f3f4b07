"""Causal tracing: at which layer and token restoring a clean value brings a blurred fact back."""

from __future__ import annotations

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import position_heatmap
from mechscope.report.marks.tables import Shown
from mechscope.report.section import Section, Tables, table
from mechscope.report.shared import (
    NORMALISED,
    WITHHELD,
    effect_columns,
    few_texts,
    largest_effect,
    largest_effects,
    share_of,
    withheld_shares,
)
from mechscope.report.statements import Card, Caveat, Finding
from mechscope.report.theme import label, percent
from mechscope.report.theme import number as written

TRACE = table(
    "One row per layer and role of a token.",
    **effect_columns(
        component="the restored place; with a window the layers around it too",
        site="residual, mlp_output, attention_output or mixer_output",
        positions="the role of the restored tokens: first, middle and last subject token, first subsequent token, further tokens, last token",
    ),
    normalised=NORMALISED,
    withheld=WITHHELD,
)


def _figures(tables: Tables) -> list[Figure]:
    trace = tables["trace"]
    caption = "0: nothing is restored; 1: the noise is undone. Mean over texts; hover for the interval of the effect."
    return [
        position_heatmap(
            part,
            "normalised",
            name=f"trace-{str(site).replace('_', '-')}",
            title=f"{str(site).replace('_', ' ')} restored",
            legend="share of what the noise took",
            caption=caption,
        )
        for site, part in trace.groupby("site", sort=False)
    ]


def _views(tables: Tables) -> list[Shown]:
    return [Shown("Largest effects of restoring", largest_effects(tables["trace"], "restored"), terminal=True)]


def _findings(tables: Tables) -> list[Finding]:
    top, size, differ, basis = largest_effect(tables, "trace")
    share = share_of(top, "normalised", "what the noise took")
    note = f"share withheld: {top['withheld']}" if top.get("withheld") else f"{percent(top['normalised'])} of what the noise took"
    return [
        Finding(
            f"With a blurred subject, restoring {label(top['component'])} at the {label(top['positions'])} changes {top['metric']} most: by "
            f"{size} to {written(top['value'])}, {share}; {differ}",
            card=Card(label(top["component"]), f"has the largest effect, restored at the {label(top['positions'])}", note),
            **basis,
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "Where a fact is recalled is not where it is best edited (Hase et al. 2023). Where noise takes little from the metric, shares are of little."
        ),
        *withheld_shares(tables, "trace"),
        *few_texts(tables, "trace"),
    ]


SECTION = Section(
    id="trace",
    heading="Causal tracing",
    intro=(
        "The embeddings of the subject's tokens are blurred with noise, so that the answer is lost; then clean values are restored at one layer and token at a "
        "time (Meng et al. 2022, “Locating and Editing Factual Associations in GPT”). The blurred run is the control: an effect is the restored run "
        "minus the blurred one on the same text and noise, the mean over draws of noise and texts, with a 95\u202f% interval over texts; q is "
        "Benjamini–Hochberg over the table."
    ),
    tables={"trace": TRACE},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
