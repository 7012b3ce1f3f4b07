"""One attention function for every architecture.

transformers lets a program register an attention implementation; some 350 model families call it with per-head query, key and value, after
rotary embedding. While a model is observed it is switched to the function registered here. It computes what the model would have computed
(the same fused kernel, or the exact block-of-queries form where scores are soft-capped) and shows every call to the taps that watch that
module. A tap may return a replacement for z, the heads' outputs before W_O. Idea 1 of the design.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mechscope.errors import ModelError
from mechscope.instrument.kernels import pattern_blocks
from mechscope.subject.load import Subject

NAME = "mechscope"


@dataclass(frozen=True)
class AttentionCall:
    """What one attention module was called with, in one layer.

    Attributes:
        layer: Which block.
        query: ``(batch, head, query, d_head)``, after rotary embedding and query norm.
        key: ``(batch, kv_head, key, d_head)``; grouped heads are not repeated.
        value: ``(batch, kv_head, key, d_head)``.
        z: ``(batch, query, head, d_head)``: the heads' outputs before the output projection.
        scaling: Factor on the scores.
        mask: Boolean ``(batch, 1, query, key)``, True where a query may look; None means causal.
        window: Keys that a sliding-window layer can see, None for all.
        softcap: Bound of soft-capped scores (Gemma 2), None for plain scores.
    """

    layer: int
    query: Float[Tensor, "batch head query d"]
    key: Float[Tensor, "batch kv key d"]
    value: Float[Tensor, "batch kv key d"]
    z: Float[Tensor, "batch query head d"]
    scaling: float
    mask: Bool[Tensor, "batch 1 query key"] | None
    window: int | None
    softcap: float | None


Tap = Callable[[AttentionCall], Tensor | None]

# which taps watch which attention module; a module that is gone takes its taps with it
_TAPS: WeakKeyDictionary[nn.Module, list[tuple[int, Tap]]] = WeakKeyDictionary()

# what an attention call may carry besides the arguments named in `_attention`, without changing what the heads compute
_HARMLESS = {
    "is_causal",
    "position_ids",
    "output_attentions",
    "use_cache",
    "cache_position",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    unknown = [name for name, value in options.items() if value is not None and name not in _HARMLESS and isinstance(value, Tensor | float)]
    if unknown:
        raise ModelError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention: mechscope does not know what that does to the pattern"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if softcap is None:
        z, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
    else:
        z = _softcapped(query, key, value, attention_mask, scaling, softcap)
    for layer, tap in tuple(_TAPS.get(module, ())):
        call = AttentionCall(layer, query, key, value, z, scaling, attention_mask, sliding_window, softcap)
        replacement = tap(call)
        z = z if replacement is None else replacement
    return z, None


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float) -> Tensor:
    """Compute z where scores are soft-capped, which no fused kernel on a CPU does."""
    values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    z = [
        block.log_pattern.exp().to(value.dtype) @ values[:, :, : block.log_pattern.shape[-1]]
        for block in pattern_blocks(query, key, scaling=scaling, mask=mask, softcap=softcap)
    ]
    return torch.cat(z, dim=2).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def observed(subject: Subject, tap: Tap | None = None) -> Iterator[None]:
    """Route a model's attention through mechscope, showing every call to a tap; nests, and restores the model in any case.

    An adapter is on or off inside as the subject says, so that the view without it can be run as it is.

    Args:
        subject: The model to watch.
        tap: Called after every attention module; may return a replacement of z. None only switches the implementation.
    """
    config = subject.plain.config
    before = config._attn_implementation
    modules = [block.attention for block in subject.anatomy.blocks]
    if before != NAME:
        subject.plain.set_attn_implementation(NAME)
    entries = [] if tap is None else [(module, (layer, tap)) for layer, module in enumerate(modules)]
    for module, entry in entries:
        _TAPS.setdefault(module, []).append(entry)
    try:
        with subject.active():
            yield
    finally:
        for module, entry in entries:
            _TAPS[module].remove(entry)
        if before != NAME:
            subject.plain.set_attn_implementation(before)
