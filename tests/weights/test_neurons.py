"""What neurons read and write, held against the model's own modules by name, and against neurons built by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from mechscope.errors import SettingsError
from mechscope.subject.load import load
from mechscope.weights import neurons as module
from mechscope.weights.neurons import neuron_tokens, neuron_weights
from tests import families
from tests.weights.named import GATED, KINDS, LAYERNORM, Named, close


def values_of(table: pd.DataFrame, side: str, neuron: int) -> tuple[list[int], np.ndarray]:
    rows = table[(table["side"] == side) & (table["neuron"] == neuron)].sort_values("place")
    return rows["token_id"].tolist(), rows["value"].to_numpy()


# --- tokens in and out ---------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tokens_are_those_of_the_models_own_modules(family: str) -> None:
    subject, layer, k = families.subject(family, torch.float64), 1, 6
    named = Named(subject)
    table = neuron_tokens(subject, layers=[layer], k=k)
    inputs = named.inputs(layer, named.norm(layer)(named.embedded()))
    logits = named.written(layer) @ named.directions().T  # (neuron, token)
    expected = {**{side: value.T for side, value in inputs.items()}, "promoted": logits, "suppressed": -logits}
    if "gate" in inputs:
        expected["in"] = expected["in"].abs()
    assert sorted(table["side"].unique()) == sorted(expected)
    for side, entries in expected.items():
        sign = -1 if side == "suppressed" else 1
        own = table[table["side"] == side]
        assert len(own) == len(entries) * k
        found = own["value"].to_numpy().reshape(-1, k) * sign
        best = entries.sort(dim=1, descending=True)
        np.testing.assert_allclose(
            np.abs(found) if side == "in" and "gate" in inputs else found, best.values[:, :k].numpy(), **close(family)
        )
        at = torch.tensor(own["token_id"].to_list()).view(-1, k)
        np.testing.assert_allclose(entries.gather(1, at).numpy(), best.values[:, :k].numpy(), **close(family))
        assert own["place"].tolist() == list(range(1, k + 1)) * len(entries)


@torch.no_grad()
def test_the_multiplied_side_of_a_gated_neuron_keeps_its_sign() -> None:
    subject = families.subject("llama", torch.float64)
    named = Named(subject)
    table = neuron_tokens(subject, layers=[0], k=5)
    own = table[table["side"] == "in"]
    up = named.inputs(0, named.norm(0)(named.embedded()))["in"]
    expected = up[torch.tensor(own["token_id"].to_list()), torch.tensor(own["neuron"].to_list())]
    np.testing.assert_allclose(own["value"].to_numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)
    assert (own["value"] < 0).any()
    assert (own["value"] > 0).any()


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_a_neuron_that_reads_one_token_and_writes_another(family: str) -> None:
    model = families.build(family, torch.float64)
    subject = load(model, tokenizer=families.tokenizer())
    named, layer, neuron, read, write = Named(subject), 1, 7, 40, 60
    x = named.norm(layer)(named.embedded()[read])
    shift = getattr(named.norm(layer), "bias", None)
    pattern = x if shift is None else x - shift
    direction = named.directions()[write]
    block: Any = named.blocks[layer]
    match subject.family:
        case "gpt2":
            block.mlp.c_fc.weight[:, neuron], block.mlp.c_proj.weight[neuron] = pattern, direction
        case "gpt_neox":
            block.mlp.dense_h_to_4h.weight[neuron], block.mlp.dense_4h_to_h.weight[:, neuron] = pattern, direction
        case "opt":
            block.fc1.weight[neuron], block.fc2.weight[:, neuron] = pattern, direction
        case "phi3":
            block.mlp.gate_up_proj.weight[neuron], block.mlp.down_proj.weight[:, neuron] = pattern, direction
        case "gemma2" | "gemma3_text":
            block.mlp.gate_proj.weight[neuron] = pattern
            block.mlp.down_proj.weight[:, neuron] = direction / (1 + block.post_feedforward_layernorm.weight)
        case _:
            block.mlp.gate_proj.weight[neuron], block.mlp.down_proj.weight[:, neuron] = pattern, direction
    table = neuron_tokens(subject, neurons=[(layer, neuron)], k=3)
    assert values_of(table, "gate" if family in GATED else "in", neuron)[0][0] == read
    assert values_of(table, "promoted", neuron)[0][0] == write
    assert set(table["component"]) == {"m1.n7"}
    assert table.loc[table["token_id"] == write, "token"].unique().tolist() == ["w60"]


def test_some_neurons_have_the_rows_they_have_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = families.subject("gemma3", torch.float64)
    everything = neuron_tokens(subject, k=4)
    assert len(everything) == 3 * 48 * 4 * 4
    chosen = {(2, 40), (0, 3), (2, 5)}
    monkeypatch.setattr(module, "_ENTRIES", 2 * families.VOCABULARY)  # two neurons at a time
    few = neuron_tokens(subject, neurons=list(chosen), k=4)
    mask = [pair in chosen for pair in zip(everything["layer"], everything["neuron"], strict=True)]
    keys = ["layer", "neuron", "side", "place"]
    expected = everything[mask].sort_values(keys).reset_index(drop=True)
    pd.testing.assert_frame_equal(few.sort_values(keys).reset_index(drop=True), expected, rtol=1e-9)
    pd.testing.assert_frame_equal(neuron_weights(subject, layers=[1]), neuron_weights(subject).query("layer == 1").reset_index(drop=True))


def test_more_tokens_than_the_vocabulary_has_are_all_of_it() -> None:
    table = neuron_tokens(families.subject("gpt2"), neurons=[(0, 0)], k=1000)
    assert table.groupby("side")["token_id"].nunique().unique().tolist() == [families.VOCABULARY]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, "layer 3 does not exist: the model has layers 0-2"),
        ({"neurons": [(1, 48)]}, "neuron m1.n48 does not exist: the layer has neurons 0-47"),
        ({"neurons": [(1, -1)]}, "neuron m1.n-1 does not exist"),
        ({"neurons": []}, "no neurons are chosen"),
        ({"layers": [0], "neurons": [(0, 1)]}, "either layers or neurons"),
        ({"k": 0}, "ask for at least 1"),
    ],
)
def test_what_does_not_exist_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        neuron_tokens(families.subject("llama"), **options)


@pytest.mark.parametrize(("family", "targets"), [("llama", ["gate_proj", "up_proj", "down_proj"]), ("gpt2", ["c_fc", "c_proj"])])
@torch.no_grad()
def test_an_adapter_counts_where_it_is_active(family: str, targets: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    model = families.build(family, torch.float64)
    plain = neuron_tokens(load(model), k=3)
    settings = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=family == "gpt2")
    wrapped = get_peft_model(model, settings).double().eval()
    adapted = load(wrapped)
    with_adapter = neuron_tokens(adapted, k=3)
    pd.testing.assert_frame_equal(neuron_tokens(adapted.without_adapter(), k=3), plain, rtol=1e-9)
    merged = neuron_tokens(load(wrapped.merge_and_unload()), k=3)
    pd.testing.assert_frame_equal(with_adapter, merged, rtol=1e-9)
    assert not np.allclose(with_adapter["value"], plain["value"])


# --- weights -------------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_spread_and_cosines_are_those_of_scipy(family: str) -> None:
    subject, layer = families.subject(family, torch.float64), 2
    named, table = Named(subject), neuron_weights(subject, layers=[layer])
    down, directions = named.written(layer), named.directions()
    x = torch.eye(families.WIDTH, dtype=torch.float64)
    gain = named.norm(layer).weight + (1.0 if family.startswith("gemma") else 0.0)
    inputs = {side: (value - named.inputs(layer, 0 * x)[side]).T * gain for side, value in named.inputs(layer, x).items()}
    if family in LAYERNORM:
        inputs = {side: value - value.mean(1, keepdim=True) for side, value in inputs.items()}
    for neuron in range(0, len(down), 7):
        row = table.iloc[neuron]
        cosines = [float(direction @ down[neuron] / (direction.norm() * down[neuron].norm())) for direction in directions]
        expected = [np.var(cosines), scipy.stats.skew(cosines), scipy.stats.kurtosis(cosines, fisher=False)]
        np.testing.assert_allclose(
            row[["vocabulary_variance", "vocabulary_skew", "vocabulary_kurtosis"]].astype(float), expected, rtol=1e-9
        )
        np.testing.assert_allclose(row["norm_out"], float(down[neuron].norm()), rtol=1e-9)
        for side in ("in", "gate"):
            if side not in inputs:
                assert np.isnan(row[f"norm_{side}"])
                assert np.isnan(row[f"cosine_{side}_out"])
                continue
            own = inputs[side][neuron]
            np.testing.assert_allclose(row[f"norm_{side}"], float(own.norm()), rtol=1e-9)
            np.testing.assert_allclose(row[f"cosine_{side}_out"], float(own @ down[neuron] / own.norm() / down[neuron].norm()), atol=1e-9)


@torch.no_grad()
def test_prediction_and_suppression_neurons_are_told_apart_and_one_that_erases_what_it_reads() -> None:
    model = families.build("gpt2", torch.float64, n_embd=128)
    subject = load(model)
    mlp, gain = model.transformer.h[2].mlp, model.transformer.ln_f.weight
    read = model.lm_head.weight * gain
    mlp.c_proj.weight[0] = read[50] - read[50].mean()
    mlp.c_proj.weight[1] = -(read[50] - read[50].mean())
    mlp.c_proj.weight[2] = 0.0
    inside = mlp.c_fc.weight[:, 3] * model.transformer.h[2].ln_2.weight
    mlp.c_proj.weight[3] = -5 * (inside - inside.mean())
    table = neuron_weights(subject, layers=[2])
    assert table["kind"].tolist()[:3] == ["prediction", "suppression", ""]
    assert (table["kind"][3:] == "").all()
    assert table["vocabulary_kurtosis"][0] > 10
    np.testing.assert_allclose(table["vocabulary_kurtosis"][0], table["vocabulary_kurtosis"][1])
    assert np.isnan(table["vocabulary_skew"][2])
    np.testing.assert_allclose(table["cosine_in_out"][3], -1.0)


@torch.no_grad()
def test_half_precision_is_close_to_single() -> None:
    whole = neuron_weights(families.subject("gemma2", torch.float32))
    half = neuron_weights(families.subject("gemma2", torch.bfloat16))
    for name in ("norm_in", "norm_gate", "norm_out", "cosine_in_out", "vocabulary_variance"):
        np.testing.assert_allclose(half[name], whole[name], rtol=2e-2, atol=2e-2)
