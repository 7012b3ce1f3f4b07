"""Calibration: rates of verdicts and coverages of intervals where the truth is known."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.tables import Shown, Table
from mechscope.report.section import Section, Tables, number, table
from mechscope.report.statements import Card, Derived, Finding
from mechscope.report.theme import percent

CALIBRATION = table(
    "One row per claim or quantity and world whose truth is known.",
    claim="the claim, as in the table claims, or the quantity an interval is for",
    world="what is true there",
    kind="null (the claim is false, or nothing is there), planted (it is there) or coverage (of an interval)",
    size="size of the planted effect; of a coverage the number of units",
    unit="what is observed independently: document, prompt pair, seed, training, head",
    n="draws that count; of a coverage those in which an interval was given",
    withheld=number("draws of a coverage in which no interval was given", "share"),
    rate=number("wrong verdicts under a null, right ones under a planted effect, intervals that hold the truth", "share"),
    low=number("its interval over draws (Wilson, 95\u202f%), lower end", "share"),
    high=number("its interval, upper end", "share"),
    allowed_from=number("least rate that is allowed, with the binomial error of n draws", "share"),
    allowed_to=number("greatest rate that is allowed", "share"),
    holds="whether the rate is allowed; a power always is",
    verdicts="how often each verdict was given",
)

_HEADINGS = {
    "null": ("Nulls: how often a verdict is wrong", "wrong"),
    "coverage": ("Coverage: how often an interval holds the truth", "coverage"),
    "planted": ("Power: how often a planted effect is found", "power"),
}


def _views(tables: Tables) -> list[Shown]:
    shown = []
    for kind, (heading, rate) in _HEADINGS.items():
        rows = tables["calibration"].query("kind == @kind")
        if rows.empty:
            continue
        view = Table(rows).words("claim", "claim or quantity").texts("world", "what is true").words("unit", "unit")
        view = view.numbers("size", "size" if kind == "planted" else "units") if kind != "null" else view
        view = view.numbers("n", "draws").numbers("rate", rate, ends=("low", "high"))
        view = view.numbers("allowed_from", "allowed from") if kind == "coverage" else view
        view = view.numbers("allowed_to", "allowed to") if kind != "planted" else view
        shown.append(Shown(heading, view.texts("verdicts", "verdicts").view()))
    return shown


def _failing(calibration: pd.DataFrame) -> pd.DataFrame:
    return calibration[~calibration["holds"].astype(bool)]


def _draws(rows: pd.DataFrame) -> str:
    low, high = int(rows["n"].min()), int(rows["n"].max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _unseen(rows: pd.DataFrame, kind: str) -> float:
    """Return the rate that so few draws leave unnoticed."""
    return float(rows["allowed_to"].max() if kind == "null" else rows["allowed_from"].min())


def _findings(tables: Tables) -> list[Finding]:
    calibration, found = tables["calibration"], list[Finding]()
    judged = calibration[calibration["kind"] != "planted"]
    held, every = (
        Derived("calibration", (("kind", "!=", "planted"), ("holds", "==", False))),
        Derived("calibration", (("kind", "!=", "planted"),)),
    )
    if len(judged):
        text = f"{held.written(tables)} of {every.written(tables)} error rates and coverages are shown not to be as claimed"
        note = "5\u202f% wrong verdicts, 93 to 97\u202f% coverage, with binomial error"
        card = Card(f"{held.written(tables)} of {every.written(tables)}", "error rates and coverages not as claimed", note)
        found.append(
            Finding(
                text,
                n=judged["n"].min(),
                unit="draws of each or more",
                derived=(held, every),
                rows=_fewest(judged),
                card=card,
                table="calibration",
            )
        )
    for kind, words in (("null", "wrong verdicts"), ("coverage", "intervals that hold the truth")):
        rows = calibration[calibration["kind"] == kind]
        if len(rows):
            here = (("kind", "==", kind),)
            bad, all_of_them = Derived("calibration", (*here, ("holds", "==", False))), Derived("calibration", here)
            found.append(
                Finding(
                    f"{bad.written(tables)} of {all_of_them.written(tables)} rates of {words} are shown not to be as claimed; of the fewest draws, a rate "
                    f"{'of up to' if kind == 'null' else 'down to'} {percent(_unseen(rows, kind))} would not be noticed",
                    n=rows["n"].min(),
                    unit="draws of each or more",
                    derived=(bad, all_of_them),
                    rows=_fewest(rows),
                    folded=not bad.of(tables),
                    table="calibration",
                )
            )
    return found + [
        Finding(
            f"Not calibrated: {row['claim']} where {row['world']}: {percent(row['rate'])}",
            n=row["n"],
            unit="draws",
            rows=(row,),
            effect=1.0,
            table="calibration",
        )
        for _, row in _failing(calibration).iterrows()
    ]


def _fewest(rows: pd.DataFrame) -> tuple[pd.Series, ...]:
    return (rows.iloc[int(rows["n"].to_numpy().argmin())],)


SECTION = Section(
    id="calibration",
    heading="Calibration",
    intro="Worlds whose truth is known were drawn many times and judged by the functions that judge real models. Under a null the share of wrong "
    "verdicts may be 5\u202f% at most, and an interval that claims 95\u202f% must hold the truth in 93 to 97\u202f%, both but for the "
    "binomial error of as many "
    "draws (central 99\u202f%). Power is how often a planted effect of a given size is found.",
    tables={"calibration": CALIBRATION},
    views=_views,
    findings=_findings,
)
