"""What tests of directions share: texts, a random direction at a site, and the values recorded there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.causal.steering import Direction
from mechscope.instrument import record
from mechscope.instrument.walk import model_inputs
from mechscope.subject.load import Subject
from tests import families

FOUR = pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
TEXTS = families.documents(seed=0)


def direction(subject: Subject, site: str = "residual", layer: int = 1, head: int | None = None, seed: int = 0) -> Direction:
    block = subject.anatomy.blocks[layer]
    width = {"neuron": block.d_mlp, "head": block.output.width}.get(site, families.WIDTH)
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Direction.from_vector(drawn, site=site, layer=layer, head=head)


@torch.no_grad()
def recorded(subject: Subject, texts: families.Texts, site: Any, layer: int) -> Tensor:
    with record(subject, site, layers=[layer]) as recording:
        subject.plain(**model_inputs(texts.ids, texts.real), use_cache=False)
    return recording[site, layer]
