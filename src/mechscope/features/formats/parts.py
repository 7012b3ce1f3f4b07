"""What the readers of other libraries' dictionaries share."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechscope.errors import ModelError, RunError
from mechscope.features.dictionary import Dictionary
from mechscope.features.formats.hooks import place_of
from mechscope.features.layout import Group, Layout
from mechscope.features.places import Place, places
from mechscope.features.rules import Rule
from mechscope.store.files import atomic

Given = Place | str | None


def chosen(given: Given, name: str | None) -> Place:
    """Return the place a user gave, or that of another library's name; `SettingsError` where there is none."""
    if given is not None:
        (place,) = places(given)
        return place
    return place_of(name or "")


def safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; `RunError` where it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot read {path}: {error}. Is the folder complete?") from error


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors in float32, with no header of ours; `RunError` where that is refused."""
    plain = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic(path, size=sum(tensor.nbytes for tensor in plain.values())) as temporary:
        save_file(plain, temporary)


def pickled(path: Path) -> dict[str, Tensor]:
    """Read a pickled state dict that holds tensors and nothing else.

    Raises:
        RunError: The file is missing or damaged.
        ModelError: It holds anything but tensors, which could run code.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path} holds more than tensors, which could run code of its own when it is read: refused") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise RunError(f"cannot read {path}: {error}. Is the file complete?") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path} holds more than tensors: expected the state of a dictionary")
    return dict(state)


def taken(tensors: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    """Return one tensor in float32; `ModelError` where it is missing."""
    if name not in tensors:
        raise ModelError(f"{path} lacks {name!r}: it holds {', '.join(sorted(tensors))}")
    return tensors[name].float()


def between(
    inside: Place,
    outside: Place,
    rule: Rule,
    *,
    encoder: Tensor,
    decoder: Tensor,
    encoder_bias: Tensor,
    decoder_bias: Tensor,
    subtracted: Tensor | None = None,
    skip: Tensor | None = None,
    about: Mapping[str, Any],
    **own: Tensor,
) -> Dictionary:
    """Return a dictionary from one place to another.

    Args:
        inside: What it reads.
        outside: What it writes.
        rule: Its rule.
        encoder: ``(latent, read)``.
        decoder: ``(latent, written)``.
        encoder_bias: ``(latent)``.
        decoder_bias: ``(written)``.
        subtracted: ``(read)``: what is taken off the input first; it goes into the bias.
        skip: ``(written, read)``.
        about: Where it comes from.
        own: The rule's own tensors.
    """
    latents, width = encoder.shape
    layout = Layout((inside,), (outside,), (width,), (decoder.shape[1],), (Group(latents, (0, 1), (0, 1)),), rule, skip is not None)
    tensors = {
        "encoder.0": encoder.contiguous(),
        "decoder.0": decoder.contiguous(),
        "encoder_bias": encoder_bias,
        "decoder_bias": decoder_bias,
        **own,
    }
    if skip is not None:
        tensors["skip"] = skip
    if subtracted is not None:
        # exact in real numbers; in double precision so that nothing of the bias is lost to rounding
        shift = (encoder.double() @ subtracted.double()).float()
        tensors["encoder_bias"] = encoder_bias - shift
        if rule.name == "gated":
            tensors["magnitude_bias"] = own["magnitude_bias"] - own["magnitude_log"].exp() * shift
    return Dictionary.plain(layout, {name: tensors[name] for name in layout.shapes()}, about=about)
