"""Claims: what the paper says beside what was measured, with a verdict where an interval allows one."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from mechscope.report.marks.tables import Cell, Row, Shown, Table
from mechscope.report.section import Section, Tables, number, optional, table
from mechscope.report.statements import Card, Caveat, Derived, Finding
from mechscope.report.theme import PAPER, PAPER_IN_FULL

CLAIMS = table(
    "One row per claim.",
    claim="its short name",
    statement="what is claimed",
    paper="what the paper says of it, or that it does not",
    measured="what was measured here",
    value=number("the number that the verdict hangs on, in the unit of the statement", "", "low", "high", bare=True),
    verdict="supported, contradicted, undecided; withheld where what the claim presupposes is not so; no change where the two models do not differ",
    note="how it was judged",
    unit=optional("what was observed several times independently: document, prompt pair, seed, training, noise draw"),
    overturn=optional("what would overturn the verdict, or what it lacks: trainings, a control, n"),
)
# claims that say whether a number tells the tuned model from noise of the same size
_NOISE = ".noise"
_PAPERS = (("claim", "ends unlike", _NOISE),)
_VERDICTS = ("supported", "contradicted", "undecided")
_UNITS = (
    "The unit of a claim says what its interval covers: over documents it is about this pair of models and does not cover training again; over trainings or "
    "seeds it does."
)


def _views(tables: Tables) -> list[Shown]:
    view = Table(tables["claims"]).cells("statement", "claim", lambda row: Cell(str(row["statement"]), str(row["note"])))
    view.cells("paper", "the paper", lambda row: Cell(str(row["paper"]))).cells("measured", "measured here", _measured)
    view.numbers("value", "value and 95\u202f% interval", ends=("low", "high"))
    view.cells("unit", "unit", lambda row: Cell(str(row["unit"] or "–")))
    view.cells("verdict", "verdict", lambda row: Cell(str(row["verdict"]), badge=str(row["verdict"])))
    # what was decided first, what was not measured last
    order = tables["claims"].sort_values(["verdict", "value"], key=_decided, kind="stable")
    brief = Table(order).cells("verdict", "verdict", lambda row: Cell(str(row["verdict"]), badge=str(row["verdict"])))
    brief.cells("statement", "claim", lambda row: Cell(str(row["statement"]))).cells(
        "measured", "measured here", lambda row: Cell(str(row["measured"]))
    )
    pages, terminals = (replace(each.view(), prose=True) for each in (view, brief))
    return [Shown("What is claimed and what was measured", pages, terminal=True, brief=terminals)]


def _decided(column: pd.Series) -> pd.Series:
    return ~column.isin(["supported", "contradicted"]) if column.name == "verdict" else column.isna()


def _measured(row: Row) -> Cell:
    overturn = row.get("overturn") or ""
    return Cell(str(row["measured"]), f"What would overturn it: {overturn}" if overturn else "")


def _of_the_paper(claims: pd.DataFrame) -> pd.DataFrame:
    """Return the claims without the rows about noise, which say nothing of fine-tuning."""
    return claims[~claims["claim"].astype(str).str.endswith(_NOISE)]


def _counts(claims: pd.DataFrame) -> dict[str, int]:
    """Return how many claims have each verdict; "withheld" and "no change" only where there is one."""
    counts = claims["verdict"].value_counts()
    return {verdict: int(counts.get(verdict, 0)) for verdict in dict.fromkeys((*_VERDICTS, *sorted(map(str, counts.index))))}


def _findings(tables: Tables) -> list[Finding]:
    claims = _of_the_paper(tables["claims"])
    counts, parts = _counts(claims), []
    for verdict, count in counts.items():
        names = [_words(name) for name in claims.loc[claims["verdict"] == verdict, "claim"]]
        decided = f" ({'; '.join(names)})" if names and verdict in ("supported", "contradicted") else ""
        parts.append(f"{count} {verdict}{decided}")
    note = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if verdict != "supported")
    supported = f"{counts['supported']} of {len(claims)}"
    return [
        Finding(
            f"Of {len(claims)} claims of and about the paper ({PAPER}) tested here: {', '.join(parts)}",
            derived=(Derived("claims", _PAPERS), *(Derived("claims", (*_PAPERS, ("verdict", "==", verdict))) for verdict in counts)),
            n=len(claims),
            unit="claims",
            effect=float(counts["supported"] + counts.get("contradicted", 0)),
            card=Card(supported, f"claims of {PAPER} supported", f"{note}.{_would_overturn(claims)}"),
            table="claims",
        )
    ]


def _words(claim: object) -> str:
    """Write a claim's name as words: "fewer steps, equal rank"."""
    return str(claim).replace(".", ", ").replace("_", " ")


def _would_overturn(claims: pd.DataFrame) -> str:
    """Say what would overturn the first decided claim or, where none is decided, what the first one lacks; nothing where the table does not tell."""
    told = claims[claims["overturn"].astype(str) != ""] if "overturn" in claims else claims.iloc[:0]
    if told.empty:
        return ""
    decided = told[told["verdict"].isin(["supported", "contradicted"])]
    row = (decided if len(decided) else told).iloc[0]
    return f" What would overturn “{_words(row['claim'])}”: {row['overturn']}"


SECTION = Section(
    id="claims",
    heading="Claims of the paper",
    intro=(
        f"What the paper claims ({PAPER_IN_FULL}), beside what was measured here. A verdict needs an interval that excludes the alternative; where it does "
        "not, the claim stays undecided. Claims about fine-tuning are decided by trainings, one number each: an interval over documents is about these two "
        "models only. Rows named noise say whether a number tells the tuned model from noise of the same size, and nothing more."
    ),
    tables={"claims": CLAIMS},
    views=_views,
    findings=_findings,
    caveats=lambda tables: [Caveat(_UNITS)],
    question="paper",
    adds="mechscope study summarization --base BASE --tuned TUNED --data DATA --out NEW_RUN",
)
