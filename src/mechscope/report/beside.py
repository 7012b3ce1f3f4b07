"""What controls give, beside what was measured of the tuned model: one value that tables, figures and captions of a difference are read off.

A run has the tables of a difference a second time with a row for every control (`control_heads` beside `heads`). They have the same columns, so whatever a
section says of the tuned model it can say of its controls: as a range by kind in a cell, as a map or a line in a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from mechscope.report.marks.controls import KIND_NAMES, KIND_SHORT
from mechscope.report.marks.tables import Cell, Row
from mechscope.report.section import Tables
from mechscope.report.theme import number as written
from mechscope.report.theme import percent

# one and several of a kind of controls in a sentence
_COUNTED = {
    "seed": ("training with another seed", "trainings with other seeds"),
    "shuffled": ("training on shuffled summaries", "trainings on shuffled summaries"),
    "other": ("other training", "other trainings"),
    "noise": ("draw of noise of the same size", "draws of noise of the same size"),
}


@dataclass(frozen=True)
class Beside:
    """Controls beside a table of the tuned model.

    Attributes:
        rows: Their rows of the table, of every kind (`model`) one after another; without rows where the run has no controls.
        places: Columns that say which part a row is about.
        of: Documents that the tuned model's table is of; 0 for weights.
    """

    rows: pd.DataFrame
    places: tuple[str, ...]
    of: int

    @classmethod
    def read(
        cls, tables: Tables, name: str, places: Sequence[str], prepare: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table
    ) -> Beside:
        """Read the controls of a table.

        Args:
            tables: The run's tables.
            name: The tuned model's table, such as `heads`.
            places: Columns that say which part a row is about.
            prepare: Adds columns to both tables.
        """
        of = int(tables[name]["n"].max()) if "n" in tables[name] else 0
        if f"control_{name}" not in tables:
            return cls(pd.DataFrame(columns=["control", "model", *places]), tuple(places), of)
        rows = tables[f"control_{name}"]
        rows = rows.assign(model=rows["control_kind" if "control_kind" in rows else "kind"])
        order = {kind: at for at, kind in enumerate(KIND_NAMES)}
        rows = rows[rows["model"] != "tuned"].sort_values("model", key=lambda models: models.map(order), kind="stable")
        return cls(prepare(rows), tuple(places), of)

    @property
    def counts(self) -> dict[str, int]:
        """How many controls there are of each kind."""
        return {str(kind): int(own["control"].nunique()) for kind, own in self.rows.groupby("model", sort=False)}

    def over(self, columns: Sequence[str]) -> Beside:
        """Return the same with one row per control and part, where a part has several: the means of some columns."""
        columns = [column for column in columns if column in self.rows]
        if self.rows.empty:
            return self
        means = self.rows.groupby(["control", "model", *self.places], sort=False, as_index=False)[columns].mean()
        return replace(self, rows=means)

    def spread(self, column: str) -> pd.DataFrame:
        """Return one row per part and kind (`model`): `value` (mean over controls), `low` and `high` (the ends of their range), `count`, `n` (documents)."""
        rows = self.rows[self.rows[column].notna()] if column in self.rows else self.rows.iloc[:0].assign(**{column: 0.0})
        rows = rows.assign(n=rows.get("n", 0))
        keys = [*self.places, "model"]
        if rows.empty:
            return pd.DataFrame(columns=[*keys, "value", "low", "high", "count", "n"])
        found = rows.groupby(keys, sort=False, as_index=False)
        return found.agg(value=(column, "mean"), low=(column, "min"), high=(column, "max"), count=(column, "count"), n=("n", "max"))

    def means(self, columns: Sequence[str]) -> pd.DataFrame:
        """Return one row per part and kind (`model`): the means of some columns over controls, and `count`."""
        columns = [column for column in columns if column in self.rows]
        found = self.rows.groupby([*self.places, "model"], sort=False, as_index=False)
        return found.agg(**{column: (column, "mean") for column in columns}, count=("control", "nunique"))

    def lines(self, column: str, *, sign: bool = False, share: bool = False) -> Callable[[Row], str]:
        """Return what is said of a part: a line for every kind of control, `noise 0.012 to 0.018`; empty where there are none."""
        said: dict[tuple[object, ...], list[str]] = {}

        def say(x: float) -> str:
            return percent(x) if share else written(float(x), digits=2, sign=sign)

        for row in self.spread(column).to_dict("records"):
            low, high = say(row["low"]), say(row["high"])
            said.setdefault(tuple(row[place] for place in self.places), []).append(
                f"{KIND_SHORT[row['model']]} {low}" + (f" to {high}" if low != high else "")
            )
        return lambda row: "\n".join(said.get(tuple(row[place] for place in self.places), []))

    def cell(self, column: str, *, sign: bool = False, share: bool = False) -> Callable[[Row], Cell]:
        """Return the cell that stands beside the tuned model's: the lines, in small print, sorted by the mean over all controls."""
        lines = self.lines(column, sign=sign, share=share)
        means = self.rows.groupby(list(self.places))[column].mean().to_dict() if column in self.rows else {}

        def cell(row: Row) -> Cell:
            place = tuple(row[each] for each in self.places)
            mean = means.get(place if len(place) > 1 else place[0])
            said = lines(row)
            return Cell("" if said else "–", said, sort=None if mean is None or pd.isna(mean) else float(mean))

        return cell

    def caption(self, how: str, counts: Mapping[str, int] | None = None, *, documents: bool = True) -> str:
        """Return the sentence of a figure's caption on its controls, with a space before it: what they are, how many, on which documents; empty without any.

        Args:
            how: What is shown of several: `mean`.
            counts: How many of each kind are shown, where it is not all.
            documents: Whether documents entered what is shown.
        """
        counts = self.counts if counts is None else counts
        if not counts:
            return ""
        parts = [f"{written(count)} {_COUNTED[kind][count > 1]}" for kind, count in counts.items()]
        listed = ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]
        several = f"; their {how}" if any(count > 1 for count in counts.values()) else ""
        return f" Controls: {listed}{several}{self._documents() if documents else ''}."

    def _documents(self) -> str:
        if not self.of or "n" not in self.rows:
            return ""
        n = int(self.rows["n"].max())
        return ", over the same documents" if n == self.of else f", over the first {written(n)} of the {written(self.of)} documents"


def listed(by_kind: Mapping[str, Sequence[float]], say: Callable[[float], str]) -> str:
    """Write a number of every control in a sentence, by kind: `5 of noise of the same size 21 % to 54 %`."""
    told = []
    for kind, words in KIND_NAMES.items():
        if kind != "tuned" and kind in by_kind:
            low, high = say(min(by_kind[kind])), say(max(by_kind[kind]))
            told.append(f"{len(by_kind[kind])} of {words} {low if low == high else f'{low} to {high}'}")
    return ", ".join(told)
