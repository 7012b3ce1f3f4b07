"""Attention heads: what fine-tuning did to each head's attention, output and weights."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pandas as pd

from mechscope.report.beside import Beside
from mechscope.report.marks.control_maps import head_maps_beside
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.heatmaps import Scale, head_heatmap
from mechscope.report.marks.tables import Cell, Row, Shown, Table, View, kinds, value, words
from mechscope.report.section import Column, Section, Tables, number, optional, table
from mechscope.report.shared import NO_CAUSE, NO_DOCUMENTS, THIS_PAIR, UNEQUAL_LENGTHS, chosen_heads, count_of, counted_in, few_documents
from mechscope.report.statements import Caveat, Finding
from mechscope.report.theme import number as written
from mechscope.report.verdicts import VERDICT, negligible, parts_finding

_JUDGED = ("write_change", "kl_base_tuned", "entropy_change")
TOP_HEADS = 20
"""Heads in the table, per kind of query rows."""

_SURE = ("se", "low", "high")
COLUMNS: dict[str, Column | str] = {
    "rows": "query rows that were averaged: all, document, summary",
    "layer": "layer",
    "head": "head",
    "component": "the head, such as a3.h5",
    "n": "documents",
    "entropy_base": number("attention entropy of the base model", "nats"),
    "entropy_tuned": number("attention entropy of the tuned model", "nats"),
    "entropy_change": number("tuned − base", "nats", "se", "low", "high", "p", "q"),
    "relative_entropy_base": number("entropy over its maximum, the logarithm of the number of visible tokens; base model", "share"),
    "relative_entropy_tuned": number("the same of the tuned model", "share"),
    "kl_base_tuned": number("KL(base ‖ tuned) of the attention rows", "nats", "se"),
    "kl_tuned_base": number("KL(tuned ‖ base) of the attention rows", "nats", "se"),
    "distance_base": number("mean distance between a token and what it attends to, base model", "tokens"),
    "distance_tuned": number("the same of the tuned model", "tokens"),
    "sink_base": number("attention on the first token, base model", "share"),
    "sink_tuned": number("the same of the tuned model", "share"),
    "z_cosine_distance": number("1 − cosine of the two models' z, the head's output before the output projection"),
    "write_change": number(
        "change of what the head writes (z W_O) on the same input, the base's residual stream: its norm over the norm of what the base's head writes",
        "share",
        *_SURE,
    ),
    "write_change_n": "documents on which tuned blocks also ran on the base's residual stream",
    "write_change_own": number("the same, each model on its own residual stream, so with what changed further up", "share", *_SURE),
    "write_change_own_n": "documents of that",
    "gini_base": optional("Gini coefficient of the attention rows, base model", "share"),
    "gini_tuned": optional("the same of the tuned model", "share"),
    "weight_change": number("norm of the change of the head's slices of query, key, value and output projection, over their norm"),
    "entropy_change_verdict": VERDICT,
    "kl_base_tuned_verdict": VERDICT,
    "write_change_verdict": VERDICT,
}
"""Columns of the table `heads`, which `control_heads` has as well."""
HEADS = table("One row per kind of query rows, layer and head; means over documents.", **COLUMNS)
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

# what a reader is told about the head under the pointer, in every heatmap of heads; beside controls without what says how sure it is
_BESIDE = {
    "kl_base_tuned": "KL(base || tuned), nats",
    "kl_tuned_base": "KL(tuned || base), nats",
    "entropy_base": "entropy, base, nats",
    "entropy_tuned": "entropy, tuned, nats",
    "entropy_change": "entropy change, nats",
    "distance_change": "distance change, tokens",
    "sink_change": "first-token mass, change",
    "write_change": "change of what it writes, share",
    "write_change_own": "the same on its own input",
    "z_cosine_distance": "1 − cosine of z",
    "weight_change": "weight change, relative",
    "n": "documents",
}
_TOOLTIP = {
    **_BESIDE,
    "kl_base_tuned_se": "standard error of KL(base || tuned)",
    "entropy_change_low": "entropy change, 95\u202f% from",
    "entropy_change_high": "to",
    "entropy_change_q": "q of the entropy change",
}
_PLACES = ("rows", "layer", "head", "component")
# negligible heads in the folded table at most: beyond, the page would be heavy, and the Parquet table has them all
_FOLDED = 100


_SMALLEST = (
    "What must be exceeded for a verdict of changed, and stayed below for one of negligible; both at a false-discovery rate of 5\u202f% over all heads or "
    "layers, from the 95\u202f% interval over documents."
)


def _with_changes(heads: pd.DataFrame) -> pd.DataFrame:
    return heads.assign(
        distance_change=heads["distance_tuned"] - heads["distance_base"], sink_change=heads["sink_tuned"] - heads["sink_base"]
    )


def _figures(tables: Tables) -> list[Figure]:
    if "heads" not in tables:
        return []
    heads, selected = _with_changes(tables["heads"]), chosen_heads(tables)
    beside = Beside.read(tables, "heads", _PLACES, _with_changes)
    means = beside.means([*_BESIDE])

    def heatmap(
        column: str, name: str, title: str, legend: str, caption: str, *, scale: Scale = "magnitude", verdict: str | None = None
    ) -> Figure:
        caption = (
            f"{caption}{NO_DOCUMENTS}" if column == "weight_change" else counted_in(caption, heads, "documents", count_of(heads, column))
        )
        if means.empty:
            return head_heatmap(
                heads, column, name=name, title=title, legend=legend, caption=caption, scale=scale, selected=selected,
                tooltip=_TOOLTIP, verdict=verdict,
            )  # fmt: skip
        caption += beside.caption("mean", documents=column != "weight_change")
        return head_maps_beside(
            heads, means, column, name=name, title=title, legend=legend, caption=caption, scale=scale, selected=selected, tooltip=_BESIDE,
            changed=verdict,
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
    beside, shown = Beside.read(tables, "heads", _PLACES, _with_changes), []
    for kind in kinds(heads):
        own = heads[heads["rows"] == kind].sort_values("write_change", ascending=False, kind="stable")
        small = negligible(own, _JUDGED)
        large = own[~small]
        if len(large):
            which = "The" if len(large) <= TOP_HEADS else f"{TOP_HEADS} of the"
            caption = (
                f"{which} {written(len(large))} heads that are not negligible, by the change of what they write on the same input (share of what the base's "
                "writes). Distance, first token (attention mass on it) and entropy are tuned minus base. Bold heads are selected; a bold number changed by "
                "more than the smallest effect of interest."
            )
            top = large.head(TOP_HEADS)
            shown.append(
                Shown(
                    "Heads that changed most",
                    _top(top, kind, selected, beside),
                    caption + beside.caption("range"),
                    terminal=kind == kinds(heads)[0],
                    brief=_brief(large),
                    table="heads",
                )
            )
        if small.any():
            folded = own[small].head(_FOLDED)
            heading = f"{written(int(small.sum()))} negligible head{'' if small.sum() == 1 else 's'}"
            words = "Shown to have changed by less than the smallest effect of interest in what they write, attend to and spread."
            words += f" The largest {_FOLDED} of them." if small.sum() > _FOLDED else ""
            shown.append(Shown(heading, _top(folded, kind, selected, beside), words, folded=True))
    if "smallest_effects" in tables:
        shown.append(Shown("Smallest effects of interest", _smallest(tables["smallest_effects"]), _SMALLEST, folded=True))
    return shown


def _brief(heads: pd.DataFrame) -> View:
    """Return what fits a terminal: what heads write and where they attend, with intervals."""
    view = Table(heads).words("component", "head").numbers("write_change", "writes", ends=("write_change_low", "write_change_high"))
    view.numbers("entropy_change", "entropy, nats", ends=("entropy_change_low", "entropy_change_high"), sign=True)
    return view.numbers("kl_base_tuned", "KL of attention, nats").view()


def _smallest(effects: pd.DataFrame) -> View:
    view = Table(effects).words("table", "table").words("quantity", "quantity").numbers("smallest", "smallest effect", digits=2)
    return view.words("unit", "unit").numbers("floor", "precision floor", digits=2).words("source", "from").view()


def _top(heads: pd.DataFrame, kind: str, selected: Collection[tuple[int, int]], beside: Beside) -> View:
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

    def small(quantity: str, *, sign: bool = False) -> Callable[[Row], Cell]:
        lines = beside.lines(quantity, sign=sign)
        return lambda row: value(row[quantity], note=lines(row), sign=sign)

    for quantity, heading, sign in (
        ("write_change", "writes", False),
        ("kl_base_tuned", "KL(base||tuned)", False),
        ("entropy_change", "entropy", True),
    ):
        view.cells(quantity, heading, sized(quantity, sign=sign))
        if beside.counts:
            view.cells(quantity, f"controls: {heading}", beside.cell(quantity, sign=sign))
    view.numbers("entropy_change_q", "q", digits=2).numbers("entropy_base", "entropy base")
    view.cells("write_change_own", "on own input", small("write_change_own"))
    view.cells("distance_change", "distance", small("distance_change", sign=True)).cells(
        "sink_change", "first token", small("sink_change", sign=True)
    )
    view.cells("z_cosine_distance", "1 − cos z", small("z_cosine_distance"))
    return view.cells("weight_change", "ΔW", small("weight_change")).view(kind)


def _findings(tables: Tables) -> list[Finding]:
    if "heads" not in tables:
        return []
    writes, entropy = "changed what they write on the same input", "changed their attention entropy"
    return [
        parts_finding(tables, "heads", "write_change", of="heads", what=writes, unit="of it", card="heads changed what they write"),
        parts_finding(tables, "heads", "entropy_change", of="heads", what=entropy, unit="nats", sides=("more focused", "more diffuse")),
    ]


def _caveats(tables: Tables) -> list[Caveat]:
    return [*few_documents(tables, "heads"), NO_CAUSE, UNEQUAL_LENGTHS, THIS_PAIR]


SECTION = Section(
    id="heads",
    heading="Attention heads",
    intro="Each cell is one attention head. Hover over a cell for its numbers; the menu at a chart's corner saves it.",
    unit="documents",
    tables={"heads": HEADS, "smallest_effects": SMALLEST},
    figures=_figures,
    views=_views,
    findings=_findings,
    caveats=_caveats,
    question="where",
    adds="mechscope diff BASE TUNED --data DATA --out NEW_RUN",
)
