"""A key bias is said to be without effect exactly where a model computes the same with another one."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from mechscope.difference import compare_weights
from mechscope.report.sections.weights import key_bias_is_idle
from tests import families
from tests.difference import oracle
from tests.report.drawn import view_of, views_of

IDS = families.documents()[0][None]
D = families.WIDTH // families.HEADS


def key_bias(family: str, model: Any) -> Tensor:
    """Return layer 1's key bias, a view into the family's storage."""
    layers = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}.get(family, "model.layers")
    block = model.get_submodule(f"{layers}.1")
    if family == "gpt2":
        return block.attn.c_attn.bias.data[families.WIDTH : 2 * families.WIDTH]
    if family == "gpt_neox":
        return block.attention.query_key_value.bias.data.view(families.HEADS, 3, D)[:, 1]
    return block.self_attn.k_proj.bias.data


def moved(family: str) -> tuple[pd.DataFrame, float]:
    """Return the weights' table of a model whose key bias alone was moved, and how far its logits went."""
    base, tuned = families.build(family, torch.float64), families.build(family, torch.float64)
    before = key_bias(family, base)
    key_bias(family, tuned).add_(torch.randn(before.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    with torch.no_grad():
        gone = (tuned(IDS).logits - base(IDS).logits).abs().max().item()
    return compare_weights(oracle.two(base, tuned)).table, gone


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "qwen2", "phi"])
def test_a_key_bias_is_called_idle_where_moving_it_moves_no_logit(family: str) -> None:
    table, gone = moved(family)
    assert table.loc[table["change"] > 0, "kind"].tolist() == ["key_bias"]
    assert key_bias_is_idle(table) == (gone < 1e-12)
    # what is called idle is idle, and what is not is far from it
    assert gone < 1e-12 or gone > 1e-4
    notes = {row[0].text: row[0].note for row in view_of(views_of({"weights": table}), "Change by kind of matrix").view.rows}
    assert {kind for kind, note in notes.items() if note} == ({"key_bias"} if gone < 1e-12 else set())


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.k_norm.weight", "blocks.0.attn.key_layernorm.weight", "model.layers.0.self_attn.sinks"]
)
def test_a_key_bias_before_a_norm_or_beside_a_sink_is_not_idle(name: str) -> None:
    learned = pd.DataFrame({"name": ["wpe.weight", "model.decoder.layers.0.self_attn_layer_norm.weight"], "kind": ["position", "norm"]})
    assert key_bias_is_idle(learned)
    assert not key_bias_is_idle(pd.concat([learned, pd.DataFrame({"name": [name], "kind": ["norm"]})]))
