"""Tables as the page shows them: columns with headings, cells with the text to read and the number to sort by.

`Table` builds one column by column from a table of the run; a column that the run does not have is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import pandas as pd

from mechscope.report.marks.heatmaps import Q_SIGNIFICANT
from mechscope.report.marks.packed import shown
from mechscope.report.theme import interval, label, name_of, number

Row = Mapping[Any, Any]


@dataclass(frozen=True)
class Cell:
    """One cell: what it says, a fainter second line, and the number by which its column is sorted (None for text).

    `badge` sets it in a coloured badge: supported, contradicted, or anything else for neither.
    """

    text: str
    note: str = ""
    sort: float | None = None
    strong: bool = False
    badge: str = ""


@dataclass(frozen=True)
class View:
    """One table of the page: headings and rows.

    Attributes:
        columns: The headings.
        rows: The cells of every row.
        kind: The query rows that it is about, None where it has none.
        prose: Whether its cells are sentences, which narrow screens set one under another.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    kind: str | None = None
    prose: bool = False

    @property
    def headings(self) -> list[tuple[str, bool]]:
        """Every heading and whether its column is one of numbers, which are set to the right."""
        return [(text, i > 0 and any(row[i].sort is not None for row in self.rows)) for i, text in enumerate(self.columns)]


def value(x: object, *, note: str = "", digits: int = 3, sign: bool = False, strong: bool = False) -> Cell:
    """Return a cell for a number."""
    plain = float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else float("nan") if x is None else float(str(x))
    return Cell(number(x, digits=digits, sign=sign), note, None if math.isnan(plain) else plain, strong)


def words(text: object, *, note: str = "", sort: float | None = None, strong: bool = False) -> Cell:
    """Return a cell for a name or a list of components."""
    return Cell(label(text), note, sort, strong)


def kinds(table: pd.DataFrame) -> list[str]:
    """Return the kinds of query rows in a table, all tokens first."""
    return sorted((str(kind) for kind in dict.fromkeys(table["rows"])), key=lambda kind: kind != "all")


@dataclass(frozen=True)
class Shown:
    """A table of the page.

    Attributes:
        heading: What it shows.
        view: Its columns and rows.
        words: A sentence above it.
        folded: Whether it opens on a click.
        terminal: Whether the summary in the terminal prints it too.
        brief: What the terminal prints in its place, where the page's columns are too many for it.
        table: The table of the run that holds all its rows, where a section has several.
    """

    heading: str
    view: View
    words: str = ""
    folded: bool = False
    terminal: bool = False
    brief: View | None = None
    table: str = ""


class Table:
    """A view in the making: every call adds a column."""

    def __init__(self, table: pd.DataFrame) -> None:
        """Begin with no column over the rows of `table`."""
        self._rows: list[dict[Any, Any]] = table.to_dict("records")
        self._have = set(table.columns)
        self._columns: list[tuple[str, list[Cell]]] = []

    def words(self, column: str, heading: str, *, strong: Callable[[Row], bool] = lambda row: False) -> Self:
        """Add a column of names."""
        return self.cells(column, heading, lambda row: words("–" if _none(row[column]) else row[column], strong=bool(strong(row))))

    def mapped(self, column: str, heading: str, say: Callable[[Any], str] = name_of) -> Self:
        """Add a column of words for what the table has by a name of its own."""
        return self.cells(column, heading, lambda row: words("–" if _none(row[column]) else say(row[column])))

    def tokens(self, column: str, heading: str) -> Self:
        """Add a column of tokens, spaces made visible."""
        return self.cells(column, heading, lambda row: Cell("–" if _none(row[column]) else token(row[column])))

    def token_lists(self, column: str, heading: str, *, most: int = 8) -> Self:
        """Add a column of lists of tokens, of which the first `most` are shown, spaces made visible."""
        return self.cells(column, heading, lambda row: Cell(tokens(row[column], most=most)))

    def texts(self, column: str, heading: str) -> Self:
        """Add a column of text that may be long."""
        return self.cells(column, heading, lambda row: Cell("" if _none(row[column]) else line(row[column])))

    def numbers(
        self, column: str, heading: str, *, ends: tuple[str, str] = ("", ""), digits: int = 3, sign: bool = False, bold: str | None = None
    ) -> Self:
        """Add a column of numbers, with intervals from the columns `ends` and in bold where the column `bold` is a significant q."""
        return self._numbers(column, heading, ends, digits, sign, bold, "")

    def shares(self, column: str, heading: str, *, ends: tuple[str, str], sign: bool = False) -> Self:
        """Add a column of shares as `numbers` does; one that is withheld says so, and why (column `withheld`)."""
        return self._numbers(column, heading, ends, 3, sign, None, "withheld")

    def _numbers(self, column: str, heading: str, ends: tuple[str, str], digits: int, sign: bool, bold: str | None, withheld: str) -> Self:
        reasons = {str(row.get(withheld, "")) for row in self._rows} if withheld else set[str]()
        # one reason for all is said once, beside the table
        alike = len(self._rows) > 1 and len(reasons) == 1

        def cell(row: Row) -> Cell:
            if withheld and _none(row[column]) and row.get(withheld):
                return Cell("withheld", "" if alike else str(row[withheld]))
            note = interval(row.get(ends[0]), row.get(ends[1]), sign=sign)
            return value(row[column], note=note, digits=digits, sign=sign, strong=bold is not None and row.get(bold, 1.0) < Q_SIGNIFICANT)

        return self.cells(column, heading, cell)

    def cells(self, column: str, heading: str, cell: Callable[[Row], Cell]) -> Self:
        """Add a column of cells, one per row; nothing where the table lacks `column`."""
        if column in self._have:
            self._columns.append((heading, [cell(row) for row in self._rows]))
        return self

    def view(self, kind: str | None = None) -> View:
        """Return the table; `kind` names the query rows that it is about."""
        return View(tuple(heading for heading, _ in self._columns), tuple(zip(*(cells for _, cells in self._columns), strict=True)), kind)


def strongest(table: pd.DataFrame, column: str, count: int, *, q: str | None = None) -> pd.DataFrame:
    """Return the rows with the largest magnitudes in `column`, those with a significant `q` first."""
    size = table[column].astype(float).abs().fillna(-1.0)
    surely = (table[q] < Q_SIGNIFICANT) if q is not None and q in table else pd.Series(False, index=table.index)
    order = pd.DataFrame({"surely": ~surely, "size": -size}).sort_values(["surely", "size"], kind="stable").index
    return table.loc[order].head(count)


def token(text: object) -> str:
    """Return a token as a table shows it: its spaces as signs."""
    return shown(text).replace(" ", "␣") or "∅"


def tokens(texts: Iterable[object], *, most: int) -> str:
    """Return the first of a list of tokens, spaces as signs."""
    return ", ".join(token(text) for text in list(texts)[:most])


def _none(text: object) -> bool:
    return text is None or text is pd.NA or (isinstance(text, float) and pd.isna(text))


def line(text: object) -> str:
    """Return text as a table shows it: on one line, without control or direction characters, shortened where it is endless."""
    # long enough for a context of some twenty tokens on both sides
    line = "".join(character if character.isprintable() else "↵" if character == "\n" else " " for character in str(text))
    return line if len(line) <= 600 else f"{line[:600]}…"
