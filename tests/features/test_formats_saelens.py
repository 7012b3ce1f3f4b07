"""SAELens's folder gives the codes and reconstructions that its own convention says, worked out here from the raw arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechscope.errors import MechscopeError, ModelError, RunError, SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.formats import read_saelens, write_saelens
from mechscope.features.layout import autoencoder, crosscoder, transcoder
from mechscope.features.places import Place
from mechscope.features.rules import Rule
from tests.features import oracle
from tests.features.conventions import Arrays, K, X, arrays, doubles, equal, relu, top
from tests.features.oracle import LATENTS, D


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
    elif architecture == "topk" or config.get("activation_fn_str") == "topk":
        pre = product + a["b_enc"]
        f = top(pre * norms if config.get("rescale_acts_by_decoder_norm") else pre, config.get("k", K))
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
    # before SAELens 6
    "standard topk": ({"b_enc": (LATENTS,)}, {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
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
        config["metadata"] = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
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
        ({"architecture": "standard", "activation_fn_str": "topk"}, ModelError, "activation is topk, and cfg.json does not say its k"),
        ({"architecture": "standard", "activation_fn_str": "tanh-relu"}, ModelError, "activation 'tanh-relu'"),
        (
            {"architecture": "standard", "metadata": {"hook_name": "blocks.3.ln2.hook_normalized"}},
            SettingsError,
            r"if it is m3\.in in your model",
        ),
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


def test_a_tensor_that_is_not_understood_is_refused_and_one_that_changes_nothing_is_not(tmp_path: Path) -> None:
    tensors = arrays(W_enc=(D, LATENTS), W_dec=(LATENTS, D), b_dec=(D,), b_enc=(LATENTS,))
    plain = read_saelens(saelens(tmp_path / "plain", tensors, architecture="standard"))
    ones = read_saelens(saelens(tmp_path / "ones", {**tensors, "scaling_factor": torch.ones(LATENTS)}, architecture="standard"))
    assert all(torch.equal(ones.tensors[name], tensor) for name, tensor in plain.tensors.items())
    for number, (architecture, name) in enumerate((("standard", "scaling_factor"), ("standard", "threshold"), ("transcoder", "W_skip"))):
        folder = saelens(tmp_path / str(number), {**tensors, name: torch.full((LATENTS,), 1.5)}, architecture=architecture)
        with pytest.raises(ModelError, match=f"tensors {name} of a relu dictionary are not understood"):
            read_saelens(folder, place="m1.in", output="m1")


def test_the_bias_is_subtracted_where_the_folder_does_not_say_as_saelens_does(tmp_path: Path) -> None:
    tensors = arrays(W_enc=(D, LATENTS), W_dec=(LATENTS, D), b_dec=(D,), b_enc=(LATENTS,))
    folder = saelens(tmp_path / "sae", tensors, architecture="standard")
    config = json.loads((folder / "cfg.json").read_text())
    del config["apply_b_dec_to_input"]
    (folder / "cfg.json").write_text(json.dumps(config))
    equal(read_saelens(folder), *saelens_values(doubles(tensors), {**config, "apply_b_dec_to_input": True}))
