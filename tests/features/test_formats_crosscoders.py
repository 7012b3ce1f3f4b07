"""A crosscoder of another library gives the codes and reconstructions that its own convention says, worked out here from the raw arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechscope.errors import ModelError, RunError, SettingsError
from mechscope.features.formats import read_crosscoder
from tests.features.conventions import X, arrays, doubles, relu
from tests.features.oracle import LATENTS, D

WHERE = "base:resid1,tuned:resid1"
INPUTS = np.stack([X, X[::-1] * 0.7 + 0.2], axis=1)


def state(**more: Tensor) -> dict[str, Tensor]:
    """Return weights as the fork keeps them."""
    shapes = {"encoder.weight": (2, D, LATENTS), "encoder.bias": (LATENTS,), "decoder.weight": (2, LATENTS, D), "decoder.bias": (2, D)}
    return {**arrays(**shapes), "code_normalization_id": torch.tensor(1), **more}


def kept(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, path / "ae.pt")
    return path


def said(a: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return relu(pre) of scaled inputs."""
    return relu(np.einsum("tld,ldf->tf", x, a["encoder.weight"]) + a["encoder.bias"])


def assert_equal(path: Path, f: np.ndarray, out: np.ndarray) -> None:
    given = read_crosscoder(path, WHERE).to(torch.float64)
    values = [torch.from_numpy(np.ascontiguousarray(INPUTS[:, place])) for place in range(2)]
    assert 0 < (f != 0).sum() < f.size
    np.testing.assert_allclose(given.encode(values).dense(), f, rtol=1e-6, atol=1e-6)
    for place, found in enumerate(given(values)):
        np.testing.assert_allclose(found, out[:, place], rtol=1e-6, atol=1e-6)


def test_the_fork_with_an_l1_penalty(tmp_path: Path) -> None:
    kept(tmp_path, state())
    a = doubles(state())
    f = said(a, INPUTS)
    assert_equal(tmp_path, f, np.einsum("tf,lfd->tld", f, a["decoder.weight"]) + a["decoder.bias"])


@pytest.mark.parametrize("scaled", ["not", "by place", "by feature"])
@pytest.mark.parametrize("normalisation", [1, 2, 4])
def test_the_fork_with_batchtopk(normalisation: int, scaled: str, tmp_path: Path) -> None:
    more = {"code_normalization_id": torch.tensor(normalisation), "k": torch.tensor(4), "threshold": torch.tensor(4.0)}
    nan = torch.full((2, D), torch.nan)
    more |= {"activation_mean": nan, "activation_std": nan, "target_rms": torch.tensor(1.0), "activation_global_scale": torch.ones(2)}
    if scaled != "not":
        more |= {"activation_mean": arrays(3, m=(2, D))["m"], "activation_std": arrays(4, s=(2, D))["s"].abs() + 0.5}
    if scaled == "by place":
        more["activation_global_scale"] = 1 / (more["activation_std"] ** 2).sum(-1).sqrt() * 3
    kept(tmp_path, state(**more))
    a = doubles(state(**more))
    scale = {"not": 1.0, "by place": a["activation_global_scale"][:, None], "by feature": 1 / (a["activation_std"] + 1e-8)}[scaled]
    centre = 0.0 if scaled == "not" else a["activation_mean"]
    f = said(a, (INPUTS - centre) * scale)
    decoder = a["decoder.weight"]
    norms = {1: np.linalg.norm(decoder, axis=2).sum(0), 2: np.sqrt((decoder**2).sum((0, 2))), 4: np.ones(LATENTS)}[normalisation]
    f = f * (f * norms > 4.0)
    assert_equal(tmp_path, f, (np.einsum("tf,lfd->tld", f, decoder) + a["decoder.bias"]) / scale + centre)
    name = read_crosscoder(tmp_path, WHERE).layout.rule.name
    assert name == ("batchtopk" if normalisation == 1 and scaled != "by feature" else "jumprelu")


def test_the_first_replication(tmp_path: Path) -> None:
    tensors = arrays(W_enc=(2, D, LATENTS), W_dec=(LATENTS, 2, D), b_enc=(LATENTS,), b_dec=(2, D))
    save_file(tensors, tmp_path / "model.safetensors")
    a = doubles(tensors)
    f = relu(np.einsum("tld,ldf->tf", INPUTS, a["W_enc"]) + a["b_enc"])
    assert_equal(tmp_path, f, np.einsum("tf,fld->tld", f, a["W_dec"]) + a["b_dec"])


def test_what_would_not_say_the_same_is_refused_by_name(tmp_path: Path) -> None:
    topk = {"k": torch.tensor(4), "threshold": torch.tensor(2.0)}
    for number, (more, words) in enumerate(
        (
            ({**topk, "code_normalization_id": torch.tensor(5)}, "by the norm 'decoupled'"),
            ({**topk, "code_normalization_id": torch.tensor(3)}, "by the norm 'mixed'"),
            ({**topk, "threshold": torch.tensor(-1.0)}, "a threshold that was never set"),
            ({**topk, "threshold": torch.ones(2)}, "one threshold for each place"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ModelError, match=words):
            read_crosscoder(kept(folder, state(**more)), WHERE)
    kept(tmp_path, state())
    with pytest.raises(SettingsError, match=r"reads 2 places and writes 2, named are 1 \(resid1\)"):
        read_crosscoder(tmp_path, "resid1")
    torch.save({**state(), "note": "anything"}, tmp_path / "ae.pt")
    with pytest.raises(ModelError, match="more than tensors"):
        read_crosscoder(tmp_path, WHERE)
    (tmp_path / "ae.pt").unlink()
    with pytest.raises(RunError, match=r"holds none of model\.safetensors, ae\.pt, model_final\.pt"):
        read_crosscoder(tmp_path, WHERE)
    bags = {name: tensor for name, tensor in state().items() if name != "decoder.weight"} | {"decoder.layers.0.weight": torch.ones(2, 2)}
    with pytest.raises(ModelError, match="embedding bags"):
        read_crosscoder(kept(tmp_path, bags), WHERE)
    # a state that says which scaling it has beside it
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"keep_relative_variance": True}}))
    ones = {"activation_mean": torch.zeros(2, D), "activation_std": torch.ones(2, D) * 2, "activation_global_scale": torch.ones(2)}
    kept(tmp_path, state(**ones))
    assert read_crosscoder(tmp_path, WHERE).input_maps[0].scale == 1.0
