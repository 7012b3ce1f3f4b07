"""Verdicts in words: how many parts changed by more than what matters, how many are shown not to have, and how many are undecided."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from mechscope.report.section import Column
from mechscope.report.theme import number as written

VERDICT = Column("changed: more than the smallest effect of interest; negligible: shown to be less; undecided; not measured")
"""Column of a verdict on a quantity, see `mechscope.stats.verdicts`."""
FEWEST = 8
"""Documents below which there is no verdict, as `mechscope.stats.verdicts` has it."""
_WORDS = ("changed", "negligible", "undecided", "not measured")


def counted(table: pd.DataFrame, quantity: str) -> dict[str, int]:
    """Return how many rows have each verdict on a quantity."""
    found = table[f"{quantity}_verdict"].value_counts()
    return {word: int(found.get(word, 0)) for word in _WORDS}


def smallest_of(tables: Mapping[str, pd.DataFrame], table: str, quantity: str) -> float:
    """Return the smallest effect of interest of a table's quantity; NaN where it is not known."""
    if "smallest_effects" not in tables:
        return float("nan")
    effects = tables["smallest_effects"]
    found = effects.loc[(effects["table"] == table) & (effects["quantity"] == quantity), "smallest"]
    return float(found.iloc[0]) if len(found) else float("nan")


def largest(table: pd.DataFrame, quantity: str) -> pd.Series:
    """Return the row with the largest effect among those that changed, else among all."""
    changed = table[table[f"{quantity}_verdict"] == "changed"]
    rows = changed if len(changed) else table
    return rows.iloc[int(rows[quantity].abs().to_numpy().argmax())]


def in_words(table: pd.DataFrame, quantity: str, smallest: float, *, of: str, what: str, unit: str) -> str:
    """Return the sentence on a quantity: `3 of 48 heads changed their entropy by more than 0.004 nats; 40 are negligible …, 5 undecided`.

    Args:
        table: One row per part.
        quantity: Its column.
        smallest: The smallest effect of interest.
        of: What the parts are called, in the plural.
        what: What they did: `changed their attention entropy`.
        unit: Of the smallest effect, as it stands behind the number; may be empty.
    """
    found, many = counted(table, quantity), len(table)
    if found["not measured"] == many:
        return f"Whether {of} {what} is not judged: no smallest effect of interest was measured or set, or no document has such tokens."
    than = f"{written(smallest, digits=2)} {unit}".strip()
    documents = int(table[f"{quantity}_n" if f"{quantity}_n" in table else "n"].max())
    if documents < FEWEST:
        return f"Whether {of} {what} by more than {than}, the smallest effect of interest, is not judged: {documents} documents of at least {FEWEST}"
    if not found["changed"] and found["undecided"]:
        sentence = f"of {written(many)} {of} none is shown to have {what} by more than {than}, the smallest effect of interest"
    else:
        number = written(found["changed"]) if found["changed"] else "none"
        sentence = f"{number} of {written(many)} {of} {what} by more than {than}, the smallest effect of interest"
    rest = f"{written(found['negligible'])} negligible (shown to be smaller), {written(found['undecided'])} undecided"
    missing = f", {written(found['not measured'])} not measured" if found["not measured"] else ""
    return f"{sentence[0].upper()}{sentence[1:]}; {rest}{missing}"
