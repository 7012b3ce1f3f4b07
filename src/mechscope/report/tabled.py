"""Building a table of the page column by column from a table of the run; a column that the run does not have is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import pandas as pd

from mechscope.report.heatmaps import Q_SIGNIFICANT
from mechscope.report.packed import shown
from mechscope.report.theme import interval, name_of
from mechscope.report.views import Cell, View, value, words

Row = Mapping[Any, Any]


@dataclass(frozen=True)
class Shown:
    """A table of the page with its heading and the sentence above it; `folded` ones open on a click."""

    heading: str
    view: View
    words: str = ""
    folded: bool = False


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

    def texts(self, column: str, heading: str) -> Self:
        """Add a column of text that may be long."""
        return self.cells(column, heading, lambda row: Cell("" if _none(row[column]) else _line(row[column])))

    def numbers(
        self, column: str, heading: str, *, ends: tuple[str, str] = ("", ""), digits: int = 3, sign: bool = False, bold: str | None = None
    ) -> Self:
        """Add a column of numbers, with intervals from the columns `ends` and in bold where the column `bold` is a significant q."""

        def cell(row: Row) -> Cell:
            note = interval(row.get(ends[0]), row.get(ends[1]), sign=sign)
            return value(row[column], note=note, digits=digits, sign=sign, strong=bold is not None and row.get(bold, 1.0) < Q_SIGNIFICANT)

        return self.cells(column, heading, cell)

    def cells(self, column: str, heading: str, cell: Callable[[Row], Cell]) -> Self:
        """Add a column of cells, one per row; nothing where the table lacks `column`."""
        if column in self._have:
            self._columns.append((heading, [cell(row) for row in self._rows]))
        return self

    def view(self) -> View:
        """Return the table."""
        return View(tuple(heading for heading, _ in self._columns), tuple(zip(*(cells for _, cells in self._columns), strict=True)))


def strongest(table: pd.DataFrame, column: str, count: int, *, q: str | None = None) -> pd.DataFrame:
    """Return the rows with the largest magnitudes in `column`, those with a significant `q` first."""
    size = table[column].astype(float).abs().fillna(-1.0)
    surely = (table[q] < Q_SIGNIFICANT) if q is not None and q in table else pd.Series(False, index=table.index)
    order = pd.DataFrame({"surely": ~surely, "size": -size}).sort_values(["surely", "size"], kind="stable").index
    return table.loc[order].head(count)


def token(text: object) -> str:
    """Return a token as a table shows it: its spaces as signs."""
    return shown(text).replace(" ", "␣") or "∅"


def _none(text: object) -> bool:
    return text is None or text is pd.NA or (isinstance(text, float) and pd.isna(text))


def _line(text: object) -> str:
    # long enough for a context of some twenty tokens on both sides
    line = "".join(character if character.isprintable() else "↵" if character == "\n" else " " for character in str(text))
    return line if len(line) <= 600 else f"{line[:600]}…"
