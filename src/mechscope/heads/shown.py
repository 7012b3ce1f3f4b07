"""Where chosen heads look in a text, token by token: the strongest keys of every query, for a person to see.

A whole pattern of 1,024 tokens has half a million entries, nearly all of them next to nothing. Kept are a few keys per query, and only those that matter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

import pandas as pd
import torch

from mechscope.errors import DataError, SettingsError
from mechscope.instrument import AttentionCall, Walk, observed
from mechscope.instrument.kernels import pattern_blocks
from mechscope.subject import Subject

# a row's largest eight keys hold nearly all that colours can distinguish
STRONGEST = 8
LEAST = 0.01


@torch.no_grad()
def attention_edges(
    subject: Subject, input_ids: Sequence[int], heads: Collection[tuple[int, int]], *, strongest: int = STRONGEST, least: float = LEAST
) -> pd.DataFrame:
    """List the strongest attention of some heads over one text.

    Args:
        subject: The model.
        input_ids: The text's tokens.
        heads: Which (layer, head).
        strongest: Keys per query at most.
        least: Smallest weight that is listed, 0 to 1.

    Returns:
        One row per listed (head, query, key): `component`, `query`, `key` (positions) and `weight` (share of the query's attention).

    Raises:
        SettingsError: A head does not exist.
        DataError: The text is empty or longer than the model can read.
    """
    anatomy = subject.anatomy
    for layer, head in heads:
        if not (0 <= layer < anatomy.n_layers and 0 <= head < anatomy.n_heads):
            raise SettingsError(f"head a{layer}.h{head} does not exist: the model has {anatomy.n_layers} layers of {anatomy.n_heads} heads")
        if layer in anatomy.mixing:
            raise SettingsError(f"head a{layer}.h{head} does not exist: {anatomy.instead(layer)}")
    if not 0 < len(input_ids) <= anatomy.max_positions:
        raise DataError(f"the text has {len(input_ids):,} tokens, the model reads 1 to {anatomy.max_positions:,}")
    wanted: dict[int, list[int]] = defaultdict(list)
    for layer, head in sorted(set(heads)):
        wanted[layer].append(head)
    edges: list[pd.DataFrame] = []

    def tap(call: AttentionCall) -> None:
        for head in wanted.get(call.layer, ()):
            edges.append(_edges(call, head, strongest, least).assign(component=f"a{call.layer}.h{head}"))

    with observed(subject, tap):
        walk = Walk(subject, torch.tensor([list(input_ids)]))
        hidden = walk.hidden
        for layer in range(max(wanted, default=-1) + 1):
            hidden = walk.step(layer, hidden)
    columns = ["component", "query", "key", "weight"]
    return pd.concat(edges, ignore_index=True)[columns] if edges else pd.DataFrame(columns=columns)


def _edges(call: AttentionCall, head: int, strongest: int, least: float) -> pd.DataFrame:
    group = call.query.shape[1] // call.key.shape[1]
    # a mask of one text is that of its window; heads share it unless it was rewritten per head
    mask = call.mask if call.mask is None or call.mask.shape[1] == 1 else call.mask[:, head : head + 1]
    key_head = head // group
    blocks = pattern_blocks(
        call.query[:, head : head + 1],
        call.key[:, key_head : key_head + 1],
        scaling=call.scaling,
        mask=mask,
        softcap=call.softcap,
        sinks=None if call.sinks is None else call.sinks[head : head + 1],
    )
    queries, keys, weights = [], [], []
    for block in blocks:
        top = block.log_pattern[0, 0].exp().topk(min(strongest, block.log_pattern.shape[-1]), dim=-1)
        row, place = (top.values >= least).nonzero(as_tuple=True)
        queries.append(row + block.start)
        keys.append(top.indices[row, place])
        weights.append(top.values[row, place])
    query, key, weight = (torch.cat(parts).cpu() for parts in (queries, keys, weights))
    return pd.DataFrame({"query": query.numpy(), "key": key.numpy(), "weight": weight.double().numpy()})
