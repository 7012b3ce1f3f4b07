"""`docs/calibration.md`, written from a run of `mechscope calibrate`: error rates, coverages and power, every one with its draws."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from mechscope.errors import RunError
from mechscope.report.sections.calibration import SECTION
from mechscope.report.theme import number
from mechscope.store.run import RunFolder

_HEAD = """# Calibration

How often mechscope is right where the truth is known. Written from a run of

    make truth

(`mechscope calibrate --form full`, then `python -m mechscope.report.calibration RUN`); do not edit.

"""
_PARTS = {
    "null": ("Nulls: how often a verdict is wrong", ("claim", "what is true", "unit", "draws", "wrong", "allowed to", "verdicts")),
    "coverage": (
        "Coverage of 95\u202f% intervals by number of units",
        ("quantity", "what is true", "unit", "units", "draws", "coverage", "allowed", "no interval"),
    ),
    "planted": ("Power: how often a planted effect is found", ("claim", "what is true", "unit", "size", "draws", "found")),
}


def calibration_page(calibration: pd.DataFrame) -> str:
    """Return the page as Markdown, from the table `calibration`."""
    return _HEAD + SECTION.intro + "\n" + "".join(_parts(calibration))


def _parts(calibration: pd.DataFrame) -> Iterator[str]:
    for finding in SECTION.findings({"calibration": calibration}):
        yield f"\n- {finding.sentence}"
    yield "\n"
    for kind, (heading, columns) in _PARTS.items():
        rows = calibration[calibration["kind"] == kind].to_dict("records")
        if rows:
            yield f"\n## {heading}\n\n" + _line(columns) + _line(["---"] * len(columns))
            yield from (_line(_cells(kind, row)) for row in rows)


def _cells(kind: str, row: Mapping[Any, Any]) -> list[str]:
    rate = f"{number(row['rate'])} ({number(row['low'])} to {number(row['high'])})"
    rate = rate if row["holds"] else f"**{rate}**"
    begin = [f"`{row['claim']}`" if kind != "coverage" else str(row["claim"]), str(row["world"]), str(row["unit"])]
    draws = f"{row['n']:,}"
    if kind == "null":
        return [*begin, draws, rate, number(row["allowed_to"]), str(row["verdicts"])]
    size = number(row["size"])
    if kind == "planted":
        return [*begin, size, draws, rate]
    allowed = f"{number(row['allowed_from'])} to {number(row['allowed_to'])}"
    return [*begin, size, draws, rate, allowed, number(row["withheld"])]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    try:
        print(calibration_page(RunFolder.read(sys.argv[1]).table("calibration")), end="")
    except RunError as error:
        sys.exit(str(error))
