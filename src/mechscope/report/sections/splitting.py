"""Dictionaries beside one another: whether latents are found again, split or new, and which of two keeps more."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mechscope.report.marks.tables import Cell, Row, Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.statements import Caveat, Finding
from mechscope.report.theme import interval, percent

_SHARES = ("explained variance", "loss recovered, mean")

TABLES = {
    "dictionary_splitting": table(
        "One row per pair of dictionaries (or parts of a nested one), measure and control.",
        dictionary="the dictionary, or part of one, whose latents are looked for",
        against="the one that they are looked for in",
        measure="largest cosine (its mean is the MMCS); found again (share with a cosine of at least 0.7); split into (latents of the other that are closest "
        "to one, that close); new in the other (share of its latents that are close to none)",
        control="empty; random directions in the place of the other's latents",
        n="latents",
        value=number("the measure: mean over latents", "cosine, share or latents, by the measure", "low", "high", bare=True),
        withheld="why it is not given; empty where it is",
    ),
    "dictionary_differences": table(
        "One row per pair of dictionaries, measure and place: how much more the first has than the other, on the same tokens.",
        dictionary="the first dictionary",
        against="the other",
        measure="what was measured, as in dictionary_measures",
        place="where",
        n="texts",
        value=number("the difference", "share, nats or latents, by the measure", "low", "high", bare=True),
        withheld="why it is not given; empty where it is",
        note="what must be known to read it; empty where nothing",
    ),
}


def _views(tables: Tables) -> list[Shown]:
    shown = []
    if "dictionary_splitting" in tables:
        view = Table(tables["dictionary_splitting"]).words("dictionary", "latents of").words("against", "in").words("measure", "measure")
        view = view.cells("control", "which is", _which).shares("value", "value", ends=("low", "high")).numbers("n", "latents")
        shown.append(Shown("Latents found again", view.view(), terminal=True, table="dictionary_splitting"))
    if "dictionary_differences" in tables:
        view = (
            Table(tables["dictionary_differences"]).words("dictionary", "dictionary").words("against", "less").words("measure", "measure")
        )
        view = view.words("place", "place").shares("value", "difference", ends=("low", "high"), sign=True).numbers("n", "texts")
        shown.append(Shown("Differences of measures", view.view(), terminal=True, table="dictionary_differences"))
    return shown


def _which(row: Row) -> Cell:
    return Cell(str(row["control"]) or "itself")


def _findings(tables: Tables) -> list[Finding]:
    found = []
    splitting = tables.get("dictionary_splitting")
    if splitting is not None:
        again = splitting[splitting["measure"] == "found again"]
        for (name, other), own in again.groupby(["dictionary", "against"], sort=False):
            found.append(_found_again(str(name), str(other), own))
    differences = tables.get("dictionary_differences")
    if differences is not None:
        for _, row in differences[differences["measure"].isin(_SHARES)].iterrows():
            found.append(_difference(row))
    return found


def _found_again(name: str, other: str, own: pd.DataFrame) -> Finding:
    row, chance = own[own["control"] == ""].iloc[0], own[own["control"] != ""].iloc[0]
    if row["withheld"]:
        words = f"how many of the latents of {name} are found again in {other}"
        return Finding(words, n=row["n"], rows=(row,), withheld=str(row["withheld"]), table="dictionary_splitting", unit="latents")
    return Finding(
        f"{_share(row)} of the latents of {name} are found again in {other}; in as many random directions {percent(chance['value'])}",
        n=row["n"],
        rows=(row, chance),
        effect=float(row["value"]),
        table="dictionary_splitting",
        unit="latents",
    )


def _difference(row: pd.Series) -> Finding:
    what = "of the variance" if row["measure"] == "explained variance" else "of the loss that the mean in its place costs"
    if row["withheld"]:
        words = f"how much more {what} at {row['place']} dictionary {row['dictionary']} keeps than {row['against']}"
        return Finding(words, n=row["n"], rows=(row,), withheld=str(row["withheld"]), table="dictionary_differences")
    size = 100 * abs(row["value"])
    ends = (100 * row["low"], 100 * row["high"]) if row["value"] >= 0 else (-100 * row["high"], -100 * row["low"])
    return Finding(
        f"Dictionary {row['dictionary']} keeps {size:.1f} {interval(*ends)} percentage points {'more' if row['value'] >= 0 else 'less'} {what} at "
        f"{row['place']} than {row['against']}",
        n=row["n"],
        rows=(row,),
        effect=float(row["value"]),
        table="dictionary_differences",
    )


def _share(row: Any) -> str:
    return f"{percent(row['value'])} {interval(100 * row['low'], 100 * row['high'])}".strip()


def _caveats(tables: Tables) -> list[Caveat]:
    if "dictionary_splitting" not in tables:
        return []
    words = "Latents are compared by what they write: two that write alike may be active in different texts."
    return [Caveat(words, weakens="dictionary_splitting")]


SECTION = Section(
    id="splitting",
    heading="Dictionaries beside one another",
    intro=(
        "Two latents count as the same where the cosine of what they write is at least 0.7. A wider dictionary may keep a latent, split it into several, or "
        "have new ones. Random directions stand beside it, as in few dimensions much is close to something."
    ),
    tables=TABLES,
    views=_views,
    findings=_findings,
    caveats=_caveats,
)
