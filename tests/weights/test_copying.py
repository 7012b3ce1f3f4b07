"""Copying is read off weights as the dense circuit's eigenvalues and ranks have it; heads built to copy or suppress score the extremes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.subject.load import load
from mechscope.weights import weight_heads
from tests import families
from tests.weights import oracle


@pytest.mark.parametrize("raw", [False, True], ids=["normalised", "raw"])
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_every_column_is_that_of_the_dense_circuit(family: str, raw: bool) -> None:
    subject = families.subject(family, torch.float64)
    sample = [3, 50, 96, 17, 8]
    table = weight_heads(subject, tokens=sample, k=7, embedding="raw" if raw else "normalised").set_index("component").to_dict("index")
    assert len(table) == families.LAYERS * families.HEADS
    for layer, head in subject.anatomy.heads():
        row, one = table[f"a{layer}.h{head}"], oracle.head(subject.plain, family, layer, head)
        dense = oracle.dense_ov(subject.plain, family, layer, head, raw=raw)
        values = torch.linalg.eigvals(dense)
        values = values[values.abs() > 1e-7 * values.abs().max()]
        total = float(values.abs().sum())
        assert row["copying"] == pytest.approx(float(dense.trace()) / total, abs=1e-5)
        assert row["positive"] == pytest.approx(sum(float(abs(v)) for v in values if v.real > 0) / total, abs=1e-5)
        order = dense.argsort(dim=1, descending=True).tolist()
        assert row["copied"] == sum(token in order[token][:7] for token in sample) / 5
        assert row["suppressed"] == sum(token in order[token][-7:] for token in sample) / 5
        assert row["ov_norm"] == pytest.approx(float(torch.linalg.norm(one.ov)), rel=1e-9)
        if family == "qwen3":
            assert math.isnan(row["qk_norm"])
        else:
            assert row["qk_norm"] == pytest.approx(float(torch.linalg.norm(one.qk)), rel=1e-6)


def built(sign: float) -> Any:
    """Build a GPT-2 with one head as wide as the model, which writes what it reads, or its negative, into an unembedding that is the embedding."""
    model = families.build("gpt2", torch.float64, n_head=1, n_layer=1)
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.randn(97, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        block = model.transformer.h[0]
        for norm in (block.ln_1, model.transformer.ln_f):
            norm.weight.fill_(1.0)
            norm.bias.zero_()
        block.attn.c_attn.weight[:, 64:] = torch.eye(32)
        block.attn.c_proj.weight.copy_(sign * torch.eye(32))
    return model


def test_a_head_that_copies_scores_one_and_one_that_suppresses_minus_one() -> None:
    copies, suppresses = (weight_heads(load(built(sign)), n_tokens=97, k=1).iloc[0] for sign in (1.0, -1.0))
    assert copies["copying"] > 0.999
    assert suppresses["copying"] < -0.999
    assert (copies["positive"], suppresses["positive"]) == (pytest.approx(1), pytest.approx(0))
    assert (copies["copied"], copies["suppressed"]) == (1, 0)
    assert (suppresses["copied"], suppresses["suppressed"]) == (0, 1)


def test_random_heads_score_around_zero() -> None:
    scores = torch.tensor(weight_heads(load(families.build("llama", num_hidden_layers=12)))["copying"].to_numpy())
    assert len(scores) == 48
    assert scores.mean().abs() < 4 * scores.std() / 48**0.5
    assert scores.std() < 0.5


def test_a_shift_of_all_logits_changes_nothing() -> None:
    one, other = families.build("llama", torch.float64), families.build("llama", torch.float64)
    with torch.no_grad():
        other.lm_head.weight.add_(3 * torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    found, expected = (weight_heads(load(model)) for model in (other, one))
    assert (found["copying"] - expected["copying"]).abs().max() < 1e-9


def test_the_draw_of_tokens_is_the_seeds() -> None:
    subject = families.subject("gpt2")
    first, again, other = (weight_heads(subject, n_tokens=20, k=20, execution=Execution(seed=seed)) for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first["copied"].equals(other["copied"])


@pytest.mark.parametrize("options", [{"k": 0}, {"n_tokens": 0}, {"tokens": [97]}])
def test_settings_that_do_not_fit_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        weight_heads(families.subject("gpt2"), **options)
