"""Summaries: what each model wrote of held-out documents, and its ROUGE."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.tables import Row, Shown, View, value, words
from mechscope.report.section import Column, Panel, Section, Tables, number, table
from mechscope.report.shared import SHARED_WORDS, TOKENIZER
from mechscope.report.theme import METRIC_NAMES, interval, name_of

SAMPLES = 12
"""Documents shown with their summaries; the table has all."""

# text of a document that is shown before the reader unfolds it, in characters
_EXCERPT = 280

SUMMARIES = table(
    "One row per held-out document.",
    {"": Column("what that model wrote: base, tuned, and the strategies of a bake-off")},
    id="the document",
    document="its text",
    reference="its reference summary",
)
ROUGE = table(
    "One row per model and metric.",
    model="base, tuned, or lora",
    metric="rouge1, rouge2, rougeL, rougeLsum",
    mean=number("mean F-measure over documents", "share", "low", "high", bare=True),
    withheld="why there is no interval, in words; empty where there is one",
    n="documents",
    tokenizer=TOKENIZER,
)


def _views(tables: Tables) -> list[Shown]:
    if "rouge" not in tables:
        return []
    caption = "ROUGE (F-measure, 0 to 1) of each model's summaries of held-out documents, with 95\u202f% intervals over documents (studentised bootstrap)."
    return [Shown("ROUGE", _rouge(tables["rouge"]), caption)]


def _rouge(scores: pd.DataFrame) -> View:
    """Return one line per model."""
    metrics = [metric for metric in METRIC_NAMES if (scores["metric"] == metric).any()]
    rows = []
    for model, group in scores.groupby("model", sort=False):
        of_metric = {row["metric"]: row for row in group.to_dict("records")}
        cells = [value(of_metric[m]["mean"], note=_ends(of_metric[m])) for m in metrics]
        rows.append((words(model, strong=True), *cells, value(int(group["n"].iloc[0]))))
    return View(("model", *(METRIC_NAMES[metric] for metric in metrics), "documents"), tuple(rows))


def _ends(score: Row) -> str:
    return str(score.get("withheld") or "") or interval(score["low"], score["high"])


def _panels(tables: Tables) -> list[Panel]:
    """Show the first documents with the reference and every model's summary."""
    summaries = tables.get("summaries")
    if summaries is None:
        return []
    writers = ["reference", *(column for column in summaries if column not in SUMMARIES.columns)]
    samples = []
    for row in summaries.head(SAMPLES).to_dict("records"):
        document = _text(row["document"])
        samples.append(
            {
                "id": _text(row["id"]),
                "document": document,
                "excerpt": None if len(document) <= _EXCERPT else document[:_EXCERPT].rsplit(" ", 1)[0],
                "words": len(document.split()),
                "summaries": [(name_of(writer), _text(row[writer])) for writer in writers],
            }
        )
    return [Panel("samples", {"samples": samples}, below=True)]


def _text(text: object) -> str:
    return "" if text is None or text is pd.NA or text != text else str(text)


SECTION = Section(
    id="samples",
    heading="Summaries",
    intro="Held-out documents with their reference and what each model wrote of them.",
    tables={"summaries": SUMMARIES, "rouge": ROUGE},
    panels=_panels,
    views=_views,
    caveats=lambda tables: [SHARED_WORDS] if "rouge" in tables else [],
    question="lora",
    adds="mechscope study summarization --base BASE --tuned TUNED --data DATA --out NEW_RUN",
)
