"""sparsify's folder gives the codes and reconstructions that its own convention says, worked out here from the raw arrays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mechscope.errors import ModelError, SettingsError
from mechscope.features.formats import read_sparsify
from tests.features.conventions import K, X, arrays, doubles, equal, relu, top
from tests.features.oracle import LATENTS, D


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
    if across:
        with pytest.raises(SettingsError, match="if it is m1 in your model"):
            read_sparsify(folder)
    given = read_sparsify(folder, place="m1" if across else None)
    equal(given, f, out)
    assert given.layout.inputs[0].name == ("m1.in" if across else "resid1")
    (folder / "cfg.json").write_text(json.dumps({"activation": "groupmax", "k": K, "d_in": D}))
    with pytest.raises(ModelError, match="activation 'groupmax'"):
        read_sparsify(folder)
