"""Plain Hugging Face as the oracle, with nothing of mechscope in it: one document at a time, without padding, whole attention maps.

In float32 the maps are those of eager attention. Several of its implementations take the softmax in float32 whatever the type, so in float64 the
oracle is a full-map attention function written here and registered with transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

_MAPS: list[Tensor] = []


def _whole_map(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **options: Any) -> Any:
    group = query.shape[1] // key.shape[1]
    scores = torch.stack([query[:, head] @ key[:, head // group].mT for head in range(query.shape[1])], dim=1) * scaling
    if (cap := options.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    weights = torch.where(mask, scores, -torch.inf).exp() / torch.where(mask, scores, -torch.inf).exp().sum(-1, keepdim=True)
    _MAPS.append(weights)
    z = torch.stack([weights[:, head] @ value[:, head // group] for head in range(query.shape[1])], dim=2)
    return z, weights


AttentionInterface.register("whole_map_oracle", _whole_map)
AttentionMaskInterface.register("whole_map_oracle", sdpa_mask)


@dataclass(frozen=True)
class Truth:
    """What Hugging Face says about one document.

    Attributes:
        maps: One ``(head, query, key)`` per layer, in float64.
        logits: ``(token, vocab)``.
        hidden: ``(token, d_model)`` each: the embedding, the residual stream after every block, and last what the final norm makes of it.
    """

    maps: list[Tensor]
    logits: Tensor
    hidden: list[Tensor]


@lru_cache(maxsize=256)
@torch.no_grad()
def truth(model: Any, text: Tensor) -> Truth:
    """Run one document, ``(token,)``, through the plain model with whole attention maps; remembered by the objects given."""
    implementation = model.config._attn_implementation
    exact = model.dtype == torch.float64
    last: list[Tensor] = []
    handle = _last_block(model).register_forward_hook(
        lambda _, args, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    model.set_attn_implementation("whole_map_oracle" if exact else "eager")
    _MAPS.clear()
    try:
        output = model(text[None], output_attentions=not exact, output_hidden_states=True, use_cache=False)
    finally:
        model.set_attn_implementation(implementation)
        handle.remove()
    maps = list(_MAPS) if exact else output.attentions
    # the last entry of hidden_states is after the final norm: the last block's own output stands before it
    hidden = [*output.hidden_states[:-1], last[0], output.hidden_states[-1]]
    return Truth([p[0].double() for p in maps], output.logits[0], [h[0] for h in hidden])


def _last_block(model: Any) -> Any:
    """Find the last member of the one list as long as the model is deep."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    assert len(lists) == 1
    return lists[0][-1]


def rows(p: Tensor, start: int = 0) -> Iterator[tuple[tuple[int, int], list[float]]]:
    """Yield ((head, query), the keys' shares that the query may see) of one map, as plain numbers."""
    for head in range(p.shape[0]):
        for query in range(p.shape[1]):
            yield (head, query), p[head, query, start : query + 1].tolist()


def entropy(p: Tensor) -> Tensor:
    """−Σ p log p of ``(…, key)``."""
    return -(p * p.clamp(min=1e-300).log()).sum(-1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p/q) of ``(…, key)``."""
    return (p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log())).sum(-1)
