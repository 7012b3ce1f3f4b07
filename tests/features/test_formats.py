"""Every library's folder gives the codes and reconstructions that its own convention says, worked out here from the raw arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechscope.errors import MechscopeError, ModelError, RunError, SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.formats import (
    read_circuit_tracer,
    read_dictionary_learning,
    read_gemma_scope,
    read_saelens,
    read_sparsify,
    write_circuit_tracer,
    write_saelens,
)
from mechscope.features.formats.hooks import hook_of, place_of
from mechscope.features.layout import autoencoder, cross_layer, crosscoder, transcoder
from mechscope.features.places import Place
from mechscope.features.rules import Rule
from tests.features import oracle
from tests.features.oracle import LATENTS, TOKENS, D

Arrays = Mapping[str, np.ndarray]
K = 4
X = np.random.default_rng(9).normal(size=(TOKENS, D)) * 2


def arrays(seed: int = 0, /, **shapes: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def top(x: np.ndarray, k: int = K) -> np.ndarray:
    kept = np.zeros_like(x)
    for row, values in enumerate(x):
        best = np.argsort(-values)[:k]
        kept[row, best] = values[best]
    return relu(kept)


def equal(given: Dictionary, f: np.ndarray, out: np.ndarray, x: np.ndarray = X) -> None:
    values = [torch.from_numpy(x)]
    given = given.to(torch.float64)
    assert 0 < (f != 0).sum() < f.size
    np.testing.assert_allclose(given.encode(values).dense(), f, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(given(values)[0], out, rtol=1e-6, atol=1e-6)


def doubles(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def saelens(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    whole = {
        "d_in": D,
        "d_sae": LATENTS,
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.1.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps({**whole, **config}))
    return folder


def saelens_values(a: Arrays, config: Mapping[str, Any], x: np.ndarray = X) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate SAELens's convention."""
    inside = x - a["b_dec"] if config.get("apply_b_dec_to_input") else x
    product, norms = inside @ a["W_enc"], np.linalg.norm(a["W_dec"], axis=1)
    architecture = config["architecture"]
    decoder = a["W_dec"]
    if architecture == "gated":
        f = (product + a["b_gate"] > 0) * relu(inside @ (a["W_enc"] * np.exp(a["r_mag"])) + a["b_mag"])
    elif architecture == "topk":
        pre = product + a["b_enc"]
        f = top(pre * norms if config.get("rescale_acts_by_decoder_norm") else pre, config["k"])
        decoder = decoder / norms[:, None] if config.get("rescale_acts_by_decoder_norm") else decoder
    elif "jumprelu" in architecture:
        pre = product + a["b_enc"]
        f = relu(pre) * (pre > a["threshold"])
    else:
        f = relu(product + a["b_enc"])
    out = f @ decoder + a["b_dec"]
    return f, out + x @ a["W_skip"].T if "skip" in architecture else out


SAELENS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "standard": ({"b_enc": (LATENTS,)}, {"apply_b_dec_to_input": True}),
    "gated": ({"b_gate": (LATENTS,), "r_mag": (LATENTS,), "b_mag": (LATENTS,)}, {"apply_b_dec_to_input": True}),
    "topk": ({"b_enc": (LATENTS,)}, {"k": K}),
    "topk rescaled": ({"b_enc": (LATENTS,)}, {"k": K, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ({"b_enc": (LATENTS,), "threshold": (LATENTS,)}, {}),
    "transcoder": ({"b_enc": (LATENTS,)}, {"apply_b_dec_to_input": True}),
    "skip_transcoder": ({"b_enc": (LATENTS,), "W_skip": (D, D)}, {}),
    "jumprelu_transcoder": ({"b_enc": (LATENTS,), "threshold": (LATENTS,)}, {}),
}


@pytest.mark.parametrize("case", SAELENS)
def test_saelens(case: str, tmp_path: Path) -> None:
    shapes, config = SAELENS[case]
    tensors = arrays(W_enc=(D, LATENTS), W_dec=(LATENTS, D), b_dec=(D,), **shapes)
    config = {**config, "architecture": case.split()[0]}
    across = "transcoder" in case
    if across:
        config["metadata"] = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    given = read_saelens(saelens(tmp_path / "sae", tensors, **config))
    # a transcoder's output bias is of another place than its input
    equal(given, *saelens_values(doubles(tensors), {**config, "apply_b_dec_to_input": config.get("apply_b_dec_to_input") and not across}))
    expected = (Place("mlp_input", 1), Place("mlp_output", 1)) if across else (Place("residual", 1), Place("residual", 1))
    assert (given.layout.inputs[0], given.layout.outputs[0]) == expected


@pytest.mark.parametrize("rule", oracle.RULES, ids=str)
def test_what_is_written_for_saelens_is_what_the_dictionary_says(rule: Rule, tmp_path: Path) -> None:
    given = oracle.dictionary(autoencoder("resid1", D, LATENTS, rule))
    values = [torch.from_numpy(X)]
    write_saelens(given, tmp_path / "sae", model_name="tiny")
    tensors, config = load_file(tmp_path / "sae" / "sae_weights.safetensors"), json.loads((tmp_path / "sae" / "cfg.json").read_text())
    f, out = saelens_values(doubles(tensors), config)
    # compared by norm, codes are given times the norms
    factor = oracle.sizes(given.layout, given.tensors) if rule.by_norm else 1
    np.testing.assert_allclose(f, given.encode(values).dense() * factor, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out, given(values)[0], rtol=1e-5, atol=1e-5)
    equal(read_saelens(tmp_path / "sae"), f, out)
    assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("rule", [Rule("relu"), Rule("jumprelu"), Rule("batchtopk", 5)], ids=str)
def test_transcoders_written_for_saelens(rule: Rule, skip: bool, tmp_path: Path) -> None:
    given = oracle.dictionary(transcoder(1, D, LATENTS, rule, skip=skip))
    write_saelens(given, tmp_path / "sae")
    again, values = read_saelens(tmp_path / "sae").to(torch.float64), [torch.from_numpy(X)]
    np.testing.assert_allclose(again(values)[0], given(values)[0], rtol=1e-5, atol=1e-5)
    assert again.layout.skip == skip


def test_what_saelens_does_not_know_is_refused(tmp_path: Path) -> None:
    refused: list[tuple[Dictionary, str]] = [
        (oracle.dictionary(crosscoder("resid0,resid1", (D, D), LATENTS, Rule("relu"))), "several places"),
        (oracle.dictionary(transcoder(1, D, LATENTS, Rule("topk", 4))), "no transcoder with rule topk"),
    ]
    for dictionary, words in refused:
        with pytest.raises(SettingsError, match=words):
            write_saelens(dictionary, tmp_path / "none")
    tensors = arrays(W_enc=(D, LATENTS), W_dec=(LATENTS, D), b_dec=(D,), b_enc=(LATENTS,))
    cases: list[tuple[dict[str, Any], type[MechscopeError], str]] = [
        ({"architecture": "temporal"}, ModelError, "architecture 'temporal'"),
        ({"architecture": "standard", "normalize_activations": "layer_norm"}, ModelError, "scaled by 'layer_norm' while it runs"),
        ({"architecture": "standard", "normalize_activations": "expected_average_only_in"}, ModelError, "fold the scale"),
        ({"architecture": "jumprelu"}, ModelError, "lacks 'threshold'"),
        (
            {"architecture": "standard", "metadata": {"hook_name": "blocks.3.attn.hook_q"}},
            SettingsError,
            r"hook 'blocks.3.attn.hook_q' is no place",
        ),
    ]
    for number, (config, kind, words) in enumerate(cases):
        with pytest.raises(kind, match=words):
            read_saelens(saelens(tmp_path / f"case{number}", tensors, **config))
    odd = saelens(tmp_path / "odd", tensors, architecture="standard", metadata={"hook_name": "blocks.3.attn.hook_q"})
    assert read_saelens(odd, place="a3").layout.inputs == (Place("attention_output", 3),)
    with pytest.raises(RunError, match="cannot read"):
        read_saelens(tmp_path / "absent")


def learned(folder: Path, state: Mapping[str, Tensor], **trainer: Any) -> Path:
    folder.mkdir()
    torch.save(dict(state), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"submodule_name": "resid_post_layer_1", **trainer}, "buffer": {}}))
    return folder


def linear_state() -> dict[str, Tensor]:
    return arrays(**{"encoder.weight": (LATENTS, D), "encoder.bias": (LATENTS,), "decoder.weight": (D, LATENTS)})


def test_dictionary_learning_relu(tmp_path: Path) -> None:
    state = {**linear_state(), **arrays(1, bias=(D,))}
    a = doubles(state)
    f = relu((X - a["bias"]) @ a["encoder.weight"].T + a["encoder.bias"])
    equal(read_dictionary_learning(learned(tmp_path / "ae", state, dict_class="AutoEncoder")), f, f @ a["decoder.weight"].T + a["bias"])


@pytest.mark.parametrize("kind", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_dictionary_learning_topk(kind: str, tmp_path: Path) -> None:
    state = {**linear_state(), **arrays(1, b_dec=(D,)), "k": torch.tensor(K), "threshold": torch.tensor(0.7)}
    a = doubles(state)
    pre = (X - a["b_dec"]) @ a["encoder.weight"].T + a["encoder.bias"]
    f = top(relu(pre)) if kind == "AutoEncoderTopK" else relu(pre) * (relu(pre) > 0.7)
    given = read_dictionary_learning(learned(tmp_path / "ae", state, dict_class=kind))
    threshold = np.float64(np.float32(0.7))
    equal(given, f if kind == "AutoEncoderTopK" else relu(pre) * (relu(pre) > threshold), f @ a["decoder.weight"].T + a["b_dec"])


def test_dictionary_learning_matryoshka(tmp_path: Path) -> None:
    state = {
        **arrays(W_enc=(D, LATENTS), W_dec=(LATENTS, D), b_enc=(LATENTS,), b_dec=(D,)),
        "k": torch.tensor(K),
        "threshold": torch.tensor(0.5),
    }
    a = doubles(state)
    pre = (X - a["b_dec"]) @ a["W_enc"] + a["b_enc"]
    f = relu(pre) * (pre > 0.5)
    equal(read_dictionary_learning(learned(tmp_path / "ae", state, dict_class="MatryoshkaBatchTopKSAE")), f, f @ a["W_dec"] + a["b_dec"])


def test_dictionary_learning_gated(tmp_path: Path) -> None:
    own = arrays(1, decoder_bias=(D,), r_mag=(LATENTS,), gate_bias=(LATENTS,), mag_bias=(LATENTS,))
    state = {**{name: tensor for name, tensor in linear_state().items() if name != "encoder.bias"}, **own}
    a = doubles(state)
    product = (X - a["decoder_bias"]) @ a["encoder.weight"].T
    f = (product + a["gate_bias"] > 0) * relu(np.exp(a["r_mag"]) * product + a["mag_bias"])
    norms = np.linalg.norm(a["decoder.weight"], axis=0)
    equal(
        read_dictionary_learning(learned(tmp_path / "ae", state, dict_class="GatedAutoEncoder")),
        f * norms,
        f @ a["decoder.weight"].T + a["decoder_bias"],
    )


@pytest.mark.parametrize("subtracts", [True, False])
def test_dictionary_learning_jumprelu(subtracts: bool, tmp_path: Path) -> None:
    state = arrays(W_enc=(D, LATENTS), W_dec=(LATENTS, D), b_enc=(LATENTS,), b_dec=(D,), threshold=(LATENTS,))
    a = doubles(state)
    pre = (X - a["b_dec"] * subtracts) @ a["W_enc"] + a["b_enc"]
    f = relu(pre * (pre > a["threshold"]))
    folder = learned(tmp_path / "ae", {**state, "apply_b_dec_to_input": torch.tensor(subtracts)}, dict_class="JumpReluAutoEncoder")
    equal(read_dictionary_learning(folder), f * np.linalg.norm(a["W_dec"], axis=1), f @ a["W_dec"] + a["b_dec"])


class Harmful:
    """Something that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return print, ("this must never be printed",)


def test_dictionary_learning_refuses_code_and_thresholds_that_were_never_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = learned(tmp_path / "bad", {**linear_state(), "evil": Harmful()}, dict_class="AutoEncoder")  # type: ignore[dict-item]
    with pytest.raises(ModelError, match="holds more than tensors"):
        read_dictionary_learning(bad)
    assert "never" not in capsys.readouterr().out
    state = {**linear_state(), **arrays(1, b_dec=(D,)), "k": torch.tensor(K), "threshold": torch.tensor(-1.0)}
    with pytest.raises(ModelError, match="its threshold was never set"):
        read_dictionary_learning(learned(tmp_path / "early", state, dict_class="BatchTopKSAE"))
    with pytest.raises(ModelError, match="class 'CrossCoder'"):
        read_dictionary_learning(learned(tmp_path / "cross", state, dict_class="CrossCoder"))
    with pytest.raises(SettingsError, match="hook 'somewhere' is no place"):
        read_dictionary_learning(learned(tmp_path / "where", state, dict_class="AutoEncoderTopK", submodule_name="somewhere"))
    (bad / "ae.pt").write_bytes(b"nothing")
    with pytest.raises(MechscopeError, match=r"ae\.pt"):
        read_dictionary_learning(bad)


@pytest.mark.parametrize("across", [False, True])
def test_sparsify(across: bool, tmp_path: Path) -> None:
    folder = tmp_path / ("layers.1.mlp" if across else "layers.1")
    folder.mkdir()
    tensors = {**arrays(**{"encoder.weight": (LATENTS, D), "encoder.bias": (LATENTS,)}), **arrays(1, W_dec=(LATENTS, D), b_dec=(D,))}
    if across:
        tensors |= arrays(2, W_skip=(D, D))
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "k": K, "d_in": D, "transcode": across, "skip_connection": across}))
    a = doubles(tensors)
    f = top(relu((X if across else X - a["b_dec"]) @ a["encoder.weight"].T + a["encoder.bias"]))
    out = f @ a["W_dec"] + a["b_dec"] + (X @ a["W_skip"].T if across else 0)
    given = read_sparsify(folder)
    equal(given, f, out)
    assert given.layout.inputs[0].name == ("m1.in" if across else "resid1")
    (folder / "cfg.json").write_text(json.dumps({"activation": "groupmax", "k": K, "d_in": D}))
    with pytest.raises(ModelError, match="activation 'groupmax'"):
        read_sparsify(folder)


CONFIG = {"model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}


@pytest.mark.parametrize("jumps", [True, False])
def test_circuit_tracer_per_layer(jumps: bool, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    every = []
    for layer in range(2):
        tensors = arrays(layer, W_enc=(LATENTS, D), W_dec=(LATENTS, D), b_enc=(LATENTS,), b_dec=(D,), W_skip=(D, D))
        if jumps:
            tensors |= {"activation_function.threshold": arrays(5, t=(LATENTS,))["t"].abs()}
        save_file(tensors, tmp_path / f"layer_{layer}.safetensors")
        every.append(doubles(tensors))
    found = read_circuit_tracer(tmp_path)
    assert list(found) == [Place("mlp_output", 0), Place("mlp_output", 1)]
    for given, a in zip(found.values(), every, strict=True):
        pre = X @ a["W_enc"].T + a["b_enc"]
        f = pre * (pre > a["activation_function.threshold"]) if jumps else relu(pre)
        equal(given, f, f @ a["W_dec"] + a["b_dec"] + X @ a["W_skip"].T)


def test_circuit_tracer_cross_layer(tmp_path: Path) -> None:
    layers, latents = 3, 20
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "model_kind": "cross_layer_transcoder"}))
    enc, dec = [], []
    for layer in range(layers):
        own = arrays(
            layer,
            **{f"W_enc_{layer}": (latents, D), f"b_enc_{layer}": (latents,), f"b_dec_{layer}": (D,), f"threshold_{layer}": (latents,)},
        )
        own[f"threshold_{layer}"] = own[f"threshold_{layer}"].abs()
        writes = arrays(10 + layer, **{f"W_dec_{layer}": (latents, layers - layer, D)})
        save_file(own, tmp_path / f"W_enc_{layer}.safetensors")
        save_file(writes, tmp_path / f"W_dec_{layer}.safetensors")
        enc.append(doubles(own))
        dec.append(doubles(writes)[f"W_dec_{layer}"])
    (given,) = read_circuit_tracer(tmp_path).values()
    inputs = [X * (1 + layer) for layer in range(layers)]
    pre = [inputs[layer] @ a[f"W_enc_{layer}"].T + a[f"b_enc_{layer}"] for layer, a in enumerate(enc)]
    f = [each * (each > enc[layer][f"threshold_{layer}"]) for layer, each in enumerate(pre)]
    outs = given.to(torch.float64)([torch.from_numpy(each) for each in inputs])
    for layer in range(layers):
        expected = enc[layer][f"b_dec_{layer}"] + sum(f[source] @ dec[source][:, layer - source] for source in range(layer + 1))
        np.testing.assert_allclose(outs[layer], expected, rtol=1e-6, atol=1e-6)
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({**CONFIG, "model_kind": "cross_layer_transcoder", "feature_input_hook": "hook_resid_mid"})
    )
    with pytest.raises(SettingsError, match=r"hook 'blocks.0.hook_resid_mid' is no place"):
        read_circuit_tracer(tmp_path)
    (tmp_path / "W_enc_1.safetensors").unlink()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "model_kind": "cross_layer_transcoder"}))
    with pytest.raises(RunError, match=r"holds the layers \[0, 2\]"):
        read_circuit_tracer(tmp_path)


@pytest.mark.parametrize("rule", [Rule("relu"), Rule("jumprelu"), Rule("batchtopk", 5, by_norm=True)], ids=str)
def test_what_is_written_for_circuit_tracer_is_what_the_dictionaries_say(rule: Rule, tmp_path: Path) -> None:
    given = {f"m{layer}": oracle.dictionary(transcoder(layer, D, LATENTS, rule, skip=True), seed=layer + 1) for layer in range(2)}
    write_circuit_tracer(given, tmp_path, model_name="tiny")
    values = [torch.from_numpy(X)]
    for layer, dictionary in enumerate(given.values()):
        a = doubles(load_file(tmp_path / f"layer_{layer}.safetensors"))
        pre = X @ a["W_enc"].T + a["b_enc"]
        f = relu(pre) if rule.name == "relu" else pre * (pre > a["activation_function.threshold"])
        out = f @ a["W_dec"] + a["b_dec"] + X @ a["W_skip"].T
        np.testing.assert_allclose(out, dictionary(values)[0], rtol=1e-5, atol=1e-5)
        equal(read_circuit_tracer(tmp_path)[Place("mlp_output", layer)], f, out)


def test_a_cross_layer_transcoder_is_read_as_it_was_written_for_circuit_tracer(tmp_path: Path) -> None:
    given = oracle.dictionary(cross_layer((0, 1, 2), D, 20, Rule("jumprelu")))
    write_circuit_tracer({"m0": given}, tmp_path)
    assert load_file(tmp_path / "W_dec_1.safetensors")["W_dec_1"].shape == (20, 2, D)
    (again,) = read_circuit_tracer(tmp_path).values()
    values = [torch.from_numpy(X) * (1 + layer) for layer in range(3)]
    for one, two in zip(again.to(torch.float64)(values), given(values), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_what_circuit_tracer_does_not_know_is_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Dictionary], str]] = [
        ({"resid0": oracle.dictionary(autoencoder("resid0", D, LATENTS, Rule("relu")))}, "from MLP inputs to MLP outputs"),
        ({"m0": oracle.dictionary(transcoder(0, D, LATENTS, Rule("gated")))}, "rule gated is none of circuit-tracer's"),
        ({"m1": oracle.dictionary(transcoder(1, D, LATENTS, Rule("relu")))}, "every layer from 0 on: given are layers 1"),
    ]
    for dictionaries, words in cases:
        with pytest.raises(SettingsError, match=words):
            write_circuit_tracer(dictionaries, tmp_path)


def test_gemma_scope(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    tensors = arrays(W_enc=(D, LATENTS), W_dec=(LATENTS, D), b_enc=(LATENTS,), b_dec=(D,), threshold=(LATENTS,))
    given_arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(folder / "params.npz", **given_arrays)
    a = doubles(tensors)
    pre = X @ a["W_enc"] + a["b_enc"]
    f = relu(pre) * (pre > a["threshold"])
    given = read_gemma_scope(folder)
    equal(given, f, f @ a["W_dec"] + a["b_dec"])
    assert given.layout.inputs == (Place("residual", 20),)
    other = tmp_path / "elsewhere.npz"
    other.write_bytes((folder / "params.npz").read_bytes())
    with pytest.raises(SettingsError, match="do not say its layer"):
        read_gemma_scope(other)
    assert read_gemma_scope(other, place="m3").layout.inputs == (Place("mlp_output", 3),)
    other.write_bytes(b"nothing")
    with pytest.raises(RunError, match="cannot read"):
        read_gemma_scope(other, place="m3")


def test_hooks_and_places_say_the_same() -> None:
    for place in ("resid3", "a3", "m3", "m3.in", "a3.z"):
        assert place_of(hook_of(Place.parse(place))).name == place
    for name, place in {
        "blocks.4.hook_resid_pre": "resid3",
        "layers.5": "resid5",
        "model.layers.5.mlp": "m5",
        "transformer.h.2": "resid2",
        "mlp_out_layer_7": "m7",
    }.items():
        assert place_of(name).name == place
    for name in ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_mid", "blocks.2.attn.hook_k", "embed_tokens", ""):
        with pytest.raises(SettingsError, match="is no place of mechscope"):
            place_of(name)
