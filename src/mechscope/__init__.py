"""mechscope: a microscope for what fine-tuning does to GPT-like language models.

import mechscope

subject = mechscope.load("gpt2")
found = mechscope.diff("gpt2", "my-finetuned-gpt2", "articles.jsonl")
found.layers, found.heads, found.weights, found.outputs
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechscope.api import Edit, Knockout, bakeoff, check, diff, intervene, load, record, study, tune
    from mechscope.subject.components import Components

__version__ = "0.1.0"
__all__ = ["Components", "Edit", "Knockout", "bakeoff", "check", "diff", "intervene", "load", "record", "study", "tune"]


def __getattr__(name: str) -> Any:
    # on first use: importing mechscope must not cost the import of torch
    if name == "Components":
        from mechscope.subject.components import Components

        return Components
    if name in __all__:
        from mechscope import api

        return getattr(api, name)
    raise AttributeError(f"module 'mechscope' has no attribute {name!r}")
