"""Verdicts in words: how many parts changed by more than what matters, how many are shown not to have, and how many are undecided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd

from mechscope.report.marks.heatmaps import Q_SIGNIFICANT
from mechscope.report.section import Column, Tables
from mechscope.report.shared import estimated, of_rows
from mechscope.report.statements import Card, Derived, Finding
from mechscope.report.theme import number as written

VERDICT = Column("changed: more than the smallest effect of interest; negligible: shown to be less; undecided; not measured")
"""Column of a verdict on a quantity, see `mechscope.stats.verdicts`."""
FEWEST = 12
"""Documents below which there is no verdict, as `mechscope.stats.verdicts` has it."""
FEWEST_SETS = 40
"""Other sets among which a selected one can stand out at 5 %, two-sided: the smallest p of a rank among n others is 1 / (n + 1)."""
_WORDS = ("changed", "negligible", "undecided", "not measured")


def rank_verdict(row: pd.Series | Mapping[Any, Any]) -> Literal["more", "less", "undecided"]:
    """Judge whether a selected set is more, or less, than sets drawn like it, by its two ranks among them (`p_random`, `p_less`), two-sided at 5 %."""
    level = Q_SIGNIFICANT / 2
    return "more" if row["p_random"] < level else "less" if row["p_less"] < level else "undecided"


def smallest_row(tables: Tables, table: str, quantity: str) -> tuple[pd.Series, ...]:
    """Return the row of the smallest effect of interest of a table's quantity; none where it is not known."""
    if "smallest_effects" not in tables:
        return ()
    effects = tables["smallest_effects"]
    found = effects[(effects["table"] == table) & (effects["quantity"] == quantity)]
    return (found.iloc[0],) if len(found) else ()


def smallest_of(tables: Tables, table: str, quantity: str) -> float:
    """Return the smallest effect of interest of a table's quantity; NaN where it is not known."""
    rows = smallest_row(tables, table, quantity)
    return float(rows[0]["smallest"]) if rows else float("nan")


def effect_of(tables: Tables, table: str, quantity: str, value: float) -> float:
    """Return the size of an effect in smallest effects of interest, to order findings by; as it is where none is known."""
    smallest = smallest_of(tables, table, quantity)
    return abs(float(value)) / (smallest if smallest > 0 else 1.0)


def negligible(table: pd.DataFrame, quantities: Sequence[str]) -> pd.Series:
    """Return which rows are negligible in every quantity that was judged of them; one of which nothing was judged is not."""
    found = table[[f"{quantity}_verdict" for quantity in quantities]]
    return found.isin(["negligible", "not measured"]).all(axis=1) & (found == "negligible").any(axis=1)


def changed_parts(tables: Tables, table: str, quantity: str) -> dict[str, Derived]:
    """Return how many parts, over all tokens, have each verdict on a quantity, and under the empty word how many there are."""
    _, kind = of_rows(tables[table])
    here = (("rows", "==", kind),)
    counts = {word: Derived(table, (*here, (f"{quantity}_verdict", "==", word))) for word in _WORDS}
    return {"": Derived(table, here), **counts}


def largest(table: pd.DataFrame, quantity: str) -> pd.Series:
    """Return the row with the largest effect among those that changed, else among all."""
    changed = table[table[f"{quantity}_verdict"] == "changed"]
    rows = changed if len(changed) else table
    return rows.iloc[int(rows[quantity].abs().to_numpy().argmax())]


def parts_finding(
    tables: Tables,
    table: str,
    quantity: str,
    *,
    of: str,
    what: str,
    unit: str,
    sides: tuple[str, str] | None = None,
    card: str = "",
) -> Finding:
    """Return what is found of a quantity over parts: `3 of 48 heads changed their entropy by more than 0.004 nats; 40 negligible, 5 undecided`.

    Args:
        tables: The run's tables.
        table: The one with a row per part.
        quantity: Its column.
        of: What the parts are called, in the plural.
        what: What they did: `changed their attention entropy`.
        unit: Of the smallest effect, as it stands behind the number; may be empty.
        sides: What those are called that fell and that rose, where they are counted.
        card: What the number of those that changed is called in large; empty for none.
    """
    rows, _ = of_rows(tables[table])
    counts, n = changed_parts(tables, table, quantity), f"{quantity}_n" if f"{quantity}_n" in rows else "n"
    found = {word: int(count.of(tables)) for word, count in counts.items()}
    documents, smallest = int(rows[n].max()), smallest_row(tables, table, quantity)
    whole = f"whether {of} {what}"
    if found["not measured"] == found[""] or not smallest:
        reason = "no smallest effect of interest was measured or set, or no document has such tokens"
        return Finding(whole, withheld=reason, table=table)
    than = f"{written(smallest[0]['smallest'], digits=2)} {unit}".strip()
    if documents < FEWEST:
        text, reason = f"{whole} by more than {than}, the smallest effect of interest", f"a verdict needs {FEWEST} documents"
        return Finding(text, n=documents, unit="documents", rows=smallest, withheld=reason, table=table)
    words = {word: written(count) for word, count in found.items()}
    if not found["changed"] and (found["undecided"] or found["not measured"]):
        text = f"of {words['']} {of} none is shown to have {what} by more than {than}, the smallest effect of interest"
    else:
        text = f"{words['changed'] if found['changed'] else 'none'} of {words['']} {of} {what} by more than {than}, the smallest effect of interest"
    told = (("negligible", "negligible (shown to be smaller)"), ("undecided", "undecided"), ("not measured", "not measured"))
    rest = ", ".join(f"{words[word]} {said}" for word, said in told if found[word])
    text, top, derived = f"{text}; {rest}" if rest else text, largest(rows, quantity), tuple(counts.values())
    if found["changed"]:
        name = top["component"] if "component" in top else f"layer {int(top['layer'])}"
        text += f"; the largest change is that of {name}, {estimated(top, quantity, sign=sides is not None)}"
        if sides is not None:
            fell, rose = (Derived(table, (*counts["changed"].where, (quantity, sign, 0))) for sign in ("<", ">"))
            text += f"; of those that changed {fell.written(tables)} became {sides[0]}, {rose.written(tables)} {sides[1]}"
            derived = (*derived, fell, rose)
    return Finding(
        text,
        n=documents,
        unit="documents",
        rows=(top, *smallest),
        derived=derived,
        effect=effect_of(tables, table, quantity, top[quantity]) if found["changed"] else 0.0,
        folded=not found["changed"],
        card=Card(f"{words['changed']} of {words['']}", card, f"by more than {than}{f'; {rest}' if rest else ''}") if card else None,
        table=table,
    )
