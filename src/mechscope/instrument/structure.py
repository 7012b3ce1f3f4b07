"""Which norms heads and MLPs read through, seen on one tiny forward pass.

A norm is the module of a block whose output reaches the reader and which reads the residual stream. Where something else stands there (a norm over
all heads' queries as in OLMo 2, a residual stream that is normalised itself as in OPT 350m, a norm between heads and their output projection as in
BitNet) the model is refused by name. What mixes tokens in a layer that does not attend is not taken apart, only what it adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechscope.errors import ModelError
from mechscope.instrument.attention import AttentionCall, observed
from mechscope.instrument.norms import Norm, recognised
from mechscope.instrument.outputs import tensor_of
from mechscope.instrument.parts import PARTS, attention_inputs
from mechscope.instrument.walk import Walk
from mechscope.subject.anatomy import Block
from mechscope.subject.linear import base_layer
from mechscope.subject.load import Subject


@dataclass(frozen=True)
class Layer:
    """The norms of one block.

    Attributes:
        attention_norm: What its heads read through; None for the bare residual stream, and where the layer does not attend.
        mlp_norm: What its MLP reads through.
        written_norm: What stands behind attention (Gemma 2/3).
    """

    attention_norm: Norm | None
    mlp_norm: Norm | None
    written_norm: Norm | None


@dataclass(frozen=True)
class Structure:
    """The norms of all blocks, and whether a block's MLP reads what the block reads, without its heads."""

    layers: tuple[Layer, ...]
    parallel: bool


@torch.no_grad()
def discovered(subject: Subject) -> Structure:
    """Run four tokens and see which norm's output each reader gets.

    Raises:
        ModelError: A head or MLP reads the residual stream in a way that is not supported; the message names it.
    """
    anatomy = subject.anatomy
    tokens = torch.arange(anatomy.vocab_size - 4, anatomy.vocab_size)[None]  # not the first ones: one of them often stands for padding
    layers, parallel, calls = [], [], list[AttentionCall]()
    with observed(subject, calls.append):
        walk = Walk(subject, tokens)
        hidden = walk.hidden
        for layer, block in enumerate(anatomy.blocks):
            seen, hidden = _seen(walk, layer, hidden)
            if not calls and block.attends:
                raise ModelError(f"{subject.family}: block {layer} does not call its attention where it can be observed")
            norms, reads_block_input = _layer_of(subject.family, layer, block, seen)
            layers.append(norms)
            if reads_block_input is not None:
                parallel.append(reads_block_input)
            if block.attends:
                _require_plain_heads(subject.family, layer, block, seen, calls[-1].z)
            _require_plain_writing(subject.family, layer, block, seen, hidden)
            if layer == anatomy.attending[0]:
                _require_separate_heads(walk, layer)
    if len(set(parallel)) > 1:
        raise ModelError(f"{subject.family}: some blocks are parallel and others are not: it cannot be taken apart")
    return Structure(tuple(layers), any(parallel))


Seen = dict[nn.Module, tuple[Tensor, Tensor]]


def _seen(walk: Walk, layer: int, hidden: Tensor) -> tuple[Seen, Tensor]:
    """Run a block and note what each of its modules read and returned."""
    block, seen = walk.subject.anatomy.blocks[layer], {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        output = tensor_of(output)
        if isinstance(given, Tensor) and isinstance(output, Tensor):
            # of a model over several devices, a block may be given what another device computed
            seen[module] = (given.to(output.device).reshape(-1, given.shape[-1]), output.reshape(-1, output.shape[-1]))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in block.module.modules()]
    try:
        after = walk.step(layer, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return seen, after


def _layer_of(family: str, layer: int, block: Block, seen: Seen) -> tuple[Layer, bool | None]:
    """Return a block's norms, and whether its MLP reads what the block reads; None where its heads write nothing, so that both look alike."""
    given = seen[block.module][0]
    written = block.multiplier * seen[block.mixing.write][1]
    if not block.attends:
        mlp_norm, parallel = _mlp_norm(family, layer, block, seen, given, written)
        return Layer(None, mlp_norm, None), parallel if bool(written.any()) else None
    read = seen[block.query.module][0]
    if not all(torch.equal(seen[getattr(block, part).module][0], read) for part in PARTS):
        what = (
            "its keys and values come from a latent, not from the residual stream"
            if block.key.width != block.query.width
            else "they differ"
        )
        raise ModelError(
            f"{family}: the queries, keys and values of block {layer} read different things ({what}): it cannot be taken apart"
        )
    attention_norm = _between(family, layer, "attention", block, seen, given, read)
    mlp_norm, parallel = _mlp_norm(family, layer, block, seen, given, written)
    behind = None
    if block.attention_write is not block.attention:
        # an adapter that trains norms too keeps two of them behind one
        behind = recognised(family, [module for module in block.attention_write.modules() if module in seen][-1], written)
        if behind.centred or behind.shift is not None or getattr(base_layer(block.output.module), "bias", None) is not None:
            raise ModelError(f"{family}: a norm with a mean or bias stands behind attention in block {layer}: it cannot be taken apart")
    return Layer(attention_norm, mlp_norm, behind), parallel if bool(written.any()) else None


def _mlp_norm(family: str, layer: int, block: Block, seen: Seen, given: Tensor, written: Tensor) -> tuple[Norm | None, bool]:
    """Return what a block's MLP reads through, and whether it reads what the block reads, without what its mixing of tokens wrote."""
    mlp_in = seen[block.mlp_read][0]
    candidates = [(norm, source) for norm, source in _norms_to(block, seen, mlp_in)]
    sources = [source for _, source in candidates] or [mlp_in]
    parallel = any(torch.equal(source, given) for source in sources)
    if not parallel and not any(_close(source, given + written) for source in sources):
        raise ModelError(
            f"{family}: the MLP of block {layer} reads neither the block's input nor that plus what attention wrote (normalised once): "
            "it cannot be taken apart"
        )
    expected = given if parallel else given + written
    return next((recognised(family, norm, source) for norm, source in candidates if _close(source, expected)), None), parallel


def _norms_to(block: Block, seen: Seen, output: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Return the norms of a block that gave an output, each with what it read."""
    return [
        (module, seen[module][0])
        for module in block.module.modules()
        if module in seen and "norm" in type(module).__name__.lower() and torch.equal(seen[module][1], output)
    ]


def _between(family: str, layer: int, what: str, block: Block, seen: Seen, given: Tensor, read: Tensor) -> Norm | None:
    if torch.equal(given, read):
        return None
    for module, source in _norms_to(block, seen, read):
        if torch.equal(source, given):
            return recognised(family, module, source)
    raise ModelError(
        f"{family}: the {what} of block {layer} reads the residual stream through more than one norm: it cannot be taken apart"
    )


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 3e-2)
    return bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max())))


def _require_plain_heads(family: str, layer: int, block: Block, seen: Seen, z: Tensor) -> None:
    """Refuse models whose heads do not write z times W_O."""
    read, projected = seen[block.output.module]
    written = seen[block.attention_write]
    bare = written[1] if block.attention_write is block.attention else written[0]
    if not _close(read, z.flatten(2).flatten(0, 1)) or not _close(bare, projected):
        raise ModelError(
            f"{family}: something (a norm, a gate) stands between the heads of block {layer} and what they write: it cannot be taken apart"
        )


def _require_plain_writing(family: str, layer: int, block: Block, seen: Seen, after: Tensor) -> None:
    """Refuse models whose blocks do not just add what their heads (or what mixes tokens instead) and MLP write."""
    if not _close(after.flatten(0, 1), seen[block.module][0] + block.multiplier * (seen[block.mixing.write][1] + seen[block.mlp_write][1])):
        raise ModelError(
            f"{family}: block {layer} does more than add what its heads and MLP write to the residual stream (a norm, a factor, another part): "
            "it cannot be taken apart"
        )


def _require_separate_heads(walk: Walk, layer: int) -> None:
    """Refuse models in which one head's query or key depends on another head's projection."""
    anatomy = walk.subject.anatomy
    if anatomy.n_heads == 1:
        return
    generator = torch.Generator().manual_seed(0)
    shape = (*walk.hidden.shape[:2], anatomy.n_heads, anatomy.d_head)
    given = torch.randn(shape, generator=generator).to(walk.hidden)
    changed = given.clone()
    changed[:, :, 0] *= 3.0
    changed[:, :, 0] += 1.0
    before, after = (attention_inputs(walk, layer, x, x, x) for x in (given, changed))
    for part in PARTS:
        if not torch.equal(getattr(before, part)[:, 1:], getattr(after, part)[:, 1:]):
            raise ModelError(
                f"{walk.subject.family}: the {part} of a head depends on other heads (a norm over all of them): it cannot be taken apart"
            )
