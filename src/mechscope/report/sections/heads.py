"""Attention heads: what fine-tuning did to each head's attention, output and weights."""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import Q_SIGNIFICANT, Scale, head_heatmap
from mechscope.report.marks.tables import Row, Shown, Table, View, kinds, value, words
from mechscope.report.section import Card, Section, Tables, number, optional, table
from mechscope.report.shared import NO_CAUSE, THIS_PAIR, UNEQUAL_LENGTHS, chosen_heads, few_documents, of_rows
from mechscope.report.theme import number as written
from mechscope.report.theme import percent

TOP_HEADS = 20
"""Heads in the table, per kind of query rows."""

HEADS = table(
    "One row per kind of query rows, layer and head; means over documents.",
    rows="query rows that were averaged: all, document, summary",
    layer="layer",
    head="head",
    component="the head, such as a3.h5",
    n="documents",
    entropy_base=number("attention entropy of the base model", "nats"),
    entropy_tuned=number("attention entropy of the tuned model", "nats"),
    entropy_change=number("tuned − base", "nats", "se", "low", "high", "p", "q"),
    relative_entropy_base=number("entropy over its maximum, the logarithm of the number of visible tokens; base model", "share"),
    relative_entropy_tuned=number("the same of the tuned model", "share"),
    kl_base_tuned=number("KL(base ‖ tuned) of the attention rows", "nats", "se"),
    kl_tuned_base=number("KL(tuned ‖ base) of the attention rows", "nats", "se"),
    distance_base=number("mean distance between a token and what it attends to, base model", "tokens"),
    distance_tuned=number("the same of the tuned model", "tokens"),
    sink_base=number("attention on the first token, base model", "share"),
    sink_tuned=number("the same of the tuned model", "share"),
    z_cosine_distance=number("1 − cosine of the two models' z, the head's output before the output projection"),
    gini_base=optional("Gini coefficient of the attention rows, base model", "share"),
    gini_tuned=optional("the same of the tuned model", "share"),
    weight_change=number("norm of the change of the head's slices of query, key, value and output projection, over their norm"),
)

# what a reader is told about the head under the pointer, in every heatmap of heads
_TOOLTIP = {
    "kl_base_tuned": "KL(base || tuned), nats",
    "kl_base_tuned_se": "its standard error",
    "kl_tuned_base": "KL(tuned || base), nats",
    "entropy_base": "entropy, base, nats",
    "entropy_tuned": "entropy, tuned, nats",
    "entropy_change": "entropy change, nats",
    "entropy_change_low": "95 % from",
    "entropy_change_high": "to",
    "entropy_change_q": "q",
    "distance_change": "distance change, tokens",
    "sink_change": "first-token mass, change",
    "z_cosine_distance": "1 − cosine of z",
    "weight_change": "weight change, relative",
    "n": "documents",
}


def _with_changes(heads: pd.DataFrame) -> pd.DataFrame:
    return heads.assign(
        distance_change=heads["distance_tuned"] - heads["distance_base"], sink_change=heads["sink_tuned"] - heads["sink_base"]
    )


def _figures(tables: Tables) -> list[Figure]:
    heads, selected = _with_changes(tables["heads"]), chosen_heads(tables)

    def heatmap(
        column: str, name: str, title: str, legend: str, caption: str, *, scale: Scale = "magnitude", significance: str | None = None
    ) -> Figure:
        return head_heatmap(
            heads, column, name=name, title=title, legend=legend, caption=caption, scale=scale, selected=selected,
            tooltip=_TOOLTIP, significance=significance,
        )  # fmt: skip

    return [
        heatmap(
            *("kl_base_tuned", "attention-kl", "How far attention moved", "KL(base || tuned), nats, √ scale"),
            "Mean over documents of the divergence between the two models' attention rows, per head.",
        ),
        heatmap(
            *("entropy_change", "entropy-change", "Which heads became more focused", "entropy change, nats (blue: more focused)"),
            "Attention entropy, tuned minus base.",
            scale="change",
            significance="entropy_change_q",
        ),
        heatmap(
            *("z_cosine_distance", "head-output-change", "How far head outputs turned", "1 − cosine of z, √ scale"),
            "Direction of each head's output before the output projection, base against tuned.",
        ),
        heatmap(
            *("sink_change", "first-token-change", "Change of attention on the first token", "share of attention, tuned − base"),
            "The first token is where heads with nothing to do put their attention.",
            scale="change",
        ),
        heatmap(
            *("distance_change", "distance-change", "Change of how far back heads look", "tokens, tuned − base"),
            "Mean distance between a token and what it attends to.",
            scale="change",
        ),
        heatmap(
            *("weight_change", "head-weight-change", "How far each head's own weights moved", "relative norm, √ scale"),
            "Change of the head's slices of query, key, value and output projection.",
        ),
    ]


def _views(tables: Tables) -> list[Shown]:
    heads, selected = _with_changes(tables["heads"]), set(chosen_heads(tables))
    shown = []
    for kind in kinds(heads):
        top = heads[heads["rows"] == kind].sort_values("kl_base_tuned", ascending=False, kind="stable").head(TOP_HEADS)
        caption = (
            f"The {len(top)} heads with the largest KL(base || tuned). Distance, first token (attention mass on it) and entropy change are tuned minus base. "
            f"Bold heads are selected; a bold change is significant at q < {Q_SIGNIFICANT}."
        )
        shown.append(Shown("Heads that changed most", _top(top, kind, selected), caption))
    return shown


def _top(heads: pd.DataFrame, kind: str, selected: Collection[tuple[int, int]]) -> View:
    def head(row: Row) -> bool:
        return (row["layer"], row["head"]) in selected

    view = Table(heads)
    # sorted by place: a10.h2 comes after a9.h11
    view.cells("component", "head", lambda row: words(row["component"], sort=float(row["layer"] * 10**6 + row["head"]), strong=head(row)))
    view.cells(
        *("kl_base_tuned", "KL(base||tuned)"),
        lambda row: value(row["kl_base_tuned"], note=f"± {written(row['kl_base_tuned_se'], digits=2)}"),
    )
    view.numbers("kl_tuned_base", "KL(tuned||base)").numbers("entropy_base", "entropy base").numbers("entropy_tuned", "tuned")
    ends = ("entropy_change_low", "entropy_change_high")
    view.numbers("entropy_change", "change", ends=ends, sign=True, bold="entropy_change_q")
    view.numbers("entropy_change_q", "q", digits=2, bold="entropy_change_q")
    view.numbers("distance_change", "distance", sign=True).numbers("sink_change", "first token", sign=True)
    return view.numbers("z_cosine_distance", "1 − cos z").numbers("weight_change", "ΔW").view(kind)


def _significant(tables: Tables) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Return the heads over all tokens, those whose entropy changed significantly, and how many of these became more focused."""
    heads, _ = of_rows(tables["heads"])
    significant = heads[heads["entropy_change_q"] < Q_SIGNIFICANT]
    return heads, significant, int((significant["entropy_change"] < 0).sum())


def _findings(tables: Tables) -> list[str]:
    heads, significant, focused = _significant(tables)
    over = f"over {written(int(heads['n'].max()))} documents"
    if significant.empty:
        return [f"None of the {len(heads)} heads changed its attention entropy significantly (q < {Q_SIGNIFICANT}, {over})."]
    lower = percent((heads["entropy_change"] < 0).mean())
    return [
        f"{written(len(significant))} of {written(len(heads))} heads changed their attention entropy (q < {Q_SIGNIFICANT}, {over}): "
        f"{written(focused)} became more focused, {written(len(significant) - focused)} more diffuse. "
        f"Counting heads regardless of significance, {lower} have lower entropy after fine-tuning."
    ]


def _cards(tables: Tables) -> list[Card]:
    heads, significant, focused = _significant(tables)
    note = f"{written(focused)} more focused, {written(len(significant) - focused)} more diffuse (q < {Q_SIGNIFICANT})"
    return [Card(f"{written(len(significant))} of {written(len(heads))}", "heads changed their entropy", note)]


def _caveats(tables: Tables) -> list[str]:
    return [*few_documents(tables), NO_CAUSE, UNEQUAL_LENGTHS, THIS_PAIR]


SECTION = Section(
    id="heads",
    heading="Attention heads",
    intro="Each cell is one attention head. Hover over a cell for its numbers; the menu at a chart's corner saves it.",
    tables={"heads": HEADS},
    figures=_figures,
    views=_views,
    findings=_findings,
    cards=_cards,
    caveats=_caveats,
    adds="mechscope diff BASE TUNED --data DATA --out NEW_RUN",
)
