"""The contract of the difference of two models."""

from __future__ import annotations

from dataclasses import replace

from mechscope import difference
from mechscope.data.prompt import Encoded
from mechscope.difference import Difference
from mechscope.instrument import Execution
from tests.contract.technique import Case, Result, Technique, columns, numbers


def tables(result: Difference) -> Result:
    """Return the tables of a difference."""
    return numbers({name: getattr(result, name) for name in ("heads", "layers", "weights", "outputs")})


def measured(case: Case, execution: Execution) -> Result:
    """Measure the difference of two models."""
    return tables(difference.difference(case.pair, case.documents, replicates=10, gini=True, execution=execution))


def several(case: Case, execution: Execution) -> Result:
    """Measure two differences in one pass."""
    pairs = {"there": case.pair, "back": replace(case.pair, base=case.pair.tuned, tuned=case.pair.base)}
    documents = Encoded(case.documents.examples, {})
    every = difference.differences(pairs, documents, replicates=10, execution=execution)
    return {f"{name} {key}": values for name, one in every.items() for key, values in tables(one).items()}


def patterns(case: Case, execution: Execution) -> Result:
    """Return both models' patterns over one document; it has no batches."""
    return numbers(difference.attention_patterns(case.pair, case.documents.examples[0]))


TECHNIQUES: dict[str, Technique] = {
    "difference": measured,
    "differences": several,
    "compare weights": lambda case, execution: columns(difference.compare_weights(case.pair, execution=execution).table),
    "attention patterns": patterns,
}
