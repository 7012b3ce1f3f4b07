"""Whole attention patterns of a few documents, for looking at: the one place where tokens × tokens maps are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from mechscope.data.prompt import Example
from mechscope.instrument import AttentionCall, observed, pattern
from mechscope.instrument.walk import run_backbone
from mechscope.subject import Pair


@torch.no_grad()
def attention_patterns(pair: Pair, example: Example) -> dict[str, Tensor]:
    """Return both models' attention patterns over one document.

    Returns:
        `base` and `tuned`, each ``(layer, head, query, key)`` of the layers that attend, in float16: four significant digits, a quarter of the memory of
        float64.
    """
    ids = torch.tensor([example.input_ids])
    patterns = {}
    for name, subject in (("base", pair.base), ("tuned", pair.tuned)):
        layers: list[Tensor] = []

        def keep(call: AttentionCall, layers: list[Tensor] = layers) -> None:
            layers.append(pattern(call)[0].half().cpu())

        with observed(subject, keep):
            run_backbone(subject, ids, None)
        patterns[name] = torch.stack(layers)
    return patterns
