"""Attention knockout: what the answer loses when some tokens cannot see others."""

from __future__ import annotations

from mechscope.report.marks.curves import layer_curves
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import head_heatmap
from mechscope.report.marks.tables import Shown
from mechscope.report.section import Section, Tables, table
from mechscope.report.shared import effect_columns, few_texts, largest_effect, largest_effects, layers_in_words
from mechscope.report.statements import Card, Caveat, Finding
from mechscope.report.theme import label
from mechscope.report.theme import number as written

KNOCKOUT = table(
    "One row per window of layers, or per head, whose attention was cut.",
    **effect_columns(
        component="the layers that were cut together, layers:2-4, or the head",
        site="knockout",
        positions="query → key: the tokens that could not look, and those they did not see",
    ),
)


def _figures(tables: Tables) -> list[Figure]:
    cut = tables["knockout"]
    metric, where = cut["metric"].iloc[0], cut["positions"].iloc[0]
    title, axis = f"Attention {label(where)} cut", f"change of {metric}"
    if (cut["head"] >= 0).all():
        tooltip = {"effect": "effect", "low": "95\u202f% from", "high": "to", "q": "q", "n": "texts"}
        caption = "Mean over texts; hover for the interval."
        return [
            head_heatmap(
                cut, "effect", name="knockout", title=title, legend=axis, caption=caption, scale="change", tooltip=tooltip, significance="q"
            )
        ]
    ends = cut.assign(effect_low=cut["low"], effect_high=cut["high"])
    caption = "Each point: attention cut in a window around that layer. Band: 95\u202f% interval over texts; zero is the whole model."
    return [
        layer_curves(ends, {"effect": "effect"}, name="knockout", title=title, axis=axis, caption=caption, zero=True, counted_in="texts")
    ]


def _views(tables: Tables) -> list[Shown]:
    return [Shown("Largest effects of a cut", largest_effects(tables["knockout"], "what was cut"), terminal=True)]


def _findings(tables: Tables) -> list[Finding]:
    top, size, differ, basis = largest_effect(tables, "knockout")
    return [
        Finding(
            f"Cutting attention {label(top['positions'])} changes {top['metric']} most in {layers_in_words(top['component'])}: by "
            f"{size} to {written(top['value'])}; {differ}",
            card=Card(
                layers_in_words(top["component"]),
                "where a cut changes most",
                f"{size} on {top['metric']}",
            ),
            **basis,
        )
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [
        Caveat(
            "What a cut takes away can reach the queries by way of other tokens or other layers: no effect does not mean that nothing was read there."
        ),
        *few_texts(tables, "knockout"),
    ]


SECTION = Section(
    id="knockout",
    heading="Attention knockout",
    intro=(
        "Attention from query tokens to key tokens is cut (those scores become −∞, the rest is renormalised) in a window of layers, or in one head, of the "
        "clean run: what the metric loses, those tokens read there (Geva et al. 2023, “Dissecting Recall of Factual Associations in Auto-Regressive "
        "Language Models”). Each effect is the cut run minus the whole model on the same text, the mean over texts with a 95\u202f% interval; q is "
        "Benjamini–Hochberg over the table."
    ),
    tables={"knockout": KNOCKOUT},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
