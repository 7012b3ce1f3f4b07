"""Reading models, adapters and tokenizers from files or the hub, and saying what is wrong with them.

safetensors only unless the caller says `unsafe` (then `weights_only` loading), never remote code. Weights that are missing or truncated are an
error that names the file, because a randomly initialised layer would look like a discovery.
"""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import find_adapter_config_file

from mechscope.errors import ModelError
from mechscope.store.paths import check_model_path


def read_adapter_config(source: str) -> dict[str, Any] | None:
    """Return an adapter's configuration, or None where the source is no adapter."""
    if Path(source).is_dir() and not (Path(source) / "adapter_config.json").is_file():
        return None
    try:
        file = find_adapter_config_file(source)
    except (OSError, ValueError):
        return None  # not there at all: the model loader says so in its own words
    if file is None:
        return None
    return dict(json.loads(Path(file).read_text(encoding="utf-8")))


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
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"model {source!r} ({config.model_type}) is an encoder-decoder model: mechscope studies decoder-only models (GPT-2, Llama, GPT-NeoX, …)"
            )
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
        raise ModelError(f"model {source!r}: {_unreadable(folder)} truncated or corrupt ({error}): download or save it again") from error
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"model {source!r}: its pickled file is damaged or holds more than weights: it is not read, safetensors are"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"model {source!r} cannot be loaded: {_first_lines(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model {source!r} lacks {len(missing)} weights ({', '.join(missing[:3])}, …): they would be random; the checkpoint is incomplete"
        )
    if wrong := report.get("mismatched_keys"):
        raise ModelError(f"model {source!r} has weights whose shape contradicts its config.json: {sorted(wrong)[:3]}")
    return model


def read_adapter(source: str, base: str, **options: Any) -> PeftModel:
    """Read an adapter and put it on its base, read with the same options as `read_model` takes.

    Raises:
        ModelError: The adapter cannot be read, is incomplete or does not fit the base.
    """
    if not base:
        raise ModelError(f"adapter {source!r} does not name its base model: pass the base explicitly")
    folder = Path(source)
    if folder.is_dir() and not (folder / "adapter_model.safetensors").is_file() and not options["unsafe"]:
        raise ModelError(
            f"adapter {source!r} has no adapter_model.safetensors: save it as safetensors, or pass unsafe=True to read a pickled one"
        )
    try:
        model = read_model(base, **options)
    except ModelError as error:
        raise ModelError(f"the base of adapter {source!r}: {error}") from error
    try:
        with warnings.catch_warnings():
            # peft only warns of matrices that the file lacks, and leaves them as if never trained
            warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
            return PeftModel.from_pretrained(model, source)
    except UserWarning as warning:
        raise ModelError(
            f"adapter {source!r} is incomplete, its configuration asks for weights it lacks: {_first_lines(warning)}"
        ) from warning
    except SafetensorError as error:
        raise ModelError(f"adapter {source!r}: {_unreadable(folder)} truncated or corrupt ({error}): train or save it again") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"adapter {source!r} does not fit base model {base!r}: {_first_lines(error)}") from error


def read_tokenizer(tokenizer: Any, sources: list[str]) -> Any:
    """Load the tokenizer given by name, or the first one found beside the adapter or its base."""
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        return tokenizer
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
        raise ModelError(f"model {sources[0]!r} has no tokenizer beside it: name one with tokenizer=…")
    raise ModelError(f"no tokenizer can be loaded from {candidates[-1]!r}: {_first_lines(error)}") from error


def _unreadable(folder: Path) -> str:
    """Return which safetensors files of a folder cannot be read, with their verb."""
    names = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError):
            names.append(file.name)
    return f"{', '.join(names)} {'are' if len(names) > 1 else 'is'}" if names else "a safetensors file is"


def _first_lines(error: Exception) -> str:
    """Shorten a library's message to what a person reads first."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "…"
