"""Plain Hugging Face models beside mechscope's: the family's own attention by maps, with a head that can be switched off in it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests import families
from tests.matrix.configs import families as classes
from tests.matrix.configs import tiny

_NAME = "one head off"
# parameters of a tiny model
_MOST = 3_000_000
_off: list[tuple[int, int]] = []


def build(family: str, seed: int, dtype: torch.dtype) -> Any:
    """Return a tiny random model of a family."""
    made = getattr(transformers, classes()[family])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in made._from_config(tiny(family)).parameters())
    if size > _MOST:
        raise ValueError(f"its tiny configuration makes a model of {size:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = made._from_config(tiny(family)).float()
    families.randomize(model, seed)
    for config in (model.config, model.config.get_text_config()):
        config._experts_implementation = "eager"  # the grouped kernel knows no float64
    return model.to(dtype).eval()


def _eager(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    z, weights = sys.modules[type(module).__module__].eager_attention_forward(module, query, *args, **kwargs)
    for layer, head in _off:
        if module.layer_idx == layer:
            z = z.clone()
            z[:, :, head] = 0.0
    return z, weights


AttentionInterface.register(_NAME, _eager)
AttentionMaskInterface.register(_NAME, eager_mask)


@contextlib.contextmanager
def head_off(model: Any, layer: int, head: int) -> Iterator[None]:
    """Let a plain model run without what one head computes."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    _off.append((layer, head))
    try:
        yield
    finally:
        _off.pop()
        model.set_attn_implementation(before)
