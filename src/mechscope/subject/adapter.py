"""PEFT adapters: which kinds are studied, putting one on its base, and whether the base under it is still the base.

Switching an adapter off gives the weights that lie beneath it. Those are the base's own only if attaching the adapter left them alone: adapters with
trained biases, those saved with embeddings, and those that begin from the base's singular vectors (PiSSA, OLoRA, …) have already changed them. So the
base's weights are compared bit by bit before and after; what changed is named, and the base is then loaded apart.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import find_adapter_config_file

from mechscope.errors import ModelError
from mechscope.store.hashing import hash_state
from mechscope.subject.checkpoint import first_lines, read_model, unreadable
from mechscope.subject.linear import WRAPPERS, base_layer

_FILE = "adapter_model.safetensors"
# they put learned tokens or keys before the text: positions and patterns are of tokens that no text has
_VIRTUAL = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT"}
# starts of LoRA that take a part out of the base's weights
_TAKEN = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_adapter_config(source: str) -> dict[str, Any] | None:
    """Return an adapter's configuration, or None where the source is no adapter.

    Raises:
        ModelError: The configuration is damaged.
    """
    if Path(source).is_dir() and not (Path(source) / "adapter_config.json").is_file():
        return None
    try:
        file = find_adapter_config_file(source)
    except (OSError, ValueError):
        return None  # not there at all: the model loader says so in its own words
    if file is None:
        return None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"adapter {source!r}: {file} cannot be read ({first_lines(error)}): download or save it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"adapter {source!r}: {file} holds a {type(config).__name__}, not settings by name: download or save it again")
    return config


def read_adapter(source: str, base: str, config: Mapping[str, Any], **options: Any) -> tuple[PeftModel, tuple[str, ...]]:
    """Read an adapter and put it on its base, read with the same options as `read_model` takes.

    Returns:
        The model, and the names of the base's weights that attaching the adapter has changed.

    Raises:
        ModelError: The adapter is of a kind that is not studied, cannot be read, is incomplete or does not fit the base.
    """
    require_studied(source, config)
    if not base:
        raise ModelError(f"adapter {source!r} does not name its base model: pass the base explicitly")
    folder = Path(source)
    if folder.is_dir() and not (folder / _FILE).is_file() and not options["unsafe"]:
        raise ModelError(f"adapter {source!r} has no {_FILE}: save it as safetensors, or pass unsafe=True to read a pickled one")
    try:
        model = read_model(base, **options)
    except ModelError as error:
        raise ModelError(f"the base of adapter {source!r}: {error}") from error
    _require_vocabulary(source, folder, base, model)
    before = _fingerprints(model)
    try:
        with warnings.catch_warnings():
            # peft only warns of matrices that the file lacks, and leaves them as if never trained
            warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
            adapted = PeftModel.from_pretrained(model, source)
    except UserWarning as warning:
        raise ModelError(
            f"adapter {source!r} is incomplete, its configuration asks for weights it lacks: {first_lines(warning)}"
        ) from warning
    except SafetensorError as error:
        raise ModelError(f"adapter {source!r}: {unreadable(folder)} truncated or corrupt ({error}): train or save it again") from error
    except (AttributeError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"adapter {source!r} does not fit base model {base!r}: {first_lines(error)}") from error
    after = _fingerprints(adapted.get_base_model())
    return adapted, tuple(name for name, found in before.items() if after.get(name) != found)


def require_studied(source: str, config: Mapping[str, Any]) -> None:
    """Refuse adapters that do more than change the weights of their base's modules.

    Raises:
        ModelError: They put virtual tokens before the text, or repeat layers; the message says so.
    """
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind in _VIRTUAL:
        raise ModelError(
            f"adapter {source!r} is of type {kind}: it puts learned tokens or keys before every text and changes no weight, so base and tuned do not read the "
            "same tokens: not supported; adapters that change weights (LoRA, DoRA, IA3, …) are"
        )
    if config.get("layer_replication"):
        raise ModelError(
            f"adapter {source!r} repeats layers of its base (layer_replication={config['layer_replication']}): base and tuned do not have the same "
            "layers; merge it and load the merged model alone"
        )


def displaced(model: PeftModel) -> tuple[str, ...]:
    """Return the weights of a base in memory that its adapters must have changed when they were put on it, as far as their configurations tell."""
    found = []
    for config in model.peft_config.values():
        bias, start = getattr(config, "bias", "none"), getattr(config, "init_lora_weights", True)
        if isinstance(config, LoraConfig) and isinstance(start, str) and start.startswith(_TAKEN):
            found += [f"{name}.weight" for name, module in _own_modules(model.get_base_model()) if isinstance(module, WRAPPERS)]
        if bias in ("all", "lora_only"):
            wanted = [
                (name, module) for name, module in _own_modules(model.get_base_model()) if bias == "all" or isinstance(module, WRAPPERS)
            ]
            found += [f"{name}.bias" for name, module in wanted if isinstance(getattr(base_layer(module), "bias", None), Tensor)]
    return tuple(dict.fromkeys(found))


def _own_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a plain model's modules by name, those within a wrapper left out."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, WRAPPERS))
    return [(name, module) for name, module in model.named_modules() if not name.startswith(inside)]


def _fingerprints(model: nn.Module) -> dict[str, str]:
    """Return the hash of each of the base's parameters, by its name without what PEFT puts around it."""
    found: dict[str, str] = {}
    for name, module in _own_modules(model):
        for key, parameter in base_layer(module).named_parameters(recurse=isinstance(module, WRAPPERS)):
            if not parameter.is_meta:
                found[f"{name}.{key}"] = hash_state({key: parameter})
    return found


def _require_vocabulary(source: str, folder: Path, base: str, model: Any) -> None:
    """Refuse an adapter whose file holds embeddings of another number of tokens than its base has."""
    if not (folder / _FILE).is_file():
        return
    try:
        with safe_open(folder / _FILE, framework="pt") as stored:
            names = stored.keys()
            shapes = {name: list(stored.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError):
        return  # said in its own words when it is read
    outer = {id(module): name for name, module in model.named_modules()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        name = outer.get(id(module), "")
        own = next((shape for key, shape in shapes.items() if f".{name}.weight" in key or f".{name}.modules_to_save" in key), None)
        if name and own is not None and len(own) == 2 and own[0] != len(module.weight):
            raise ModelError(
                f"adapter {source!r} was trained on {name} with {own[0]:,} tokens, its base {base!r} has {len(module.weight):,}: load the base, call "
                f"resize_token_embeddings({own[0]}), save it with the adapter's tokenizer, and name that folder as the base"
            )
