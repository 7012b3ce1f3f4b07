"""What a section says: findings with what they rest on, the large number of one, and what weakens them.

A finding is a value, not a sentence: it knows how many independent observations it rests on, which rows of which tables it quotes and what it counted,
so that the page can order findings by effect, and a test can read every number of the prose back to a cell.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import pandas as pd

from mechscope.report.theme import number

QUESTIONS = {
    "compared": "What was compared?",
    "aim": "Did fine-tuning do what it was meant to, and at what price?",
    "where": "Where did it change the model?",
    "gain": "Do these places carry the gain?",
    "circuit": "Which circuit does the task?",
    "lora": "Does LoRA there pay?",
    "parts": "What do its parts do?",
    "paper": "What does the paper claim?",
}
"""What a reader of a comparison asks, in order. Findings without a question stand under the heading of their section."""

Row = pd.Series | Mapping[Any, Any]
How = Literal["count", "distinct", "sum", "mean", "median", "min", "max", "negative"]

_IS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "ends unlike": lambda texts, end: ~texts.astype(str).str.endswith(end),
}
_COMES_TO: dict[str, Callable[[pd.Series], float]] = {
    "distinct": lambda values: float(values.nunique()),
    "sum": lambda values: float(values.sum()),
    "mean": lambda values: float(values.mean()),
    "median": lambda values: float(values.median()),
    "min": lambda values: float(values.min()),
    "max": lambda values: float(values.max()),
    "negative": lambda values: float((values < 0).mean()),
}


@dataclass(frozen=True)
class Derived:
    """A number that stands in no cell: how many rows of a table are so, or what a column of them comes to.

    Attributes:
        table: The table.
        where: What is so of these rows, each as column, comparison and value: `("q", "<", 0.05)`.
        column: The column that is taken together; none for a count.
        how: What it comes to: `distinct` values, their `sum`, …, or the share of them that is `negative`.
    """

    table: str
    where: tuple[tuple[str, str, Any], ...] = ()
    column: str = ""
    how: How = "count"

    def rows(self, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
        """Return the rows that are so."""
        rows = tables[self.table]
        for column, comparison, value in self.where:
            rows = rows[_IS[comparison](rows[column], value).astype(bool)]
        return rows

    def of(self, tables: Mapping[str, pd.DataFrame]) -> float:
        """Return the number."""
        rows = self.rows(tables)
        return float(len(rows)) if self.how == "count" else _COMES_TO[self.how](rows[self.column])

    def written(self, tables: Mapping[str, pd.DataFrame]) -> str:
        """Return the number as it stands in a sentence, a count without decimals."""
        value = self.of(tables)
        return number(int(value)) if self.how in ("count", "distinct") else number(value)


def sample(counts: Sequence[float], unit: str) -> str:
    """Return how many observations something rests on: `n = 24 documents`, `n = 20 to 24 texts`; empty without any."""
    if not len(counts):
        return ""
    least, most = int(min(counts)), int(max(counts))
    return f"n = {number(most) if least == most else f'{number(least)} to {number(most)}'} {unit.removesuffix('s') if most == 1 else unit}"


@dataclass(frozen=True)
class Card:
    """A finding's number in large: what it counts, and a smaller line under it. Its n and unit are the finding's."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Caveat:
    """What weakens a statement.

    Attributes:
        text: A sentence.
        weakens: The table whose statements it weakens; empty for all of its section.
        withheld: Whether what rests on it is withheld.
    """

    text: str
    weakens: str = ""
    withheld: bool = False


@dataclass(frozen=True, eq=False)
class Finding:
    """A statement that follows from the tables of a run.

    Attributes:
        text: The statement, without its n and its full stop; of what is withheld a noun phrase: `how much of the gain they carry`.
        n: Independent observations that it rests on; None where it rests on weights, which are no sample.
        unit: What was observed independently, in the plural: documents, texts, pairs, seeds, trainings.
        rows: The rows of tables that it quotes.
        derived: Numbers that it quotes and that stand in no cell.
        effect: The size of what it says, by which the findings of a question are ordered: of losses in nats, of what changed in smallest effects of
            interest, else a share or the size over its standard error; 0 for what says that nothing was found.
        question: A key of `QUESTIONS`; empty for the section's own.
        withheld: Why nothing is said; empty where something is.
        folded: Whether a reader must unfold it: what is negligible, undecided or a detail.
        card: Its number in large.
        table: The table that it is read from, whose caveats weaken it.
        caveats: What weakens it, as `Summary` finds it.
    """

    text: str
    _: KW_ONLY
    n: float | None = None
    unit: str = "texts"
    rows: tuple[Row, ...] = ()
    derived: tuple[Derived, ...] = ()
    effect: float = 0.0
    question: str = ""
    withheld: str = ""
    folded: bool = False
    card: Card | None = None
    table: str = ""
    caveats: tuple[Caveat, ...] = ()

    @property
    def sample(self) -> str:
        """How many independent observations it rests on: `n = 24 documents`; empty without any."""
        return "" if self.n is None or pd.isna(self.n) else sample([self.n], self.unit)

    @property
    def sentence(self) -> str:
        """The whole sentence, with what it rests on: `The loss fell by 0.5 nats (n = 24 documents).`"""
        first = self.text.partition(" ")[0]
        # the name of a part, such as a3.h5, stays as it is
        text = f"{self.text[:1].upper()}{self.text[1:]}" if first.isalpha() else self.text
        # where an interval is missing nothing stands before the comma
        for mark in ",;)":
            text = text.replace(f" {mark}", mark)
        if self.withheld:
            text = f"{text}: withheld, as {self.withheld.rstrip('.')}"
        if not self.sample:
            return f"{text}."
        # a bracket of several words at the end takes n into it
        last = text[text.rfind("(") :]
        return f"{text[:-1]}; {self.sample})." if text.endswith(")") and " " in last else f"{text} ({self.sample})."
