"""Reading models and tokenizers from files or the hub, and saying what is wrong with them.

safetensors only unless the caller says `unsafe` (then `weights_only` loading), never remote code. Weights that are missing or truncated are an
error that names the file, because a randomly initialised layer would look like a discovery.
"""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mechscope.errors import ModelError
from mechscope.store.paths import check_model_path
from mechscope.subject.quantized import quantization, refusal, unpack

log = logging.getLogger(__name__)
# what torch itself can do; None lets transformers choose among them
_ATTENTION = (None, "eager", "sdpa", "flex_attention")


def read_model(
    source: str, *, dtype: torch.dtype | str, device_map: Any = None, max_memory: dict[int | str, int] | None = None, unsafe: bool = False
) -> PreTrainedModel:
    """Read a whole model from a directory or the hub.

    Raises:
        ModelError: Nothing loadable is there; the message names what was found and what to do.
    """
    check_model_path(source)
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"directory {source!r} is an adapter, not a whole model: name the model that it was trained on")
    if not unsafe and any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        raise ModelError(f"model {source!r} has only pickled weights (.bin): save it as safetensors, or pass unsafe=True to read them")
    method = None
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        method = quantization(config)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"model {source!r} ({config.model_type}) is an encoder-decoder model: mechscope studies decoder-only models (GPT-2, Llama, GPT-NeoX, …)"
            )
        unpack(config)
        if config._attn_implementation not in _ATTENTION:
            # a kernel that may not be installed, and that knows no float32: while anything is measured, attention is mechscope's own anyway
            log.info("model %s names the attention of %s, and is read with that of torch", source, config._attn_implementation)
            config._attn_implementation = None
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            device_map=device_map,
            max_memory=max_memory,
            use_safetensors=None if unsafe else True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ModelError(f"model {source!r}: {unreadable(folder)} truncated or corrupt ({error}): download or save it again") from error
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"model {source!r}: its pickled file is damaged or holds more than weights: it is not read, safetensors are"
        ) from error
    except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        if method is not None:
            raise refusal(source, method, first_lines(error)) from error
        raise ModelError(f"model {source!r} cannot be loaded: {first_lines(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model {source!r} lacks {len(missing)} weights ({', '.join(missing[:3])}, …): they would be random; the checkpoint is incomplete"
        )
    if wrong := report.get("mismatched_keys"):
        raise ModelError(f"model {source!r} has weights whose shape contradicts its config.json: {sorted(wrong)[:3]}")
    return model


def read_tokenizer(tokenizer: Any, sources: list[str]) -> Any:
    """Load the tokenizer given by name, or the first one found beside the adapter or its base; None where the name is `none`."""
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        return tokenizer
    if str(tokenizer) == "none":
        return None
    candidates = [str(tokenizer)] if tokenizer is not None else sources
    error: Exception | None = None
    for candidate in candidates:
        if (
            tokenizer is None
            and Path(candidate).is_dir()
            and not any(Path(candidate).glob("*token*"))
            and not (Path(candidate) / "vocab.json").is_file()
        ):
            continue
        try:
            return AutoTokenizer.from_pretrained(candidate, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as caught:
            error = caught
    if error is None:
        raise ModelError(f"model {sources[0]!r} has no tokenizer beside it: name one with tokenizer=…, or 'none' for what needs no text")
    raise ModelError(f"no tokenizer can be loaded from {candidates[-1]!r}: {first_lines(error)}") from error


def unreadable(folder: Path) -> str:
    """Return which safetensors files of a folder cannot be read, with their verb."""
    names = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError):
            names.append(file.name)
    return f"{', '.join(names)} {'are' if len(names) > 1 else 'is'}" if names else "a safetensors file is"


def first_lines(error: Exception) -> str:
    """Shorten a library's message to what a person reads first."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "…"
