"""How much of a head's attention falls on named keys, without its map, and how a set of texts is run for it.

With the logsumexp of a row's scores from one call of the fused kernel, the mass on key j is exp(score_ij − lse_i): one dot product for each named
key, instead of all L × L. Soft-capped scores, windows and left padding go through the exact pattern, a block of queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText
from mechscope.instrument import AttentionCall, observed
from mechscope.instrument.execution import Execution
from mechscope.instrument.kernels import PatternBlock, averages, is_fusable, pattern_blocks, statistics_dtype
from mechscope.instrument.walk import run_backbone
from mechscope.subject import Subject

Reduce = Callable[[AttentionCall, PairBatch], Tensor]


def mass_at(call: AttentionCall, keys: Int[Tensor, "batch query m"], real: Bool[Tensor, "batch key"]) -> Float[Tensor, "batch head query"]:
    """Return the attention of every query row to some keys together.

    Args:
        call: One attention call, as a tap sees it.
        keys: Columns of the keys, −1 for none; a key that the row cannot see (the future, padding, behind a window) gets nothing.
        real: True where a token is real.

    Returns:
        Shares of each row, 0 to 1; 0 in rows of padding.
    """
    return masses_at(call, keys, real).sum(-1)


def masses_at(
    call: AttentionCall, keys: Int[Tensor, "batch query m"], real: Bool[Tensor, "batch key"]
) -> Float[Tensor, "batch head query m"]:
    """Return the attention of every query row to each of some keys (columns, −1 for none); 0 for keys it cannot see and in rows of padding."""
    length, columns = call.query.shape[2], call.key.shape[2]
    windowed = call.window is not None and call.window < columns
    plain = (
        call.mask is None and call.softcap is None and call.sinks is None and not windowed and length == columns and is_fusable(call.query)
    )
    masses = _fused(call, keys) if plain else _exact(call, keys)
    rows = real[:, columns - length :, None]
    there = real.gather(1, keys.clamp(min=0).flatten(1)).view(keys.shape)
    return torch.where(((keys >= 0) & there & rows)[:, None], masses, 0)


def _fused(call: AttentionCall, keys: Int[Tensor, "batch query m"]) -> Float[Tensor, "batch head query m"]:
    kind, group = statistics_dtype(call.query.dtype), call.query.shape[1] // call.key.shape[1]
    query, key = call.query.to(kind), call.key.to(kind)
    # what all keys share shifts a row's scores alike: no pattern sees it, but the difference below would round at its size
    key = key - key.mean(2, keepdim=True)
    _, logsumexp = averages(query, key, [key[:, :1, :, :1]], scaling=call.scaling)
    masses = []
    for column in keys.clamp(min=0).unbind(-1):
        wanted = key.gather(2, column[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])).repeat_interleave(group, 1)
        masses.append((call.scaling * (query * wanted).sum(-1) - logsumexp).exp())
    rows = torch.arange(keys.shape[1], device=keys.device)[:, None]
    return torch.where((keys <= rows)[:, None], torch.stack(masses, -1), 0)


def _exact(call: AttentionCall, keys: Int[Tensor, "batch query m"]) -> Float[Tensor, "batch head query m"]:
    masses = []
    for block in _blocks(call):
        rows, seen = block.log_pattern.shape[-2:]
        wanted = keys[:, block.start : block.start + rows]
        index = wanted.clamp(0, seen - 1)[:, None].expand(-1, block.log_pattern.shape[1], -1, -1)
        masses.append(torch.where((wanted < seen)[:, None], block.log_pattern.gather(-1, index).exp(), 0))
    return torch.cat(masses, 2)


def strongest(call: AttentionCall, real: Bool[Tensor, "batch key"]) -> Int[Tensor, "batch head query"]:
    """Return the column of the key that each row attends to most, the first of equals; −1 in rows of padding.

    Args:
        call: One attention call; its queries may be the last rows only.
        real: True where a token is real.
    """
    first = torch.cat([block.log_pattern.argmax(-1) for block in _blocks(call)], 2)
    return first.masked_fill(~real[:, None, call.key.shape[2] - call.query.shape[2] :], -1)


def _blocks(call: AttentionCall) -> Iterator[PatternBlock]:
    return pattern_blocks(call.query, call.key, scaling=call.scaling, mask=call.mask, softcap=call.softcap, sinks=call.sinks)


@torch.no_grad()
def run_probes(
    subject: Subject, texts: Pairs, reduce: Reduce, *, execution: Execution = Execution()
) -> Float[np.ndarray, "text layer head ..."]:
    """Run the clean texts once and reduce every layer's attention to some numbers per head; several ranks share the texts.

    Args:
        subject: The model.
        texts: Texts that fit it.
        reduce: Makes ``(batch, head, …)`` of an attention call and the batch that it belongs to. Where memory runs out, a batch is halved and run again.
        execution: Tokens of a batch (4,096 by default), progress.

    Returns:
        The numbers, in the order of the texts; of the layers that attend.

    Raises:
        SettingsError: There are no texts.
    """

    def reduced(batch: PairBatch) -> dict[str, np.ndarray]:
        layers: dict[int, Tensor] = {}

        def tap(call: AttentionCall) -> None:
            layers[call.layer] = reduce(call, batch).double()

        with observed(subject, tap):
            run_backbone(subject, batch.clean, batch.real)
        # fetched when all layers are on their way: no device is waited for in between
        values = torch.stack([layers[layer].cpu() for layer in subject.anatomy.attending])
        return {"values": values.movedim(1, -1).numpy()}

    gathered = PerText(texts)
    gathered.run(reduced, execution, tokens=4096, label="attention")
    return np.moveaxis(gathered["values"], -1, 0)
