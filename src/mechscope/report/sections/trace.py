"""Causal tracing: at which layer and token restoring a clean value brings a blurred fact back."""

from __future__ import annotations

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import position_heatmap
from mechscope.report.marks.tables import Shown, strongest
from mechscope.report.section import Card, Section, Tables, table
from mechscope.report.shared import (
    NORMALISED,
    WITHHELD,
    differ_from_zero,
    effect_columns,
    few_texts,
    largest_effects,
    share_of,
    withheld_shares,
)
from mechscope.report.theme import interval, label, percent
from mechscope.report.theme import number as written

TRACE = table(
    "One row per layer and role of a token.",
    **effect_columns(
        component="the restored place; with a window the layers around it too",
        site="residual, mlp_output or attention_output",
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


def _findings(tables: Tables) -> list[str]:
    trace = tables["trace"]
    top = strongest(trace, "effect", 1).iloc[0]
    blurred = top["value"] - top["effect"]
    share = share_of(top, "normalised", "what the noise took")
    return [
        f"Restoring {label(top['component'])} at the {label(top['positions'])} changes {top['metric']} most, from {written(blurred)} with a blurred subject to "
        f"{written(top['value'])}: {written(top['effect'], sign=True)} {interval(top['low'], top['high'], sign=True)}, {share} "
        f"(n = {written(int(top['n']))} texts); {differ_from_zero(trace)}."
    ]


def _cards(tables: Tables) -> list[Card]:
    top = strongest(tables["trace"], "effect", 1).iloc[0]
    return [
        Card(
            f"{label(top['component'])}",
            f"has the largest effect, restored at the {label(top['positions'])}",
            f"share withheld: {top['withheld']}" if top.get("withheld") else f"{percent(top['normalised'])} of what the noise took",
        )
    ]


def _caveats(tables: Tables) -> list[str]:
    return [
        "Where a fact is recalled is not where it is best edited (Hase et al. 2023). Where noise takes little from the metric, shares are of little.",
        *withheld_shares(tables["trace"]),
        *few_texts(tables, "trace"),
    ]


SECTION = Section(
    id="trace",
    heading="Causal tracing",
    intro=(
        "The embeddings of the subject's tokens are blurred with noise, so that the answer is lost; then clean values are restored at one layer and token at a "
        "time (Meng et al. 2022, “Locating and Editing Factual Associations in GPT”). The blurred run is the control: an effect is the restored run "
        "minus the blurred one on the same text and noise, the mean over draws of noise and texts, with a 95 % interval over texts; q is "
        "Benjamini–Hochberg over the table."
    ),
    tables={"trace": TRACE},
    figures=_figures,
    views=_views,
    findings=_findings,
    cards=_cards,
    caveats=_caveats,
)
