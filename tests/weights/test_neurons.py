"""What neurons read and write, held against the model's own modules by name, and against neurons built by hand."""

from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from mechscope.errors import ModelError, SettingsError
from mechscope.instrument import Walk, record
from mechscope.subject.load import Subject, load
from mechscope.weights import neurons as module
from mechscope.weights.mlp import Mlps
from mechscope.weights.neurons import neuron_tokens, neuron_weights
from tests import families

LAYERNORM = ("gpt2", "gpt_neox", "opt", "phi")
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
# one of each kind of MLP, norm and block
KINDS = ("gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma2", "gemma3", "phi3")


def close(family: str) -> dict[str, Any]:
    # RMS norms compute in float32 whatever the type
    return {"rtol": 1e-9, "atol": 1e-9} if family in LAYERNORM else {"rtol": 1e-5, "atol": 1e-5}


class Named:
    """A family's own modules, reached by the names that Hugging Face gives them: the tests' view, independent of the package's."""

    def __init__(self, subject: Subject) -> None:
        self.model, self.family = subject.plain, subject.family
        inner: Any = self.model
        match self.family:
            case "gpt2":
                self.blocks, self.final, self.head = inner.transformer.h, inner.transformer.ln_f, inner.lm_head
            case "gpt_neox":
                self.blocks, self.final, self.head = inner.gpt_neox.layers, inner.gpt_neox.final_layer_norm, inner.lm_head
            case "opt":
                self.blocks, self.final = inner.model.decoder.layers, inner.model.decoder.final_layer_norm
                self.head = inner.lm_head
            case _:
                self.blocks, self.final, self.head = inner.model.layers, inner.model.norm, inner.lm_head

    def embedded(self) -> Tensor:
        """All tokens as they enter the residual stream, without position."""
        found = self.model.get_input_embeddings()(torch.arange(families.VOCABULARY))
        # gemma 3 scales inside its embedding, gemma 2 behind it
        return found * families.WIDTH**0.5 if self.family == "gemma2" else found

    def norm(self, layer: int) -> Any:
        block: Any = self.blocks[layer]
        match self.family:
            case "gpt2":
                return block.ln_2
            case "opt":
                return block.final_layer_norm
            case "gemma2" | "gemma3_text":
                return block.pre_feedforward_layernorm
            case _:
                return block.post_attention_layernorm

    def inputs(self, layer: int, x: Tensor) -> dict[str, Tensor]:
        """What goes into the activation, and what it is multiplied with."""
        block: Any = self.blocks[layer]
        match self.family:
            case "gpt2":
                return {"in": block.mlp.c_fc(x)}
            case "gpt_neox":
                return {"in": block.mlp.dense_h_to_4h(x)}
            case "opt":
                return {"in": block.fc1(x)}
            case "phi3":
                gate, up = block.mlp.gate_up_proj(x).chunk(2, dim=-1)
                return {"gate": gate, "in": up}
            case _:
                return {"gate": block.mlp.gate_proj(x), "in": block.mlp.up_proj(x)}

    def written(self, layer: int) -> Tensor:
        """``(neuron, d_model)``: what each neuron alone writes for an activation of 1, the scale of a norm behind it left out."""
        block: Any = self.blocks[layer]
        match self.family:
            case "gpt2":
                return block.mlp.c_proj.weight
            case "gpt_neox":
                return block.mlp.dense_4h_to_h.weight.T
            case "opt":
                return block.fc2.weight.T
            case "gemma2" | "gemma3_text":
                return block.mlp.down_proj.weight.T * (1 + block.post_feedforward_layernorm.weight)
            case _:
                return block.mlp.down_proj.weight.T

    def directions(self) -> Tensor:
        """``(token, d_model)``: what each token's logit reads, less the mean over tokens."""
        gain = 1 + self.final.weight if self.family.startswith("gemma") else self.final.weight
        read = self.head.weight * gain
        if self.family in LAYERNORM:
            read = read - read.mean(1, keepdim=True)
        return read - read.mean(0)


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def values_of(table: pd.DataFrame, side: str, neuron: int) -> tuple[list[int], np.ndarray]:
    rows = table[(table["side"] == side) & (table["neuron"] == neuron)].sort_values("place")
    return rows["token_id"].tolist(), rows["value"].to_numpy()


# --- MLPs taken apart ----------------------------------------------------------------------------------------------------------------------------


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
