"""Weights that are stored in a few bits: read as plain numbers where transformers can turn them into these, refused by name where not.

What mechscope reads, compares, exchanges and trains are weights as matrices of numbers. A layer of bitsandbytes, GPTQ or AWQ holds packed bits and a
program that multiplies by them, so every reading of a weight would be of something else.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from mechscope.errors import ModelError

# formats that transformers itself turns into plain weights when it reads them, on every machine
_UNPACKED = ("fp8", "mxfp4")
# whose parameters and tensors hold packed bits, whatever type they say they have
_PACKERS = ("bitsandbytes", "torchao", "optimum", "hqq", "compressed_tensors", "gptqmodel", "auto_gptq", "awq", "aqlm", "eetq", "quark")
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def quantization(config: Any) -> str | None:
    """Return how a configuration says that weights are quantized, or None."""
    named = _named(config)
    if named is None:
        return None
    bits = (
        "8 bits"
        if named.get("load_in_8bit")
        else "4 bits"
        if named.get("load_in_4bit")
        else f"{named['bits']} bits"
        if named.get("bits")
        else ""
    )
    return f"{named.get('quant_method', 'a method that it does not name')}{f' ({bits})' if bits else ''}"


def unpack(config: Any) -> None:
    """Ask for plain weights in a configuration whose format has them on demand: on a machine with a GPU they would stay packed."""
    named = _named(config)
    if named is not None and named.get("quant_method") in _UNPACKED:
        config.quantization_config = {**named, "dequantize": True}


def refusal(source: str, method: str, reason: str) -> ModelError:
    """Return the error about weights that cannot be read as numbers."""
    return ModelError(
        f"model {source!r} has weights quantized by {method}, and mechscope reads and changes weights as plain numbers ({reason}): name the model that it was "
        "quantized from, or where its library is installed load it in transformers, call dequantize() and save_pretrained, and name that folder"
    )


def require_plain(source: str, model: nn.Module) -> None:
    """Refuse a model whose weights are packed.

    Raises:
        ModelError: One is; the message names it, its type and its library where that is known.
    """
    buffers = ((name, value) for name, value in model.named_buffers() if name.endswith("weight"))
    for name, value in chain(model.named_parameters(), buffers):
        library = next((kind for kind in (type(value), type(value.data)) if kind.__module__.split(".")[0] in _PACKERS), None)
        if library is not None or value.dtype not in _PLAIN:
            method = quantization(getattr(model, "config", None)) or (
                library.__module__.split(".")[0] if library else "a method that it does not name"
            )
            raise refusal(source, method, f"{name} is {library.__name__ if library else str(value.dtype).removeprefix('torch.')}")


def _named(config: Any) -> dict[str, Any] | None:
    named = getattr(config, "quantization_config", None)
    if named is None or isinstance(named, dict):
        return named
    return dict(named.to_dict())
