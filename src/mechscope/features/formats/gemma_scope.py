"""Gemma Scope's files (Lieberum et al. 2024): `params.npz` with JumpReLU weights, in folders that say the layer.

f = pre · 1[pre > threshold],  pre = x W_enc + b_enc;   x̂ = f W_dec + b_dec            W_enc (d, m)
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from mechscope.errors import RunError, SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.formats.parts import Given, between, chosen, taken
from mechscope.features.places import FeatureSite, Place
from mechscope.features.rules import Rule

_KINDS: dict[str, FeatureSite] = {"res": "residual", "mlp": "mlp_output", "att": "z"}


def read_gemma_scope(path: str | Path, *, place: Given = None) -> Dictionary:
    """Read a dictionary of Gemma Scope.

    Args:
        path: `params.npz`, or the folder that holds it.
        place: What it reads and writes, where the folders above do not say it (`…-pt-res/layer_20/…`).

    Raises:
        SettingsError: Neither the folders nor `place` say where it belongs.
        ModelError: Arrays are missing.
        RunError: The file is missing or damaged.
    """
    path = Path(path)
    file = path / "params.npz" if path.is_dir() else path
    try:
        with np.load(file, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise RunError(f"cannot read {file}: {error}. Is it complete?") from error
    bias = taken(tensors, "b_dec", file)
    return between(
        *(2 * (chosen(place or _said(file), None),)),
        Rule("jumprelu"),
        encoder=taken(tensors, "W_enc", file).T,
        decoder=taken(tensors, "W_dec", file),
        encoder_bias=taken(tensors, "b_enc", file),
        decoder_bias=bias,
        about={"format": "Gemma Scope", "source": file.parent.name},
        # it rectifies too, so a threshold below zero acts as zero
        threshold=taken(tensors, "threshold", file).clamp(min=0),
    )


def _said(file: Path) -> Place:
    text = file.absolute().as_posix()
    kind, layer = re.search(r"-(?:pt|it)-(res|mlp|att)\b", text), re.search(r"layer_(\d+)", text)
    if not kind or not layer:
        raise SettingsError(f"{file}: the folders above do not say its layer and place (…-pt-res/layer_20/…): give place=, such as resid20")
    return Place(_KINDS[kind[1]], int(layer[1]))
