"""mechscope: a microscope for what fine-tuning does to GPT-like language models.

import mechscope

subject = mechscope.load("gpt2")
result = mechscope.diff("gpt2", "my-finetuned-gpt2", "articles.jsonl")
result.layers, result.heads, result.weights, result.outputs

Every job of the command line is a function here (`mechscope.patch`, `mechscope.circuit`, …), with its settings as keywords; the techniques themselves are in
`mechscope.causal`, `mechscope.circuits`, `mechscope.lens`, `mechscope.heads`, `mechscope.weights`, `mechscope.difference` and `mechscope.adapt`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechscope.instrument import Check as Check
    from mechscope.instrument import Edit as Edit
    from mechscope.instrument import Execution as Execution
    from mechscope.instrument import Knockout as Knockout
    from mechscope.instrument import check_subject as check_subject
    from mechscope.instrument import load as load
    from mechscope.instrument import load_pair as load_pair
    from mechscope.instrument.intervene import intervene as intervene
    from mechscope.instrument.record import record as record
    from mechscope.report.notebook import plot as plot
    from mechscope.subject import Components as Components

__version__ = "0.1.0"

_INSTRUMENT = ("Check", "Edit", "Execution", "Knockout", "check_subject", "intervene", "load", "load_pair", "record")


def __getattr__(name: str) -> Any:
    # on first use: importing mechscope must not cost the import of torch
    if name in _INSTRUMENT:
        from mechscope import instrument

        return getattr(instrument, name)
    if name == "plot":
        from mechscope.report.notebook import plot

        return plot
    if name == "Components":
        from mechscope.subject import Components

        return Components
    # a module that is not imported yet is no function: looking for one would import every job
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is None:
        from mechscope.api import functions

        if name in functions():
            return functions()[name]
    raise AttributeError(f"module 'mechscope' has no attribute {name!r}")


def __dir__() -> list[str]:
    from mechscope.api import functions

    return sorted([*_INSTRUMENT, "Components", "plot", "__version__", *functions()])
