"""dictionary_learning's folders (saprmarks): `config.json` beside `ae.pt`, a pickled state that is read as tensors and nothing else.

AutoEncoder                  f = relu((x − bias) Eᵀ + b),  x̂ = f Dᵀ + bias                    D (d, m)
GatedAutoEncoder             gate and magnitude of (x − decoder_bias) Eᵀ; f is given times the decoder's norms
JumpReluAutoEncoder          likewise times the norms
AutoEncoderTopK              relu, then the k largest of a token
(Matryoshka)BatchTopK        relu, then those above one threshold; −1 where training ended before there was one
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mechscope.errors import ModelError
from mechscope.features.dictionary import Dictionary
from mechscope.features.formats.parts import Given, between, chosen, pickled, taken
from mechscope.features.rules import Rule
from mechscope.store.files import read_json

_TOPK = ("AutoEncoderTopK",)
_BATCH = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")
_KNOWN = ("AutoEncoder", "GatedAutoEncoder", "JumpReluAutoEncoder", *_TOPK, *_BATCH)


def read_dictionary_learning(folder: str | Path, *, place: Given = None) -> Dictionary:
    """Read a dictionary of dictionary_learning.

    Args:
        folder: The folder.
        place: What it reads and writes, where its name in the folder is none of ours.

    Raises:
        SettingsError: Its name stands for no place.
        ModelError: The class is not supported, it has no threshold, or the file holds more than tensors.
        RunError: A file is missing or damaged.
    """
    folder = Path(folder)
    config: dict[str, Any] = read_json(folder / "config.json")["trainer"]
    kind = str(config.get("dict_class", ""))
    if kind not in _KNOWN:
        raise ModelError(f"{folder}: class {kind!r} of dictionary_learning is not supported: {', '.join(_KNOWN)} are")
    state = pickled(folder / "ae.pt")
    where = chosen(place, config.get("submodule_name"))
    about = {"format": "dictionary_learning", "source": folder.name, "config": config}

    def get(name: str) -> Tensor:
        return taken(state, name, folder)

    if kind == "GatedAutoEncoder":
        own = {"magnitude_log": get("r_mag"), "magnitude_bias": get("mag_bias")}
        made = between(
            where,
            where,
            Rule("gated"),
            encoder=get("encoder.weight"),
            decoder=get("decoder.weight").T,
            encoder_bias=get("gate_bias"),
            decoder_bias=get("decoder_bias"),
            subtracted=get("decoder_bias"),
            about=about,
            **own,
        )
        return made.normed()
    if kind == "JumpReluAutoEncoder":
        subtracts = (
            bool(state["apply_b_dec_to_input"]) if "apply_b_dec_to_input" in state else bool(config.get("apply_b_dec_to_input", False))
        )
        made = between(
            where,
            where,
            Rule("jumprelu"),
            encoder=get("W_enc").T,
            decoder=get("W_dec"),
            encoder_bias=get("b_enc"),
            decoder_bias=get("b_dec"),
            subtracted=get("b_dec") if subtracts else None,
            about=about,
            threshold=get("threshold").clamp(min=0),
        )
        return made.normed()
    wide = "W_enc" in state  # Matryoshka keeps its maps the other way round
    bias = get("bias") if kind == "AutoEncoder" else get("b_dec")
    threshold: dict[str, Tensor] = {}
    rule = Rule("relu")
    if kind in _TOPK:
        rule = Rule("topk", int(get("k")))
    elif kind in _BATCH:
        threshold = {"threshold": get("threshold").reshape(())}
        if threshold["threshold"] < 0:
            raise ModelError(
                f"{folder}: its threshold was never set ({float(threshold['threshold']):g}): it was not trained long enough to be used"
            )
        rule = Rule("batchtopk", int(get("k")))
    return between(
        where,
        where,
        rule,
        encoder=get("W_enc").T if wide else get("encoder.weight"),
        decoder=get("W_dec") if wide else get("decoder.weight").T,
        encoder_bias=get("b_enc") if wide else get("encoder.bias"),
        decoder_bias=bias,
        subtracted=bias,
        about=about,
        **threshold,
    )
