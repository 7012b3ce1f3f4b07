"""sparsify's folders (EleutherAI), one for every hook point: `cfg.json` beside `sae.safetensors`.

f = the k largest of relu((x − b_dec) Eᵀ + b);  x̂ = f W_dec + b_dec            a transcoder subtracts nothing, and may add x W_skipᵀ
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mechscope.errors import ModelError, SettingsError
from mechscope.features.dictionary import Dictionary
from mechscope.features.formats.parts import Given, between, chosen, safetensors, taken
from mechscope.features.places import Place
from mechscope.features.rules import Rule
from mechscope.store.files import read_json


def read_sparsify(folder: str | Path, *, place: Given = None) -> Dictionary:
    """Read a dictionary of sparsify.

    Args:
        folder: The folder of one hook point, whose name says what it reads and writes: `layers.5`, `h.5.mlp`.
        place: What it writes, where the folder's name is none of ours; a transcoder writes an MLP's output and reads its input.

    Raises:
        SettingsError: The folder's name stands for no place, or a transcoder's for no MLP.
        ModelError: Its activation is not topk, or tensors are missing.
        RunError: A file is missing or damaged.
    """
    folder = Path(folder)
    config: dict[str, Any] = read_json(folder / "cfg.json")
    if config.get("activation", "topk") != "topk":
        raise ModelError(f"{folder}: activation {config['activation']!r} of sparsify is not supported: topk is")
    outside = inside = chosen(place, folder.name)
    across = bool(config.get("transcode", False))
    if across:
        if outside.site != "mlp_output":
            raise SettingsError(
                f"{folder}: a transcoder at {outside} would read that module's input, which is a place of mechscope for MLPs only"
            )
        inside = Place("mlp_input", outside.layer)
    tensors = safetensors(folder / "sae.safetensors")
    bias = taken(tensors, "b_dec", folder)
    return between(
        inside,
        outside,
        Rule("topk", int(config["k"])),
        encoder=taken(tensors, "encoder.weight", folder),
        decoder=taken(tensors, "W_dec", folder),
        encoder_bias=taken(tensors, "encoder.bias", folder),
        decoder_bias=bias,
        subtracted=None if across else bias,
        skip=taken(tensors, "W_skip", folder) if config.get("skip_connection") else None,
        about={"format": "sparsify", "source": folder.name, "config": config},
    )
