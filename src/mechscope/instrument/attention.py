"""One attention function for every architecture.

transformers lets a program register an attention implementation; some 350 model families call it with per-head query, key and value, after
rotary embedding. While a model is observed it is switched to the function registered here. It computes what the model would have computed
(the same fused kernel, or the exact block-of-queries form where scores are soft-capped) and shows every call to the taps that watch that
module. A tap may return a replacement for z, the heads' outputs before W_O; a rewrite sees what goes in and may change it before anything is
computed. Idea 1 of the design.
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
from mechscope.instrument.rotary import by_own_length
from mechscope.shapes import by_shape
from mechscope.subject.load import Subject

NAME = "mechscope"


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """What one attention module was called with, in one layer.

    Attributes:
        layer: Which block.
        query: ``(batch, head, query, d_head)``, after rotary embedding and query norm.
        key: ``(batch, kv_head, key, d_head)``; grouped heads are not repeated.
        value: ``(batch, kv_head, key, d_head)``.
        scaling: Factor on the scores.
        mask: Boolean ``(batch, 1 or head, query, key)``, True where a query may look; None means causal.
        window: Keys that a sliding-window layer can see, None for all.
        softcap: Bound of soft-capped scores (Gemma 2), None for plain scores.
        sinks: ``(head,)``: a learned score per head that every query sees as if it were one more key, whose value is zero (gpt-oss); None without.
        reach: Keys that the layer's configuration lets its mask alone leave to a query (a window or chunk that the call does not name); None for all.
    """

    layer: int
    query: Float[Tensor, "batch head query d"]
    key: Float[Tensor, "batch kv key d"]
    value: Float[Tensor, "batch kv key d"]
    scaling: float
    mask: Bool[Tensor, "batch some query key"] | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    reach: int | None = None

    __repr__ = by_shape


@dataclass(frozen=True, kw_only=True)
class AttentionCall(AttentionInputs):
    """An attention module's inputs with what its heads made of them.

    Attributes:
        z: ``(batch, query, head, d_head)``: the heads' outputs before the output projection.
    """

    z: Float[Tensor, "batch query head d"]

    __repr__ = by_shape


Tap = Callable[[AttentionCall], Tensor | None]
Rewrite = Callable[[AttentionInputs], AttentionInputs]


@dataclass(frozen=True)
class _Watch:
    """Who watches one attention module, as which layer."""

    layer: int
    tap: Tap | None
    rewrite: Rewrite | None


# a module that is gone takes its watches with it
_WATCHES: WeakKeyDictionary[nn.Module, list[_Watch]] = WeakKeyDictionary()

# what configurations call the keys that a window or chunk leaves
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "window_size")

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
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    unknown = [name for name, value in options.items() if value is not None and name not in _HARMLESS and isinstance(value, Tensor | float)]
    if unknown:
        raise ModelError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention: mechscope does not know what that does to the pattern"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    # keys beyond the queries without a mask: the slots of a static cache that is being filled, which no query sees
    written = query.shape[2] if attention_mask is None and query.shape[2] > 1 else key.shape[2]
    watches = tuple(_WATCHES.get(module, ()))
    given = AttentionInputs(
        layer=watches[0].layer if watches else -1,
        query=query,
        key=key[:, :, :written],
        value=value[:, :, :written],
        scaling=scaling,
        mask=attention_mask,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        reach=None if sliding_window is not None else _reach(module),
    )
    inputs = given
    for watch in watches:
        if watch.rewrite is not None:
            inputs = watch.rewrite(inputs)
    if inputs is given and softcap is None and s_aux is None:
        # as the model itself would have called it, so that watching changes no bit
        z, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
    else:
        z = attend(inputs)
    for watch in watches:
        if watch.tap is not None:
            replacement = watch.tap(AttentionCall(**vars(inputs), z=z))
            z = z if replacement is None else replacement
    return z, None


def _reach(module: nn.Module) -> int | None:
    """Return the shortest window or chunk in a model's configuration: some families (Phi-MoE, Llama 4) hand it to the mask, and not to the call."""
    config = getattr(module, "config", None)
    lengths = [value for name in _WINDOWS if isinstance(value := getattr(config, name, None), int)]
    return min(lengths, default=None)


def attend(inputs: AttentionInputs) -> Float[Tensor, "batch query head d"]:
    """Compute what the heads make of their inputs: z, before the output projection."""
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    value = inputs.value.repeat_interleave(inputs.query.shape[1] // inputs.value.shape[1], dim=1)
    if inputs.softcap is not None or inputs.sinks is not None:  # no fused kernel on a CPU does this
        blocks = pattern_blocks(
            inputs.query, inputs.key, scaling=inputs.scaling, mask=inputs.mask, softcap=inputs.softcap, sinks=inputs.sinks
        )
        z = torch.cat([block.log_pattern.exp().to(value.dtype) @ value[:, :, : block.log_pattern.shape[-1]] for block in blocks], dim=2)
    else:
        z = torch.nn.functional.scaled_dot_product_attention(
            inputs.query,
            inputs.key.repeat_interleave(groups, dim=1),
            value,
            attn_mask=inputs.mask,
            scale=inputs.scaling,
            # one query without a mask is a decoding step: it sees all keys
            is_causal=inputs.mask is None and inputs.query.shape[2] > 1,
        )
    return z.transpose(1, 2).contiguous()


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def through_mechscope(model: Any) -> Iterator[None]:
    """Let a plain Hugging Face model call the attention function above; nests."""
    before = model.config._attn_implementation
    if before == NAME:
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def observed(subject: Subject, tap: Tap | None = None, *, rewrite: Rewrite | None = None) -> Iterator[None]:
    """Route a model's attention through mechscope, showing every call to a tap; nests, and restores the model in any case.

    An adapter is on or off inside as the subject says, so that the view without it can be run as it is.

    Args:
        subject: The model to watch.
        tap: Called after every attention module; may return a replacement of z.
        rewrite: Called before every attention module; returns its inputs, changed or as they are.
    """
    blocks = subject.anatomy.blocks
    entries = [(blocks[layer].attention, _Watch(layer, tap, rewrite)) for layer in subject.anatomy.attending]
    for module, entry in entries:
        _WATCHES.setdefault(module, []).append(entry)
    try:
        with through_mechscope(subject.plain), subject.active(), by_own_length(subject):
            yield
    finally:
        for module, entry in entries:
            # by identity: two observers may be equal
            _WATCHES[module][:] = [other for other in _WATCHES[module] if other is not entry]
