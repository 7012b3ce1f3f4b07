"""circuit-tracer's folder gives the codes and reconstructions that its own convention says, worked out here from the raw arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mechscope.errors import RunError, SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.formats import read_circuit_tracer, write_circuit_tracer
from mechscope.features.layout import autoencoder, cross_layer, transcoder
from mechscope.features.places import Place
from mechscope.features.rules import Rule
from tests.features import oracle
from tests.features.conventions import X, arrays, doubles, equal, relu
from tests.features.oracle import LATENTS, D

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
        (
            {f"m{layers[0]}": oracle.dictionary(cross_layer(layers, D, 20, Rule("relu"))) for layers in ((0, 1), (2, 3))},
            "holds one cross-layer",
        ),
        (
            {
                "m0": oracle.dictionary(transcoder(0, D, LATENTS, Rule("relu"))),
                "m1": oracle.dictionary(cross_layer((1, 2), D, 20, Rule("relu"))),
            },
            "holds one cross-layer",
        ),
    ]
    for dictionaries, words in cases:
        with pytest.raises(SettingsError, match=words):
            write_circuit_tracer(dictionaries, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_hook_that_is_a_place_in_some_models_only_is_read_where_the_caller_says_which(tmp_path: Path) -> None:
    write_circuit_tracer({"m0": oracle.dictionary(transcoder(0, D, LATENTS, Rule("relu")))}, tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "feature_output_hook": "mlp.hook_out"}))
    with pytest.raises(SettingsError, match="if it is m0 in your model"):
        read_circuit_tracer(tmp_path)
    assert list(read_circuit_tracer(tmp_path, hooks=("mlp.hook_in", "hook_mlp_out"))) == [Place("mlp_output", 0)]
