"""What prose says: every number of a finding or a card stands in the tables it is read from, and each says on how many observations of which unit it rests."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.report.contents import Contents
from mechscope.report.sections import sections
from mechscope.report.statements import QUESTIONS, Derived, Finding
from mechscope.report.summary import Summary
from mechscope.report.theme import number, percent
from tests.report import synthetic
from tests.report.drawn import figures_of, statements_of
from tests.report.test_sections import everything

# what looks like a number and is a name, a level or a literal of a definition
_NAMES = re.compile(
    r"gpt2-news-7m|“[^”]*”|'[^'\s][^']*'(?!s)|arXiv [\d.]+|ROUGE-\w+|\bq < 0\.05|\b5\u202f% of those named|\b(?:a|m|resid)\d+(?:\.[hnef]\d+)?(?:<[qkv]>)?"
    r"|faithfulness, 1: all|copying score above 0\.5|5.% wrong verdicts, 93 to 97.%|offsets 0–"
)
_NUMBER = re.compile(r"(?<![\w.])[+−]?\d[\d,]*(?:\.\d+)?(?:e[+−]?\d+)?(?:\u202f%)?")


def numbers(text: str) -> list[str]:
    """Return the numbers that a text prints, as it prints them."""
    return [found.rstrip(",") for found in _NUMBER.findall(_NAMES.sub(" ", text))]


def printed(value: float) -> set[str]:
    """Return every way in which the report prints a number: with two to four digits, whole, as a share, in hundredths."""
    ways = {number(value, digits=digits, sign=sign) for digits in (2, 3, 4) for sign in (False, True)}
    ways |= {percent(value, digits=digits) for digits in (0, 1, 2)} | {number(100 * value, sign=sign) for sign in (False, True)}
    return ways | ({number(int(value)), number(int(value), sign=True)} if float(value).is_integer() else set())


def cells(row: Any) -> Iterator[Any]:
    yield from (row.items() if isinstance(row, Mapping) else row.to_dict().items())


def readable(finding: Finding, tables: Mapping[str, pd.DataFrame]) -> set[str]:
    """Return every number that a finding may print: of the rows it quotes, of what it derives, and its n."""
    known: set[str] = set()
    for row in finding.rows:
        for _, cell in cells(row):
            if isinstance(cell, str):
                known |= {*re.findall(r"\d+", cell), *_NUMBER.findall(cell)}
            elif isinstance(cell, (int, float, np.number)) and not isinstance(cell, (bool, np.bool_)) and np.isfinite(float(cell)):
                known |= printed(float(cell))
    for derived in finding.derived:
        known |= printed(recounted(derived, tables))
    known |= set(_NUMBER.findall(finding.withheld))
    return known | (set() if finding.n is None or not finding.sample else printed(float(finding.n)))


def recounted(derived: Derived, tables: Mapping[str, pd.DataFrame]) -> float:
    """Work a derived number out again, row by row."""

    def so(row: Mapping[Any, Any]) -> bool:
        compare = {"==": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b,
                   ">=": lambda a, b: a >= b, "ends unlike": lambda a, b: not str(a).endswith(b)}  # fmt: skip
        return all(bool(compare[comparison](row[column], value)) for column, comparison, value in derived.where)

    rows = [row for row in tables[derived.table].to_dict("records") if so(row)]
    values = [row[derived.column] for row in rows] if derived.column else []
    held = [value for value in values if value == value]
    comes_to = {
        "count": lambda: len(rows), "distinct": lambda: len(set(values)), "sum": lambda: sum(held), "mean": lambda: sum(held) / len(held),
        "median": lambda: float(np.median(held)), "min": lambda: min(held), "max": lambda: max(held),
        "negative": lambda: sum(value < 0 for value in values) / len(values),
    }  # fmt: skip
    return float(comes_to[derived.how]())


def stands(row: Any, tables: Mapping[str, pd.DataFrame]) -> bool:
    """Tell whether the numbers of a quoted row are those of one row of a table."""
    quoted = {str(name): cell for name, cell in cells(row)}
    for table in tables.values():
        shared = [name for name in quoted if name in table.columns]
        if len(shared) < len(quoted):
            continue
        same = pd.Series(True, index=table.index)
        for name in shared:
            same &= pd.Series([_same(cell, quoted[name]) for cell in table[name]], index=table.index)
        if same.any():
            return True
    return False


def _same(cell: Any, other: Any) -> bool:
    if isinstance(cell, (list, np.ndarray)):
        return list(cell) == list(other)
    if pd.isna(cell) or pd.isna(other):
        return bool(pd.isna(cell)) and bool(pd.isna(other))
    return bool(cell == other)


def prose(finding: Finding) -> str:
    card = finding.card
    return " ".join([finding.text, *([card.value, card.label, card.note] if card is not None else [])])


@cache
def findings() -> list[tuple[str, Finding]]:
    """Return every finding of every section on all measured and invented tables, and on the tables of each section alone."""
    tables = everything()
    return [(section.id, finding) for section in sections().values() if section.present(tables) for finding in section.findings(tables)]


@pytest.mark.parametrize("section", sections())
def test_every_number_of_the_prose_stands_in_the_tables(section: str) -> None:
    tables = everything()
    for finding in statements_of(tables, section):
        unread = [printed for printed in numbers(prose(finding)) if printed not in readable(finding, tables)]
        assert not unread, f"{finding.sentence} prints {unread}, which stands in no cell that it quotes"
        assert all(stands(row, tables) for row in finding.rows), f"{finding.sentence} quotes a row that no table has"


def test_every_number_of_the_verdict_stands_in_the_tables() -> None:
    tables = everything()
    verdict = Summary.of(Contents(Path(), dict(tables), {}, synthetic.manifest())).verdict
    assert len(verdict) == 5
    for finding in verdict:
        unread = [printed for printed in numbers(prose(finding)) if printed not in readable(finding, tables)]
        assert not unread, f"{finding.sentence} prints {unread}, which stands in no cell that it quotes"
        assert all(stands(row, tables) for row in finding.rows), f"{finding.sentence} quotes a row that no table has"


def test_a_wrong_number_is_found() -> None:
    tables = {"t": pd.DataFrame({"name": ["a", "b"], "x": [0.25, 0.5], "n": [8, 8]})}
    row, count = tables["t"].iloc[0], Derived("t", (("x", ">", 0.3),))
    right = Finding("a has 0.250, and 1 of them more", n=8, rows=(row,), derived=(count,))
    assert set(numbers(right.text)) <= readable(right, tables)
    for wrong in ("a has 0.500", "a has −0.250", "a has 0.251", "2 of them more"):
        assert not set(numbers(wrong)) <= readable(right, tables)
    assert stands(row, tables)
    assert not stands(row.replace(0.25, 0.26), tables)


def test_a_finding_says_on_how_many_observations_of_which_unit_it_rests() -> None:
    # weights are no sample, and neither is what was asked for: a metric, budgets
    weights, design = {"weights", "head-weights", "positions", "ground-truth"}, {"circuit_curve", "bakeoff"}
    for section, finding in findings():
        if section in weights:
            assert finding.n is None
        elif not finding.withheld and finding.table not in design:
            assert finding.sample, f"{section}: {finding.sentence}"
            assert re.search(r"n = [\d,]+ [a-z]", finding.sentence)


def test_what_is_withheld_gives_its_reason_and_no_number() -> None:
    tables = everything()
    sets = tables["layer_sets"]
    reason = "fine-tuning did not lower the loss"
    (withheld,) = statements_of({"layer_sets": sets.assign(withheld=reason, share=np.nan)}, "matters")
    assert withheld.sentence.startswith("What the selected layers")
    assert f"withheld, as {reason}" in withheld.sentence
    assert "%" not in withheld.sentence
    assert withheld.card is not None
    assert withheld.card.value == "withheld"


def test_every_question_is_one_of_a_readers() -> None:
    assert {section.question for section in sections().values()} <= {"", *QUESTIONS}
    assert {finding.question for _, finding in findings()} <= {"", *QUESTIONS}


def test_a_sentence_begins_with_a_capital_but_for_names_of_parts() -> None:
    assert Finding("the loss fell", n=1, unit="documents").sentence == "The loss fell (n = 1 document)."
    assert Finding("a3.h0 adds most (0.5 logits)", n=12).sentence == "a3.h0 adds most (0.5 logits; n = 12 texts)."
    assert Finding("copying (4)", n=12).sentence == "Copying (4) (n = 12 texts)."
    assert Finding("what it says", withheld="there are too few texts").sentence == "What it says: withheld, as there are too few texts."


@pytest.mark.parametrize("section", sections())
def test_every_caption_says_how_many_observations_it_shows(section: str) -> None:
    for figure in figures_of(everything(), section):
        assert re.search(r"\bn = [\d,]+(?: to [\d,]+)? \w+", figure.caption) or "no sample" in figure.caption, (
            f"{figure.name}: {figure.caption}"
        )
