"""Claims: what the paper says beside what was measured, with a verdict where an interval allows one."""

from __future__ import annotations

from dataclasses import replace

from mechscope.report.marks.tables import Cell, Shown, Table
from mechscope.report.section import Card, Section, Tables, number, table
from mechscope.report.shared import THIS_PAIR

CLAIMS = table(
    "One row per claim.",
    claim="its short name",
    statement="what is claimed",
    paper="what the paper says of it, or that it does not",
    measured="what was measured here",
    value=number("the number that the verdict hangs on, in the unit of the statement", "", "low", "high", bare=True),
    verdict="supported, contradicted, undecided; no change where the two models do not differ",
    note="how it was judged",
)
_VERDICTS = ("supported", "contradicted", "undecided")


def _views(tables: Tables) -> list[Shown]:
    view = Table(tables["claims"]).cells("statement", "claim", lambda row: Cell(str(row["statement"]), str(row["note"])))
    view.cells("paper", "the paper", lambda row: Cell(str(row["paper"]))).cells(
        "measured", "measured here", lambda row: Cell(str(row["measured"]))
    )
    view.numbers("value", "value and 95 % interval", ends=("low", "high"))
    view.cells("verdict", "verdict", lambda row: Cell(str(row["verdict"]), badge=str(row["verdict"])))
    return [Shown("What is claimed and what was measured", replace(view.view(), prose=True), terminal=True)]


def _counts(tables: Tables) -> dict[str, int]:
    """Return how many claims have each verdict; "no change" only where there is one."""
    counts = tables["claims"]["verdict"].value_counts()
    return {verdict: int(counts.get(verdict, 0)) for verdict in dict.fromkeys((*_VERDICTS, *sorted(map(str, counts.index))))}


def _findings(tables: Tables) -> list[str]:
    counts = ", ".join(f"{count} {verdict}" for verdict, count in _counts(tables).items())
    return [f"Of {len(tables['claims'])} claims of and about arXiv 2505.17073 tested here: {counts}."]


def _cards(tables: Tables) -> list[Card]:
    counts = _counts(tables)
    note = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if verdict != "supported")
    return [Card(f"{counts['supported']} of {len(tables['claims'])}", "claims supported", note)]


SECTION = Section(
    id="claims",
    heading="Claims of the paper",
    intro=(
        "What the paper (arXiv 2505.17073) claims, beside what was measured here. A verdict needs an interval that excludes the alternative; where it does "
        "not, the claim stays undecided."
    ),
    tables={"claims": CLAIMS},
    views=_views,
    findings=_findings,
    cards=_cards,
    caveats=lambda tables: [THIS_PAIR],
    adds="mechscope study summarization --base BASE --tuned TUNED --data DATA --out NEW_RUN",
)
