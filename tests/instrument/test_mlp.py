"""MLPs taken apart: their weights give the model's neurons and what these write, or are refused by name."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechscope.errors import ModelError
from mechscope.instrument import Walk, record
from mechscope.instrument.mlp import Mlps
from mechscope.subject.load import load
from tests import families
from tests.weights.named import GATED, close


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.no_grad()
def test_weights_give_the_models_neurons_and_what_they_write(family: str) -> None:
    subject = families.subject(family, torch.float64)
    ids = torch.stack(families.documents(lengths=(9, 9)))
    mlps = Mlps(subject)
    with record(subject, "embedding", "residual", "attention_output", "neuron", "mlp_output") as seen:
        subject.plain(ids)
    for layer, block in enumerate(subject.anatomy.blocks):
        before = seen["embedding"] if layer == 0 else seen["residual", layer - 1]
        read = before if family in ("gpt_neox", "phi") else before + seen["attention_output", layer]
        mlp, parts = mlps[layer], mlps.parts[layer]
        x = read if mlp.norm is None else mlp.norm.normalised(read)[0]
        up = x @ mlp.up.weight.T + mlp.up.constant
        neurons = parts.activation(up if mlp.gate is None else x @ mlp.gate.weight.T + mlp.gate.constant)
        neurons = neurons if mlp.gate is None else neurons * up
        torch.testing.assert_close(neurons, seen["neuron", layer], **close(family))
        written = seen["neuron", layer] @ mlp.down
        if parts.behind is not None:
            bare = seen["neuron", layer] @ (mlp.down / parts.behind.gain)
            written = written * parts.behind.normalised(bare)[1]
        written = written if mlp.bias is None else written + mlp.bias
        torch.testing.assert_close(written, seen["mlp_output", layer], **close(family))
        assert (mlp.gate is not None) == (family in GATED)
        assert mlps.widths[layer] == block.d_mlp


def test_the_gate_is_found_by_what_it_does_and_not_by_its_name() -> None:
    model = families.build("llama", torch.float64)

    def swapped(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    for block in model.model.layers:
        block.mlp.forward = MethodType(swapped, block.mlp)
    parts = Mlps(load(model)).parts[1]
    assert parts.gate is not None
    assert (parts.gate.name, parts.up.name) == ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj")


def _tempered(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.01)


def _functional(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def _chained(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x * 2.0))


def _scaled(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2.0


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (_tempered, r"act\(gate\) · up with its maps gate_proj, up_proj"),
        (_functional, r"act\(gate\) · up with its maps gate_proj, up_proj"),
        (_chained, "mlp.up_proj, which does not read what the MLP reads"),
        (_scaled, "changes what its last map gives"),
    ],
)
def test_an_mlp_that_does_something_else_is_refused_by_name(forward: Any, found: str) -> None:
    model = families.build("llama")
    model.model.layers[2].mlp.forward = MethodType(forward, model.model.layers[2].mlp)
    with pytest.raises(ModelError, match=f"llama: the MLP of block 2 .*{found}"):
        Mlps(load(model))


@torch.no_grad()
def test_a_walk_in_progress_is_left_alone() -> None:
    subject = families.subject("opt", torch.float64)
    ids = families.documents()[0][None]
    expected = subject.plain(ids).logits
    with Mlps(subject).watched(1) as seen:
        walk = Walk(subject, ids)
        found = walk.logits(walk.run())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with record(subject, "neuron") as recording:
        subject.plain(ids)
    torch.testing.assert_close(seen.neurons.view_as(recording["neuron", 1]), recording["neuron", 1])
    assert not subject.anatomy.blocks[1].mlp_down._forward_pre_hooks
