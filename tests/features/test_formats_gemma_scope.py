"""Gemma Scope's folder gives the codes and reconstructions that its own convention says, worked out here from the raw arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechscope.errors import RunError, SettingsError
from mechscope.features.formats import read_gemma_scope
from mechscope.features.places import Place
from tests.features.conventions import X, arrays, doubles, equal, relu
from tests.features.oracle import LATENTS, D


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
