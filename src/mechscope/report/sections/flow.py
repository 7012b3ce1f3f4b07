"""Attention flow: between which segments of a text, and in which layers, attention carries what the answer needs."""

from __future__ import annotations

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import position_heatmap
from mechscope.report.marks.tables import Shown
from mechscope.report.section import Section, Tables, table
from mechscope.report.shared import effect_columns, few_texts, largest_effect, largest_effects, layers_in_words
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import label

FLOW = table(
    "One row per window of layers and ordered pair of segments whose attention was cut.",
    **effect_columns(
        component="the layers that were cut together, layers:2-4",
        site="knockout",
        positions="query → key: the segment that could not look, and the one it did not see",
    ),
)


def _figures(tables: Tables) -> list[Figure]:
    flow = tables["flow"]
    metric = flow["metric"].iloc[0]
    return [
        position_heatmap(
            flow,
            "effect",
            name="flow",
            title="Attention cut between segments",
            legend=f"change of {metric}",
            caption="Across: query → key. Down: the window's centre. Mean over texts; hover for the interval.",
        )
    ]


def _views(tables: Tables) -> list[Shown]:
    return [Shown("Largest effects of a cut", largest_effects(tables["flow"], "layers"), terminal=True)]


def _findings(tables: Tables) -> list[Finding]:
    top, size, differ, basis = largest_effect(tables, "flow")
    ways = Derived("flow", (), "positions", "distinct")
    return [
        Finding(
            f"Of {ways.written(tables)} ways between segments the largest effect has {label(top['positions'])} in {layers_in_words(top['component'])}: cut, it "
            f"changes {top['metric']} by {size}; {differ}",
            card=Card(label(top["positions"]), "the cut that changes most", f"{size} on {top['metric']}"),
            **{**basis, "derived": (*basis["derived"], ways)},
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "Ways between segments in which no text has anything to cut are left out; a text counts where there is something to cut, so n can differ."
        ),
        *few_texts(tables, "flow"),
    ]


SECTION = Section(
    id="flow",
    heading="Attention flow",
    intro=(
        "Attention from every segment to every segment that it can see is cut, one window of layers at a time, in the clean run: the way that information "
        "takes through the text (the knockout of Geva et al. 2023, for all pairs of segments). Each effect is the cut run minus the whole model on the "
        "same text, the mean over texts with a 95\u202f% interval; q is Benjamini–Hochberg over the table. Ways that the task does not need are the control "
        "of the one that it does."
    ),
    tables={"flow": FLOW},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
