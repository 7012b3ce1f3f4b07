"""The contract of editing."""

from __future__ import annotations

from mechscope import edit
from mechscope.instrument import Execution
from tests.contract.technique import Case, Result, Technique, numbers


def keys(case: Case, execution: Execution) -> Result:
    """Add up the keys of two layers."""
    moments = edit.key_moments(case.subject, case.pairs, layers=[0, 2], execution=execution)
    return {name: array for layer in (0, 2) for name, array in numbers(moments.mean(layer), f"layer {layer}").items()}


TECHNIQUES: dict[str, Technique] = {"keys": keys}
