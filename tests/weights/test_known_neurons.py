"""Statistics of neurons whose behaviour is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mechscope.subject.load import Subject, load
from mechscope.weights.activity import neuron_activity
from tests import families
from tests.weights.run_alone import LENGTHS, from_rows, run, texts_of


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
@torch.no_grad()
def test_a_neuron_that_never_fires_is_dead(family: str) -> None:
    model = families.build(family, torch.float64)
    subject = load(model)
    block: Any = subject.anatomy.blocks[1].module
    into = block.fc1 if family == "opt" else block.mlp.c_fc if family == "gpt2" else block.mlp.dense_h_to_4h
    into.bias[5] = -1000.0
    into.bias[6] = 1000.0
    table = neuron_activity(subject, texts_of()).table().query("layer == 1").reset_index(drop=True)
    dead, alive = table.iloc[5], table.iloc[6]
    assert dead["dead"]
    assert dead["active"] == 0
    assert dead["contexts"] == 0
    assert dead["token_id"] == -1
    assert dead["active_bound"] == pytest.approx(3 / sum(LENGTHS))
    assert not alive["dead"]
    assert alive["active"] == 1
    assert np.isnan(alive["active_bound"])
    assert np.isnan(dead["position_r2"])
    assert not dead["positional"]
    assert not dead["token_bound"]


@torch.no_grad()
def test_an_open_gate_is_what_makes_a_gated_neuron_active() -> None:
    model = families.build("llama", torch.float64)
    mlp = model.model.layers[0].mlp
    # the gate and the other side always have the same sign, so the product never is negative but for the small dip of SiLU
    mlp.up_proj.weight[4] = mlp.gate_proj.weight[4]
    mlp.up_proj.weight[5] = -mlp.gate_proj.weight[5]
    subject, texts = load(model), texts_of()
    table = neuron_activity(subject, texts).table()
    _, opened = run(subject, texts)
    for neuron in (4, 5):
        row = table.iloc[neuron]
        expected = np.mean([(whole[0, :, neuron] > 0).mean() for whole in opened])
        assert row["active"] == pytest.approx(expected)
        assert 0 < expected < 1
    assert table.iloc[5]["maximum"] <= 0
    assert not table.iloc[5]["dead"]
    assert table.iloc[5]["contexts"] == 5  # strongest in size


@torch.no_grad()
def test_a_neuron_driven_by_position_alone_is_positional() -> None:
    subject = positional()
    texts = from_rows(*(tuple(text.tolist()) for text in families.documents(lengths=(16, 12, 16, 9, 16, 14, 16, 16, 5, 16))))
    table = neuron_activity(subject, texts).table().query("layer == 0")
    by_position, by_token = table.iloc[3], table.iloc[4]
    assert by_position["position_r2"] == pytest.approx(1.0, abs=1e-9)
    assert by_position["positional"]
    assert by_position["sd"] > 0.1
    assert by_token["position_r2"] < 0.4
    assert not by_token["positional"]
    lengths = [len(pair.clean) for pair in texts]
    assert by_token["position_r2_chance"] == pytest.approx((16 - 1) / (sum(lengths) - 1))


def positional() -> Subject:
    """A model whose neuron 3 of layer 0 reads a dimension that only positions write, and whose neuron 4 reads one that only tokens write.

    Tokens have equal length and no mean, and nothing else moves the norm's scale, so that neuron 3 depends on nothing but position.
    """
    model = families.build("gpt2", torch.float64)
    transformer, generator = model.transformer, torch.Generator().manual_seed(1)
    signs = torch.tensor([1.0, -1.0] * 15, dtype=torch.float64)
    transformer.wte.weight.zero_()
    for token in range(families.VOCABULARY):
        transformer.wte.weight[token, 2:] = signs[torch.randperm(30, generator=generator)]
    transformer.wpe.weight.zero_()
    transformer.wpe.weight[:, 0] = torch.randn(families.POSITIONS, generator=generator, dtype=torch.float64) * 2
    transformer.wpe.weight[:, 1] = -transformer.wpe.weight[:, 0]
    block = transformer.h[0]
    block.attn.c_proj.weight.zero_()
    block.attn.c_proj.bias.zero_()
    block.ln_2.weight.fill_(1.0)
    block.ln_2.bias.zero_()
    for neuron, dimension in ((3, 0), (4, 7)):
        block.mlp.c_fc.weight[:, neuron] = 0.0
        block.mlp.c_fc.weight[dimension, neuron] = 1.0
        block.mlp.c_fc.bias[neuron] = 0.0
    return load(model)


@torch.no_grad()
def test_where_nothing_depends_on_position_r2_is_at_chance() -> None:
    subject = positional()
    texts = from_rows(*(tuple(text.tolist()) for text in families.documents(lengths=(12,) * 20)))
    found = []
    for seed in range(12):
        texts = from_rows(*(tuple(text.tolist()) for text in families.documents(lengths=(12,) * 20, seed=seed)))
        row = neuron_activity(subject, texts).table().query("layer == 0").iloc[4]
        found.append(row["position_r2"])
    chance, error = 11 / 239, np.std(found, ddof=1) / len(found) ** 0.5
    assert row["position_r2_chance"] == pytest.approx(chance)
    assert abs(np.mean(found) - chance) < 3 * error
    assert error < chance / 4


@torch.no_grad()
def test_a_neuron_that_reads_one_token_is_token_bound() -> None:
    model = families.build("gpt2", torch.float64)
    transformer = model.transformer
    transformer.wpe.weight.zero_()
    transformer.h[0].attn.c_proj.weight.zero_()
    transformer.h[0].attn.c_proj.bias.zero_()
    pattern = transformer.h[0].ln_2(transformer.wte.weight[40]) - transformer.h[0].ln_2.bias
    transformer.h[0].mlp.c_fc.weight[:, 9] = 10 * pattern
    rows = [[*text.tolist()] for text in families.documents(lengths=(12,) * 4)]
    for text, at in zip(rows, (3, 7, 0, 11), strict=True):
        text[at] = 40
    texts = from_rows(*map(tuple, rows))
    row = neuron_activity(load(model), texts, contexts=4).table().iloc[9]
    assert row["token_bound"]
    assert row["token_id"] == 40
    assert row["token_purity"] == 1.0
    more = neuron_activity(load(model), texts, contexts=5).table().iloc[9]
    assert not more["token_bound"]
    assert more["token_purity"] == pytest.approx(0.8)
    assert more["token_id"] == 40
    alone = neuron_activity(load(model), texts, contexts=1).table().iloc[9]
    assert not alone["token_bound"]
    assert np.isnan(alone["token_purity"])
    # one that fires on that token alone, where it was seen too rarely to fill the contexts
    transformer.h[0].mlp.c_fc.bias[9] = -8 * float(pattern @ transformer.h[0].ln_2(transformer.wte.weight[40]))
    rare = neuron_activity(load(model), texts, contexts=12).table().iloc[9]
    assert rare["contexts"] == 4
    assert rare["token_purity"] == 1.0
    assert not rare["token_bound"]
