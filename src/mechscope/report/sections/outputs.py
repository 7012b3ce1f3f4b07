"""Outputs: how far apart the two models' next-token distributions are, and what fine-tuning did to the loss."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.tables import Cell, Row, Shown, Table, value
from mechscope.report.section import Card, Section, Tables, number, table
from mechscope.report.shared import THIS_PAIR, few_documents, verb
from mechscope.report.theme import interval, name_of
from mechscope.report.theme import number as written
from mechscope.report.verdicts import VERDICT, smallest_of

OUTPUTS = table(
    "One row per kind of predicted tokens; means over documents.",
    rows="tokens that are predicted: all, document, summary",
    n="documents",
    kl_base_tuned=number("KL(base ‖ tuned) of the next-token distributions", "nats per token", "se", "low", "high"),
    kl_tuned_base=number("KL(tuned ‖ base) of the next-token distributions", "nats per token", "se", "low", "high"),
    loss_base=number("loss of the base model", "nats per token"),
    loss_tuned=number("loss of the tuned model", "nats per token"),
    loss_change=number("tuned − base", "nats per token", "se", "low", "high", "p"),
    kl_base_tuned_verdict=VERDICT,
    loss_change_verdict=VERDICT,
)


def _views(tables: Tables) -> list[Shown]:
    view = Table(tables["outputs"]).mapped("rows", "tokens").cells("n", "documents", lambda row: value(int(row["n"])))
    view.numbers("kl_base_tuned", "KL(base||tuned)", ends=("kl_base_tuned_low", "kl_base_tuned_high"))
    view.numbers("kl_tuned_base", "KL(tuned||base)", ends=("kl_tuned_base_low", "kl_tuned_base_high"))
    view.numbers("loss_base", "loss base").numbers("loss_tuned", "loss tuned")

    def change(row: Row) -> Cell:
        ends = interval(row["loss_change_low"], row["loss_change_high"], sign=True)
        return value(row["loss_change"], sign=True, strong=True, note=ends)

    view.cells("loss_change", "change", change).numbers("loss_change_p", "p", digits=2)
    return [Shown("Distributions and loss", view.view(), terminal=True)]


def _summary(tables: Tables) -> pd.Series:
    """Return the row over the tokens of the summary, the first where there is none."""
    outputs = tables["outputs"]
    kinds = list(outputs["rows"])
    return outputs.iloc[kinds.index("summary") if "summary" in kinds else 0]


def _findings(tables: Tables) -> list[str]:
    row = _summary(tables)
    apart = _sized(row, tables, "kl_base_tuned")
    sentences = [
        f"{_loss(row, tables)}. The next-token distributions are {written(row['kl_base_tuned'])} nats apart (KL of tuned from base{apart})."
    ]
    # what the summaries cost the model elsewhere
    others = tables["outputs"][tables["outputs"]["rows"] == "document"]
    if row["rows"] == "summary" and len(others):
        sentences.append(f"{_loss(others.iloc[0], tables)}.")
    return sentences


def _loss(row: pd.Series, tables: Tables) -> str:
    """Say how the loss on one kind of tokens moved, without the full stop."""
    moved = verb(row["loss_change_low"], row["loss_change_high"], below="fell", above="rose", neither="shows no change")
    change = f"{written(row['loss_change'], sign=True)} {interval(row['loss_change_low'], row['loss_change_high'], sign=True)}".strip()
    loss = f"{written(row['loss_base'])} nats per token before fine-tuning, {written(row['loss_tuned'])} after"
    size = _sized(row, tables, "loss_change")
    return f"The loss on {name_of(row['rows'])} tokens {moved}: {loss} ({change}{size}; n = {written(int(row['n']))} documents)"


def _sized(row: pd.Series, tables: Tables, quantity: str) -> str:
    """Return what an effect's size is held against: `; negligible: less than 0.004 nats per token`."""
    smallest = smallest_of(tables, "outputs", quantity)
    words = {
        "changed": f"more than {written(smallest, digits=2)}, the smallest effect of interest",
        "negligible": f"negligible: shown to be less than {written(smallest, digits=2)}, the smallest effect of interest",
        "undecided": f"not shown to be more or less than {written(smallest, digits=2)}, the smallest effect of interest",
    }
    verdict = row[f"{quantity}_verdict"]
    return f"; {words[verdict]}" if verdict in words else ""


def _cards(tables: Tables) -> list[Card]:
    row = _summary(tables)
    label = "change of the summary loss" if row["rows"] == "summary" else "change of the loss"
    ends = interval(row["loss_change_low"], row["loss_change_high"], sign=True)
    return [Card(written(row["loss_change"], sign=True), label, f"nats per token {ends}")]


SECTION = Section(
    id="outputs",
    heading="Outputs",
    intro="Next-token distributions of the two models (KL, nats per token) and the loss, over the tokens of each part.",
    tables={"outputs": OUTPUTS},
    views=_views,
    findings=_findings,
    cards=_cards,
    caveats=lambda tables: [*few_documents(tables), THIS_PAIR],
    adds="mechscope diff BASE TUNED --data DATA --out NEW_RUN",
)
