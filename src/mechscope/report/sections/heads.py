"""Attention heads: what fine-tuning did to each head's attention, output and weights."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pandas as pd

from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import Scale, head_heatmap
from mechscope.report.marks.tables import Cell, Row, Shown, Table, View, kinds, value, words
from mechscope.report.section import Card, Section, Tables, number, optional, table
from mechscope.report.shared import NO_CAUSE, THIS_PAIR, UNEQUAL_LENGTHS, chosen_heads, estimated, few_documents, of_rows
from mechscope.report.theme import number as written
from mechscope.report.verdicts import FEWEST, VERDICT, counted, in_words, largest, smallest_of

TOP_HEADS = 20
"""Heads in the table, per kind of query rows."""

_SURE = ("se", "low", "high")
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
    write_change=number(
        "change of what the head writes (z W_O) on the same input, the base's residual stream: its norm over the norm of what the base's head writes",
        "share",
        *_SURE,
    ),
    write_change_n="documents on which tuned blocks also ran on the base's residual stream",
    write_change_own=number("the same, each model on its own residual stream, so with what changed further up", "share", *_SURE),
    write_change_own_n="documents of that",
    gini_base=optional("Gini coefficient of the attention rows, base model", "share"),
    gini_tuned=optional("the same of the tuned model", "share"),
    weight_change=number("norm of the change of the head's slices of query, key, value and output projection, over their norm"),
    entropy_change_verdict=VERDICT,
    kl_base_tuned_verdict=VERDICT,
    write_change_verdict=VERDICT,
)
SMALLEST = table(
    "One row per quantity on which verdicts are given.",
    table="the table it is a column of: heads, layers, outputs",
    quantity="the column",
    smallest=number(
        "smallest effect of interest: a change must be larger to be called one, and smaller to be called negligible", "of the quantity"
    ),
    unit="its unit",
    source="where it is from: set, or the precision floor",
    floor=number(
        "what the base model differs from itself by in another precision, at the worst head or layer and kind of rows", "of the quantity"
    ),
    n="documents behind the floor",
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
    "write_change": "change of what it writes, share",
    "write_change_own": "the same on its own input",
    "z_cosine_distance": "1 − cosine of z",
    "weight_change": "weight change, relative",
    "n": "documents",
}


_SMALLEST = (
    "What must be exceeded for a verdict of changed, and stayed below for one of negligible; both at a false-discovery rate of 5 % over all heads or "
    "layers, from the 95 % interval over documents."
)


def _with_changes(heads: pd.DataFrame) -> pd.DataFrame:
    return heads.assign(
        distance_change=heads["distance_tuned"] - heads["distance_base"], sink_change=heads["sink_tuned"] - heads["sink_base"]
    )


def _figures(tables: Tables) -> list[Figure]:
    if "heads" not in tables:
        return []
    heads, selected = _with_changes(tables["heads"]), chosen_heads(tables)

    def heatmap(
        column: str, name: str, title: str, legend: str, caption: str, *, scale: Scale = "magnitude", verdict: str | None = None
    ) -> Figure:
        return head_heatmap(
            heads, column, name=name, title=title, legend=legend, caption=caption, scale=scale, selected=selected,
            tooltip=_TOOLTIP, verdict=verdict,
        )  # fmt: skip

    return [
        heatmap(
            *("write_change", "write-change", "How much of what a head writes changed", "share of what the base's head writes, √ scale"),
            "Change of what each head writes into the residual stream, both models given the base's residual stream.",
        ),
        heatmap(
            *("kl_base_tuned", "attention-kl", "How far attention moved", "KL(base || tuned), nats, √ scale"),
            "Mean over documents of the divergence between the two models' attention rows, per head.",
        ),
        heatmap(
            *("entropy_change", "entropy-change", "Which heads became more focused", "entropy change, nats (blue: more focused)"),
            "Attention entropy, tuned minus base.",
            scale="change",
            verdict="entropy_change_verdict",
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
    if "heads" not in tables:
        return []
    heads, selected = _with_changes(tables["heads"]), set(chosen_heads(tables))
    shown = []
    for kind in kinds(heads):
        top = heads[heads["rows"] == kind].sort_values("write_change", ascending=False, kind="stable").head(TOP_HEADS)
        caption = (
            f"The {len(top)} heads with the largest change of what they write, on the same input. Distance, first token (attention mass on "
            "it) and entropy change are tuned minus base. "
            f"Bold heads are selected; a bold number changed by more than the smallest effect of interest."
        )
        shown.append(Shown("Heads that changed most", _top(top, kind, selected), caption))
    if "smallest_effects" in tables:
        shown.append(Shown("Smallest effects of interest", _smallest(tables["smallest_effects"]), _SMALLEST))
    return shown


def _smallest(effects: pd.DataFrame) -> View:
    view = Table(effects).words("table", "table").words("quantity", "quantity").numbers("smallest", "smallest effect", digits=2)
    return view.words("unit", "unit").numbers("floor", "precision floor", digits=2).words("source", "from").view()


def _top(heads: pd.DataFrame, kind: str, selected: Collection[tuple[int, int]]) -> View:
    def head(row: Row) -> bool:
        return (row["layer"], row["head"]) in selected

    view = Table(heads)
    # sorted by place: a10.h2 comes after a9.h11
    view.cells("component", "head", lambda row: words(row["component"], sort=float(row["layer"] * 10**6 + row["head"]), strong=head(row)))

    def sized(quantity: str, *, sign: bool = False) -> Callable[[Row], Cell]:
        strong = f"{quantity}_verdict"
        return lambda row: value(
            row[quantity], note=f"± {written(row[f'{quantity}_se'], digits=2)}", sign=sign, strong=row[strong] == "changed"
        )

    view.cells("write_change", "writes", sized("write_change")).numbers("write_change_own", "on own input")
    view.cells("kl_base_tuned", "KL(base||tuned)", sized("kl_base_tuned"))
    view.numbers("kl_tuned_base", "KL(tuned||base)").numbers("entropy_base", "entropy base").numbers("entropy_tuned", "tuned")
    view.cells("entropy_change", "change", sized("entropy_change", sign=True)).numbers("entropy_change_q", "q", digits=2)
    view.numbers("distance_change", "distance", sign=True).numbers("sink_change", "first token", sign=True)
    return view.numbers("z_cosine_distance", "1 − cos z").numbers("weight_change", "ΔW").view(kind)


def _findings(tables: Tables) -> list[str]:
    if "heads" not in tables:
        return []
    heads, _ = of_rows(tables["heads"])
    delta = smallest_of(tables, "heads", "write_change")
    writes = in_words(heads, "write_change", delta, of="heads", what="changed what they write on the same input", unit="of it")
    first = largest(heads, "write_change")
    most = f"the largest is {first['component']} with {estimated(first, 'write_change')} (n = {written(int(first['write_change_n']))} documents)"
    over = f"over {written(int(heads['n'].max()))} documents"
    delta = smallest_of(tables, "heads", "entropy_change")
    entropy = in_words(heads, "entropy_change", delta, of="heads", what="changed their attention entropy", unit="nats")
    changed = heads[heads["entropy_change_verdict"] == "changed"]
    focused = int((changed["entropy_change"] < 0).sum())
    sides = (
        f"; of those that changed {written(focused)} became more focused, {written(len(changed) - focused)} more diffuse"
        if len(changed)
        else ""
    )
    return [f"{writes}; {most}.", f"{entropy.removesuffix('.')}{sides} ({over})."]


def _cards(tables: Tables) -> list[Card]:
    if "heads" not in tables:
        return []
    heads, _ = of_rows(tables["heads"])
    found, smallest = counted(heads, "write_change"), smallest_of(tables, "heads", "write_change")
    if found["not measured"] == len(heads) or int(heads["write_change_n"].max()) < FEWEST:
        return []
    note = f"by more than {written(smallest, digits=2)} of it; {written(found['negligible'])} negligible, {written(found['undecided'])} undecided"
    return [Card(f"{written(found['changed'])} of {written(len(heads))}", "heads changed what they write", note)]


def _caveats(tables: Tables) -> list[str]:
    return [*few_documents(tables), NO_CAUSE, UNEQUAL_LENGTHS, THIS_PAIR]


SECTION = Section(
    id="heads",
    heading="Attention heads",
    intro="Each cell is one attention head. Hover over a cell for its numbers; the menu at a chart's corner saves it.",
    tables={"heads": HEADS, "smallest_effects": SMALLEST},
    figures=_figures,
    views=_views,
    findings=_findings,
    cards=_cards,
    caveats=_caveats,
    adds="mechscope diff BASE TUNED --data DATA --out NEW_RUN",
)
