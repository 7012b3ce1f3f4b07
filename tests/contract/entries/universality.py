"""The contract of what several models share: that rows are the tokens that were asked for."""

from __future__ import annotations

from mechscope.instrument import Execution
from mechscope.universality import read_rows
from tests.contract.technique import Case, Result, Technique


def rows(case: Case, execution: Execution) -> Result:
    """Read some tokens of every text."""
    places = [range(1, len(pair.clean), 2 + at % 2) for at, pair in enumerate(case.pairs)]
    found = read_rows(case.subject, case.pairs, [tuple(each) for each in places], ("residual", "neuron"), execution=execution)
    return {f"{site}{layer}": value.numpy() for (site, layer), value in found.values.items()}


TECHNIQUES: dict[str, Technique] = {"rows of several models": rows}
