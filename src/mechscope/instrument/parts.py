"""Running one part of a block by itself: attention from given projections, the MLP on a given residual stream.

The model's own code does it, so that rotary embeddings, norms of queries and keys, masks and activations are what they are in the family.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechscope.errors import ModelError
from mechscope.instrument.attention import AttentionInputs, attend, observed
from mechscope.instrument.outputs import tensor_of
from mechscope.instrument.substitutes import stubbed, writing_instead
from mechscope.instrument.walk import Walk
from mechscope.subject.anatomy import Block, Slice
from mechscope.subject.load import Subject
from mechscope.subject.placement import place_of

PARTS = ("query", "key", "value")


def attention_inputs(
    walk: Walk,
    layer: int,
    query: Float[Tensor, "batch token head d"],
    key: Float[Tensor, "batch token head d"],
    value: Float[Tensor, "batch token head d"],
) -> AttentionInputs:
    """Turn projections into what attention computes with, by the model's own code: norms of q and k, rotary embedding, mask, scaling.

    Args:
        walk: A pass of as many texts.
        layer: Which block.
        query: Each head's projection of what it read, bias included.
        key: Each head's projection, bias included, one for every query head, also where key weights are shared.
        value: Each head's projection, one for every query head.

    Raises:
        ModelError: Keys and values come from a latent (DeepSeek), or the block does not call its attention.
    """
    block = walk.subject.anatomy.blocks[layer]
    if block.key.width != block.query.width:
        raise ModelError(
            f"{walk.subject.family}: keys and values of block {layer} come from a latent, so heads cannot be run from projections of their own; patterns, "
            "recording, patching and ablation work"
        )
    group = walk.subject.anatomy.n_heads // walk.subject.anatomy.n_kv_heads
    # of a model over several devices: substitutes for modules do not move what they are given, as accelerate's hooks do
    place = place_of(block.module)
    query, key, value = (x.to(place) for x in (query, key, value))
    calls = []
    for member in range(group):  # of each group of query heads, one brings its key and value
        given = {"query": query, "key": key[:, :, member::group], "value": value[:, :, member::group]}
        calls.append(_caught(walk, layer, _outputs(block, given)))
    if group == 1:
        return calls[0]
    own = {name: torch.stack([getattr(one, name) for one in calls], dim=2).flatten(1, 2) for name in ("key", "value")}
    return AttentionInputs(**{**vars(calls[0]), **own})


def attention_of(walk: Walk, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Float[Tensor, "batch token head d"]:
    """Return the heads' z from their projections, ``(batch, token, head, d)`` each, with a key and value for every query head."""
    return attend(attention_inputs(walk, layer, query, key, value))


class _Caught(Exception):
    """Ends a block's forward where attention begins."""

    def __init__(self, inputs: AttentionInputs) -> None:
        self.inputs = inputs


def _caught(walk: Walk, layer: int, outputs: dict[nn.Module, Tensor]) -> AttentionInputs:
    def stop(inputs: AttentionInputs) -> AttentionInputs:
        raise _Caught(inputs)

    with observed(walk.subject, rewrite=stop), ExitStack() as stack:
        for module, output in outputs.items():
            stack.enter_context(stubbed(module, output))
        try:
            walk.step(layer, walk.hidden)
        except _Caught as caught:
            return caught.inputs
    raise ModelError(f"{walk.subject.family}: block {layer} does not call its attention")


def _outputs(block: Block, given: dict[str, Tensor]) -> dict[nn.Module, Tensor]:
    """Lay projections out as their modules return them."""
    slices: dict[str, Slice] = {part: getattr(block, part) for part in PARTS}
    outputs: dict[nn.Module, Tensor] = {}
    for part, values in given.items():
        where = slices[part]
        module = where.module
        sharing = [name for name in PARTS if slices[name].module is module]
        if part == "query" and block.own_heads.gate is not None:
            # each head's gate stands behind its query; attention is over before it acts
            values = torch.cat([values, torch.zeros_like(values)], dim=-1)
        if len(sharing) == 1:
            outputs[module] = values.flatten(2)
            continue
        width = sum(given[name].shape[2] * given[name].shape[3] for name in sharing)
        whole = outputs.get(module)
        if whole is None:
            whole = outputs[module] = values.new_empty(*values.shape[:2], width)
        places = torch.cat([where.features(head) for head in _first_of_each(where)])
        start, end = int(places[0]), int(places[-1]) + 1
        if end - start == len(places):
            whole[..., start:end] = values.flatten(2)
        else:
            whole[..., places.to(values.device)] = values.flatten(2)
    return outputs


def _first_of_each(part: Slice) -> list[int]:
    return [part.starts.index(start) for start in dict.fromkeys(part.starts)]


@contextmanager
def without_attention(subject: Subject, layer: int, like: Tensor) -> Iterator[None]:
    """Let a block's attention, or what mixes tokens there instead, write nothing, so that its MLP reads the block's input."""
    block = subject.anatomy.blocks[layer]
    nothing = torch.zeros_like(like)
    with writing_instead(block, nothing, nothing):
        yield


def mlp_of(walk: Walk, layer: int, hidden: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
    """Return what a layer's MLP adds when it reads a given residual stream."""
    block, outputs = walk.subject.anatomy.blocks[layer], []
    hidden = hidden.to(place_of(block.module))

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        outputs.append(tensor_of(output))

    handle = block.mlp_write.register_forward_hook(hook)
    try:
        with without_attention(walk.subject, layer, hidden):
            walk.step(layer, hidden)
    finally:
        handle.remove()
    added = outputs[0].view_as(hidden)
    return added if block.multiplier == 1.0 else added * block.multiplier
