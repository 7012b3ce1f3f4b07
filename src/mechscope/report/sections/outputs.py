"""Outputs: how far apart the two models' next-token distributions are, and what fine-tuning did to the loss."""

from __future__ import annotations

import pandas as pd

from mechscope.report.beside import Beside
from mechscope.report.marks.tables import Cell, Row, Shown, Table, value
from mechscope.report.section import Column, Section, Tables, number, table
from mechscope.report.shared import THIS_PAIR, few_documents, moved
from mechscope.report.statements import Card, Finding
from mechscope.report.theme import TOKENS, interval
from mechscope.report.theme import number as written
from mechscope.report.verdicts import VERDICT, smallest_of, smallest_row

COLUMNS: dict[str, Column | str] = {
    "rows": "tokens that are predicted: all, document, summary",
    "n": "documents",
    "kl_base_tuned": number("KL(base ‖ tuned) of the next-token distributions", "nats per token", "se", "low", "high"),
    "kl_tuned_base": number("KL(tuned ‖ base) of the next-token distributions", "nats per token", "se", "low", "high"),
    "loss_base": number("loss of the base model", "nats per token"),
    "loss_tuned": number("loss of the tuned model", "nats per token"),
    "loss_change": number("tuned − base", "nats per token", "se", "low", "high", "p"),
    "kl_base_tuned_verdict": VERDICT,
    "loss_change_verdict": VERDICT,
}
"""Columns of the table `outputs`, which `control_outputs` has as well."""
OUTPUTS = table("One row per kind of predicted tokens; means over documents.", **COLUMNS)


def _views(tables: Tables) -> list[Shown]:
    outputs, beside = tables["outputs"], Beside.read(tables, "outputs", ("rows",))
    # the largest effect first
    order = outputs["loss_change"].abs().sort_values(ascending=False, kind="stable").index
    view = Table(outputs.loc[order]).mapped("rows", "tokens").cells("n", "documents", lambda row: value(int(row["n"])))

    def change(row: Row) -> Cell:
        ends = interval(row["loss_change_low"], row["loss_change_high"], sign=True)
        return value(row["loss_change"], sign=True, strong=row["loss_change_verdict"] == "changed", note=ends)

    view.cells("loss_change", "change of the loss", change)
    if beside.counts:
        view.cells("loss_change", "controls: change of the loss", beside.cell("loss_change", sign=True))
    view.numbers("loss_change_p", "p", digits=2).numbers("loss_base", "loss base")
    losses = beside.lines("loss_tuned")
    view.cells("loss_tuned", "loss tuned", lambda row: value(row["loss_tuned"], note=losses(row)))
    view.numbers("kl_base_tuned", "KL(base||tuned)", ends=("kl_base_tuned_low", "kl_base_tuned_high"))
    if beside.counts:
        view.cells("kl_base_tuned", "controls: KL(base||tuned)", beside.cell("kl_base_tuned"))
    back = beside.lines("kl_tuned_base")

    def other(row: Row) -> Cell:
        ends = interval(row["kl_tuned_base_low"], row["kl_tuned_base_high"])
        return value(row["kl_tuned_base"], note="\n".join(part for part in (ends, back(row)) if part))

    view.cells("kl_tuned_base", "KL(tuned||base)", other)
    words = f"By the size of the change of the loss (nats per token).{beside.caption('range')}"
    return [Shown("Distributions and loss", view.view(), words, terminal=True)]


def _summary(tables: Tables) -> pd.Series:
    """Return the row over the tokens of the summary, the first where there is none."""
    outputs = tables["outputs"]
    kinds = list(outputs["rows"])
    return outputs.iloc[kinds.index("summary") if "summary" in kinds else 0]


def _findings(tables: Tables) -> list[Finding]:
    row = _summary(tables)
    found = [
        _loss(row, tables, card="change of the summary loss" if row["rows"] == "summary" else "change of the loss"),
        _apart(row, tables),
    ]
    # what the summaries cost the model elsewhere
    others = tables["outputs"][tables["outputs"]["rows"] == "document"]
    if row["rows"] == "summary" and len(others):
        found.insert(1, _loss(others.iloc[0], tables, card="change of the document loss"))
    return found


def _loss(row: pd.Series, tables: Tables, *, card: str) -> Finding:
    """Say how the loss on one kind of tokens moved."""
    ends = interval(row["loss_change_low"], row["loss_change_high"], sign=True)
    how = moved(row, "loss_change") or "has no interval"
    change = f"{written(row['loss_change'], sign=True)} {ends}".strip()
    loss = f"{written(row['loss_base'])} nats per token before fine-tuning, {written(row['loss_tuned'])} after"
    size, smallest = _sized(row, tables, "loss_change")
    return Finding(
        f"The loss on {TOKENS.get(row['rows'], row['rows'])} {how}: {loss} ({change}{size})",
        n=row["n"],
        unit="documents",
        rows=(row, *smallest),
        effect=abs(float(row["loss_change"])),
        folded=row["loss_change_verdict"] == "negligible",
        card=Card(written(row["loss_change"], sign=True), card, f"nats per token {ends}"),
        table="outputs",
    )


def _sized(row: pd.Series, tables: Tables, quantity: str) -> tuple[str, tuple[pd.Series, ...]]:
    """Return what an effect's size is held against, `; negligible: less than 0.004`, and the row it is from."""
    verdict, smallest = row[f"{quantity}_verdict"], smallest_of(tables, "outputs", quantity)
    size = written(smallest, digits=2)
    words = {
        "changed": f"; more than {size}, the smallest effect of interest",
        "negligible": f"; negligible: shown to be less than {size}, the smallest effect of interest",
        "undecided": f"; not shown to be more or less than {size}, the smallest effect of interest",
    }
    return (words[verdict], smallest_row(tables, "outputs", quantity)) if verdict in words else ("", ())


def _apart(row: pd.Series, tables: Tables) -> Finding:
    """Say how far apart the next-token distributions are."""
    size, smallest = _sized(row, tables, "kl_base_tuned")
    ends = interval(row["kl_base_tuned_low"], row["kl_base_tuned_high"])
    return Finding(
        f"The next-token distributions on {TOKENS.get(row['rows'], row['rows'])} are {written(row['kl_base_tuned'])} nats apart "
        f"(KL of tuned from base, {ends}{size})",
        n=row["n"],
        unit="documents",
        rows=(row, *smallest),
        effect=abs(float(row["kl_base_tuned"])),
        folded=row["kl_base_tuned_verdict"] == "negligible",
        table="outputs",
    )


SECTION = Section(
    id="outputs",
    heading="Outputs",
    intro="Next-token distributions of the two models (KL, nats per token) and the loss, over the tokens of each part.",
    unit="documents",
    tables={"outputs": OUTPUTS},
    views=_views,
    findings=_findings,
    caveats=lambda tables: [*few_documents(tables, "outputs"), THIS_PAIR],
    question="aim",
    adds="mechscope diff BASE TUNED --data DATA --out NEW_RUN",
)
