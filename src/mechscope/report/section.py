"""What a section of the page is: the tables it is made of, column by column, and what a reader is shown of them.

A section is a value. The page, the summary in the terminal and `docs/tables.md` are read off it, so a technique reaches the reader by one file in
`mechscope/report/sections/` that defines `SECTION`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pandas as pd

from mechscope.report.marks.figure import Figure, unchecked
from mechscope.report.marks.tables import Shown
from mechscope.report.statements import Caveat, Finding, sample

Tables = Mapping[str, pd.DataFrame]
NO_SAMPLE = "Weights are no sample: there is no n."
"""What the caption of a figure of weights says in the place of n."""

# columns that may stand behind a number's name, and what they say of it
_BEHIND = {
    "se": "its standard error",
    "low": "its interval (95\u202f%), lower end",
    "high": "its interval, upper end",
    "p": "p: that it is zero, two-sided",
    "q": "q: p after Benjamini–Hochberg over the table",
}


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        meaning: What it holds, in a few words.
        unit: Nats, tokens, share, logits …; empty for names and counts.
        behind: Columns that are named after this one and say how sure it is: `("low", "high")` are `NAME_low` and `NAME_high`.
        bare: Whether those columns are called `low`, `high`, `se`, `p`, `q` alone.
        optional: Whether a table may lack it.
    """

    meaning: str
    unit: str = ""
    behind: tuple[str, ...] = ()
    bare: bool = False
    optional: bool = False


@dataclass(frozen=True)
class TableSpec:
    """A table of the run folder.

    Attributes:
        row: What one row is.
        columns: Every column by name, in order.
        numbered: Prefixes of columns that are numbered, such as `sv` for `sv1`, `sv2` …, or named by what was studied, and what they hold.
    """

    row: str
    columns: Mapping[str, Column]
    numbered: Mapping[str, Column] = field(default_factory=dict)

    def listed(self) -> dict[str, Column]:
        """Return all columns by their full name, those behind a number included."""
        every: dict[str, Column] = {}
        for name, column in self.columns.items():
            every[name] = column
            for end in column.behind:
                unit = "" if end in ("p", "q") else column.unit
                every[end if column.bare else f"{name}_{end}"] = Column(_BEHIND[end], unit, optional=column.optional)
        return every

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the columns that every such table has."""
        return tuple(name for name, column in self.listed().items() if not column.optional)

    def knows(self, name: str) -> bool:
        """Tell whether a column is described here."""
        return name in self.listed() or any(name.startswith(prefix) for prefix in self.numbered)


def table(row: str, numbered: Mapping[str, Column] | None = None, /, **columns: Column | str) -> TableSpec:
    """Describe a table: what a row is, and every column by a `Column` or, where it has no unit, by its meaning alone.

    Args:
        row: What one row is.
        numbered: `TableSpec.numbered`.
        columns: The columns by name.
    """
    named = {name: Column(column) if isinstance(column, str) else column for name, column in columns.items()}
    return TableSpec(row, named, numbered or {})


def number(meaning: str, unit: str = "", *behind: str, bare: bool = False, optional: bool = False) -> Column:
    """Describe a column of numbers with those that say how sure it is: `number("mean change", "nats", "se", "low", "high", "q")`."""
    return Column(meaning, unit, behind, bare, optional)


def optional(meaning: str, unit: str = "") -> Column:
    """Describe a column that a table may lack."""
    return Column(meaning, unit, optional=True)


class Drawing(Protocol):
    """What a panel draws that is also a file."""

    @property
    def name(self) -> str:
        """Name of its file, without extension."""

    def svg(self) -> str:
        """Draw as SVG."""


class Sheet(Protocol):
    """A page of its own beside the report, in the run's folder `pages`."""

    @property
    def name(self) -> str:
        """Name of its file, without extension."""

    def html(self) -> str:
        """Write it."""


@dataclass(frozen=True)
class Panel:
    """A part of a section that is neither a chart nor a table: it has a template of its own, and may have a script and a style.

    Attributes:
        kind: Names the files `templates/KIND.html.j2` and, where there are any, `KIND.js` and `KIND.css`.
        data: What the template reads, escaped as everything is; the element's id is `data["name"]` by convention.
        json: What the script reads, from the element `#KIND-data`; None where there is none. Panels of one kind share one list.
        drawings: What is also written to `figures/`.
        scripts: Scripts that must stand before its own, each with its style where there is one.
    """

    kind: str
    data: Mapping[str, Any]
    json: Any = None
    drawings: Sequence[Drawing] = ()
    scripts: tuple[str, ...] = ()
    below: bool = False


def _nothing(tables: Tables) -> Sequence[Any]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of the page.

    Attributes:
        id: Its anchor; lower case, digits and hyphens.
        heading: Its heading.
        intro: What a reader must know to read it, one paragraph of plain text.
        tables: The tables it owns, by name. A table is owned by one section; a section is shown where the run has one of them.
        reads: Tables of other sections without which it is not shown.
        figures: Charts.
        panels: What is drawn by a template of its own, above the charts or below the tables.
        views: Tables to read.
        pages: Pages of their own, for what would weigh too much on this one.
        findings: What follows from the tables, each with its n and unit, and the number of some in large; for the first screen and the terminal.
        caveats: What weakens statements and what a reader must keep in mind, the run's own weaknesses first.
        unit: What was observed independently, in the plural; empty where what is shown is read off weights, which are no sample.
        question: Which of a reader's questions its findings answer, a key of `QUESTIONS`; empty where they stand under its own heading.
        adds: The command that makes its tables, for a run that lacks them; empty where nobody misses them.
    """

    id: str
    heading: str
    intro: str
    tables: Mapping[str, TableSpec]
    reads: tuple[str, ...] = ()
    figures: Callable[[Tables], Sequence[Figure]] = _nothing
    panels: Callable[[Tables], Sequence[Panel]] = _nothing
    views: Callable[[Tables], Sequence[Shown]] = _nothing
    pages: Callable[[Tables], Sequence[Sheet]] = _nothing
    findings: Callable[[Tables], Sequence[Finding]] = _nothing
    caveats: Callable[[Tables], Sequence[Caveat]] = _nothing
    unit: str = "texts"
    question: str = ""
    adds: str = ""

    def drawn(self, tables: Tables) -> list[Figure]:
        """Return its figures, each with a caption that says on how many observations of which unit it rests, by the numbers it draws or its table."""
        with unchecked():
            figures = list(self.figures(tables))
        return [replace(figure, caption=self._counted(figure, tables)) for figure in figures]

    def _counted(self, figure: Figure, tables: Tables) -> str:
        if re.search(r"\bn = \d", figure.caption) or NO_SAMPLE in figure.caption:
            return figure.caption
        if not self.unit:
            return f"{figure.caption} {NO_SAMPLE}"
        counts = [int(row["n"]) for rows in figure.datasets.values() for row in rows if row.get("n") is not None]
        if not counts:
            table = next((tables[name] for name in self.tables if name in tables and "n" in tables[name]), None)
            counts = [] if table is None else [int(n) for n in table["n"].dropna()]
        return f"{figure.caption} {sample(counts, self.unit)}.".rstrip(" .") + "."

    def present(self, tables: Tables) -> bool:
        """Tell whether there is anything to show."""
        own = any(name in tables for name in self.tables) if self.tables else True
        return own and all(name in tables for name in self.reads)
