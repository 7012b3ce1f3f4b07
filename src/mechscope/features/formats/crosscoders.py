"""Crosscoders of others: dictionary_learning's fork (science-of-finetuning), and the first open replication (ckkissane).

fork        f = relu(Σ_l x_l W_enc,l + b),  x̂_l = f W_dec,l + b_l        W_enc (place, d, latent), W_dec (place, latent, d); keys may begin with `_orig_mod.`
            BatchTopK keeps f where f · norm is above one threshold; `code_normalization_id` says which norm: 1 Σ_l ‖D_l‖, 2 that of all places together, 4 none
            x is centred and scaled first where `activation_mean` and `activation_std` are no NaN: by one number per place (`activation_global_scale`), or by
            the standard deviation of every feature
ckkissane   the same with relu, W_dec (latent, place, d); the scale of its inputs is not in the file

Neither says what it reads. A threshold that is compared with another norm than the sum over places is kept as one threshold per latent, which says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechscope.errors import ModelError, RunError, SettingsError
from mechscope.features.affine import Affine
from mechscope.features.dictionary import Dictionary
from mechscope.features.formats.parts import pickled, safetensors, taken
from mechscope.features.layout import Layout, crosscoder
from mechscope.features.places import Place, places
from mechscope.features.rules import Rule
from mechscope.store.files import read_json

_FILES = ("model.safetensors", "ae.pt", "model_final.pt")
_SUMMED = 1
_NAMES = {3: "mixed", 5: "decoupled"}
# what the fork adds to a standard deviation
_LEAST = 1e-8


def read_crosscoder(path: str | Path, place: str | Sequence[Place | str]) -> Dictionary:
    """Read a crosscoder.

    Args:
        path: Its file (`.safetensors`, or a pickled state that holds tensors alone), or the folder of `model.safetensors`, `ae.pt` or `model_final.pt`.
        place: What it reads and writes, in its order: `"base:resid6,tuned:resid6"`.

    Raises:
        SettingsError: It reads another number of places.
        ModelError: It holds more than tensors, has no threshold, or chooses latents as no rule of mechscope does.
        RunError: The file is missing or damaged.
    """
    file = _file(Path(path))
    state = safetensors(file) if file.suffix == ".safetensors" else pickled(file)
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    return _replication(state, places(place), file) if "W_enc" in state else _fork(state, places(place), file)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in _FILES if (path / name).is_file()]
    if not found:
        raise RunError(f"{path} holds none of {', '.join(_FILES)}: name the crosscoder's file")
    return found[0]


def _replication(state: dict[str, Tensor], where: tuple[Place, ...], file: Path) -> Dictionary:
    encoder, decoder = taken(state, "W_enc", file), taken(state, "W_dec", file).transpose(0, 1)
    layout, tensors = _plain(encoder, decoder, taken(state, "b_enc", file), taken(state, "b_dec", file), where, Rule("relu"), file)
    return Dictionary.plain(layout, tensors, about={"format": "crosscoder of ckkissane", "source": file.name})


def _fork(state: dict[str, Tensor], where: tuple[Place, ...], file: Path) -> Dictionary:
    if "decoder.weight" not in state and any(name.startswith("decoder.layers.") for name in state):
        raise ModelError(f"{file} keeps its decoder in embedding bags, one for each place: save it with decoder_type='linear'")
    encoder, decoder = taken(state, "encoder.weight", file), taken(state, "decoder.weight", file)
    rule, threshold = Rule("relu"), None
    if "k" in state:
        rule = Rule("batchtopk", int(state["k"]), by_norm=True)
        threshold = taken(state, "threshold", file).reshape(-1)
        if len(threshold) > 1 or threshold < 0:
            kind = (
                "one threshold for each place"
                if len(threshold) > 1
                else "a threshold that was never set: it was not trained long enough to be used"
            )
            raise ModelError(f"{file} has {kind}")
    norms = _norms(decoder, int(state.get("code_normalization_id", torch.tensor(_SUMMED))), file) if threshold is not None else None
    maps = [Affine.identity(encoder.shape[1]) for _ in where]
    bias, out = taken(state, "encoder.bias", file), taken(state, "decoder.bias", file)
    mean, deviation = (state.get(f"activation_{name}", torch.tensor(torch.nan)).float() for name in ("mean", "std"))
    if not bool(mean.isnan().any() or deviation.isnan().any()):
        scale = state.get("activation_global_scale", torch.ones(())).float()
        if _by_feature(scale, file):
            # into the weights, as a map has one scale for each place
            spread = deviation + _LEAST
            encoder, decoder, out = encoder / spread[..., None], decoder * spread[:, None], out * spread
            maps = [Affine(1.0, centre) for centre in mean]
        else:
            maps = [Affine(float(one), centre) for one, centre in zip(scale, mean, strict=True)]
    summed = norms is not None and bool(torch.allclose(norms, decoder.norm(dim=2).sum(0), rtol=1e-6))
    if threshold is not None and norms is not None and not summed:
        rule, threshold = Rule("jumprelu"), threshold / norms
    layout, tensors = _plain(encoder, decoder, bias, out, where, rule, file)
    if threshold is not None:
        tensors["threshold"] = threshold.reshape(()) if rule.name == "batchtopk" else threshold
    about = {"format": "crosscoder of dictionary_learning's fork", "source": file.name}
    return Dictionary(layout, tensors, tuple(maps), tuple(maps), about=about)


def _by_feature(scale: Tensor, file: Path) -> bool:
    """Tell whether inputs are divided by the standard deviation of every feature: the file says so only beside it, or by scales that are all one."""
    config: Any = read_json(file.parent / "config.json") if (file.parent / "config.json").is_file() else {}
    told = {**config, **config.get("trainer", {})}.get("keep_relative_variance") if isinstance(config, dict) else None
    return bool((scale == 1).all()) if told is None else not told


def _norms(decoder: Tensor, normalisation: int, file: Path) -> Tensor:
    match normalisation:
        case 1:
            return decoder.norm(dim=2).sum(0)
        case 2:
            return decoder.transpose(0, 1).flatten(1).norm(dim=1)
        case 4:
            return torch.ones(decoder.shape[1])
    raise ModelError(
        f"{file} compares latents by the norm {_NAMES.get(normalisation, normalisation)!r}, which its file does not determine: "
        "crosscoder, sae and none can be read"
    )


def _plain(
    encoder: Tensor, decoder: Tensor, bias: Tensor, out: Tensor, where: tuple[Place, ...], rule: Rule, file: Path
) -> tuple[Layout, dict[str, Tensor]]:
    """Return layout and tensors of maps given as ``(place, d, latent)`` and ``(place, latent, d)``."""
    count, width, latents = encoder.shape
    if len(where) != count or decoder.shape != (count, latents, width):
        raise SettingsError(
            f"{file} reads {count} places and writes {len(decoder)}, named are {len(where)} ({', '.join(map(str, where))}): "
            "name as many, in its order, such as base:resid6,tuned:resid6"
        )
    layout = crosscoder(where, [width] * count, latents, rule)
    tensors = {
        "encoder.0": encoder.permute(2, 0, 1).flatten(1).contiguous(),
        "decoder.0": decoder.transpose(0, 1).flatten(1).contiguous(),
        "encoder_bias": bias,
        "decoder_bias": out.flatten(),
    }
    return layout, tensors
