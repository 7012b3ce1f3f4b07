"""Of few texts the page says once that nothing has an interval or a test, and prints neither."""

from __future__ import annotations

import numpy as np
import pytest

from mechscope.causal.effects import effects
from mechscope.report.section import Tables
from mechscope.report.sections import effects as section
from mechscope.stats.inference import MIN_TEXTS


def tables(texts: int, *, corrupt: bool = True) -> Tables:
    """Return the table of a sweep over three heads."""
    random = np.random.default_rng(0)
    places = [{"component": f"a0.h{head}", "site": "z", "layer": 0, "head": head, "feature": -1, "positions": "all"} for head in range(3)]
    values = 3.0 + 0.1 * random.normal(size=(3, texts)) + np.array([[1.0], [0.5], [0.0]])
    clean = np.full(texts, 5.0) + 0.1 * random.normal(size=texts)
    ends = (clean, np.full(texts, 3.0)) if corrupt else (None, None)
    return {"effects": effects(places, values, np.full(texts, 3.0), metric="logit-diff", clean=ends[0], corrupt=ends[1]).table}


@pytest.mark.parametrize("corrupt", [True, False], ids=["with shares", "without"])
def test_few_texts_are_said_once(corrupt: bool) -> None:
    few = tables(3, corrupt=corrupt)
    assert few["effects"][["low", "high", "p", "q"]].isna().all(axis=None)
    (finding,) = section.SECTION.findings(few)
    assert finding.sentence.startswith("The largest effect on logit-diff is +")
    assert finding.sentence.endswith("of a0.h0; none of 3 effects has an interval or a test, which take 6 texts (n = 3 texts).")
    assert " ," not in finding.sentence
    (caveat,) = section.SECTION.caveats(few)
    assert "oo few texts: 3 of at least 6" in caveat.text
    assert "intervals" in caveat.text
    (shown,) = section.SECTION.views(few)
    assert not any("too few" in cell.note for row in shown.view.rows for cell in row)


def test_from_six_texts_on_they_are_given() -> None:
    enough = tables(MIN_TEXTS)
    assert enough["effects"][["low", "high", "p", "q"]].notna().all(axis=None)
    (finding,) = section.SECTION.findings(enough)
    assert "effects differ from zero at q" in finding.sentence
    assert "rough" in section.SECTION.caveats(enough)[-1].text
