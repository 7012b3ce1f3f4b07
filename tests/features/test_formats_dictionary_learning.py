"""dictionary_learning's folder gives the codes and reconstructions that its own convention says, worked out here from the raw arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.errors import MechscopeError, ModelError, SettingsError
from mechscope.features.formats import read_dictionary_learning
from tests.features.conventions import K, X, arrays, doubles, equal, relu, top
from tests.features.oracle import LATENTS, D


def learned(folder: Path, state: Mapping[str, object], **trainer: Any) -> Path:
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
    bad = learned(tmp_path / "bad", {**linear_state(), "evil": Harmful()}, dict_class="AutoEncoder")
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
