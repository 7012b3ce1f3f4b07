"""The model under study, and loading it: from a hub id, a local directory, a PEFT adapter, or a module in memory.

A `Subject` is a model with its tokenizer and anatomy. An adapter gives two of them over the same weights: with the adapter, and without. Weights
that are not finite are an error that names the parameter; what can be wrong with files is in `checkpoint`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechscope.errors import ModelError
from mechscope.store.hashing import hash_state
from mechscope.subject.anatomy import Anatomy, discover
from mechscope.subject.checkpoint import read_adapter, read_adapter_config, read_model, read_tokenizer
from mechscope.subject.spelling import Spelling

log = logging.getLogger(__name__)

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """A model under study.

    Attributes:
        model: The Hugging Face model, or the PEFT model around it.
        tokenizer: Its tokenizer; None where a bare module was given without one.
        anatomy: What is where in it.
        source: Where it came from, as the caller wrote it.
        adapted: Whether a PEFT adapter is active; False on the view that `without_adapter` returns.
    """

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    source: str
    adapted: bool = False

    @property
    def plain(self) -> PreTrainedModel:
        """The Hugging Face model itself, inside a PEFT wrapper if there is one."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def family(self) -> str:
        """The Hugging Face model type, for example `gpt2`."""
        return str(self.plain.config.get_text_config().model_type)

    @property
    def device(self) -> torch.device:
        """Where the embeddings live, so where token ids go."""
        return next(self.anatomy.embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the weights."""
        return next(self.plain.parameters()).dtype

    @property
    def is_adapter(self) -> bool:
        """Whether the model carries a PEFT adapter, active or not."""
        return isinstance(self.model, PeftModel)

    def without_adapter(self) -> Subject:
        """Return a view of the same weights with the adapter disabled: no memory, no second model.

        Raises:
            ModelError: The model carries no adapter.
        """
        if not self.is_adapter:
            raise ModelError(f"model {self.source!r} carries no adapter to disable")
        return replace(self, adapted=False, source=f"{self.source} (adapter disabled)")

    @cached_property
    def _tuner_layers(self) -> tuple[Any, ...]:
        return tuple(module for module in self.plain.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Hold the adapter in this subject's state (on or off) for the duration; a no-op for a plain model."""
        changed = [layer for layer in self._tuner_layers if _enabled(layer) is not self.adapted] if self.is_adapter else []
        for layer in changed:
            layer.enable_adapters(self.adapted)
        try:
            yield
        finally:
            for layer in changed:
                layer.enable_adapters(not self.adapted)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter by its name in the plain model, with the active adapter's change added in."""
        seen: set[int] = set()
        for name, module in self.plain.named_modules():
            if isinstance(module, BaseTunerLayer):
                yield from self._adapted_weights(name, module)
                seen.update(id(parameter) for parameter in module.parameters())
            elif isinstance(module, ModulesToSaveWrapper):
                inner = module.modules_to_save[module.active_adapters[0]] if self.adapted else module.original_module
                yield from ((f"{name}.{key}", parameter.detach()) for key, parameter in inner.named_parameters())
                seen.update(id(parameter) for parameter in module.parameters())
            else:
                for key, parameter in module.named_parameters(recurse=False):
                    if id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield (f"{name}.{key}" if name else key), parameter.detach()

    def _adapted_weights(self, name: str, layer: Any) -> Iterator[tuple[str, Tensor]]:
        for key, parameter in layer.get_base_layer().named_parameters():
            value = parameter.detach()
            if key == "weight" and self.adapted:
                # DoRA and LoRA with a bias of its own change more than get_delta_weight tells
                more = {*getattr(layer, "lora_variant", {}), *(name for name, on in getattr(layer, "lora_bias", {}).items() if on)}
                if not hasattr(layer, "get_delta_weight") or more.intersection(layer.active_adapters):
                    raise ModelError(
                        f"adapter layer {name} ({type(layer).__name__}) changes its map by more than a sum W + ΔW (DoRA, a bias): "
                        "merge the adapter into its model before comparing weights"
                    )
                for adapter in layer.active_adapters:
                    value = value + layer.get_delta_weight(adapter).detach().to(value.dtype)
            yield f"{name}.{key}", value

    @cached_property
    def fingerprint(self) -> str:
        """The hash of all weights as they act (adapter included if active): what a result's manifest records."""
        return hash_state(dict(self.weights()))

    @cached_property
    def spelling(self) -> Spelling:
        """How its tokens are written as text."""
        return Spelling(self.tokenizer)

    def __repr__(self) -> str:
        size = self.anatomy
        return f"Subject({self.source!r}, {self.family}, {size.n_layers} layers × {size.n_heads} heads, width {size.d_model}, {self.dtype})"


def _enabled(layer: Any) -> bool:
    return not layer.disable_adapters


def load(
    source: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "auto",
    device_map: Any = None,
    base: str | Path | None = None,
    unsafe: bool = False,
) -> Subject:
    """Load a causal language model to study.

    Args:
        source: Hub id, local directory, PEFT adapter (directory or hub id), or a model in memory.
        tokenizer: Tokenizer or its source; by default the one saved with the model.
        dtype: `float32` (default), `bfloat16`, `float16`, `float64`, or `auto` for the stored one.
        device: `auto` (CUDA where there is one), or a torch device.
        device_map: Passed to transformers to spread a large model over devices; then `device` is not used.
        base: For an adapter, the base model to put it on instead of the one its configuration names.
        unsafe: Also accept pickled checkpoints (`.bin`), read with `weights_only`.

    Raises:
        ModelError: Nothing loadable is there, the architecture is not supported, or weights are missing, truncated or not finite.
    """
    if isinstance(source, nn.Module):
        return _wrap(source, tokenizer, str(getattr(source, "name_or_path", "")) or type(source).__name__)
    options = {"dtype": _dtype(dtype), "device_map": device_map, "unsafe": unsafe}
    adapter, beneath = read_adapter_config(str(source)), ""
    if adapter is None:
        model = read_model(str(source), **options)
    else:
        recorded = adapter.get("base_model_name_or_path")
        beneath = str(base or recorded or "")
        if base is not None and recorded not in (None, beneath):
            log.info("adapter %s was trained on %s and is put on %s as asked", source, recorded, base)
        model = read_adapter(str(source), beneath, **options)
    if device_map is None:
        model = model.to(_device(device))
    return _wrap(model, read_tokenizer(tokenizer, [str(source), *([beneath] if beneath else [])]), str(source))


def is_adapter(source: str | Path) -> bool:
    """Tell whether a source is a PEFT adapter rather than a whole model."""
    return read_adapter_config(str(source)) is not None


def _wrap(model: Any, tokenizer: Any, source: str) -> Subject:
    adapted = isinstance(model, PeftModel)
    plain = model.get_base_model() if adapted else model
    if not isinstance(plain, PreTrainedModel):
        raise ModelError(
            f"{type(plain).__name__} is not a Hugging Face PreTrainedModel: mechscope reads its configuration to find its parts"
        )
    if not adapted and any(isinstance(module, BaseTunerLayer) for module in plain.modules()):
        raise ModelError(
            f"model {source!r} holds PEFT layers inside a plain model (as get_base_model() returns it), so it acts with its adapter: "
            "give the PeftModel itself and take subject.without_adapter() as the base"
        )
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in plain.modules()):
        raise ModelError(
            f"model {source!r} has its adapter merged into the base weights: call unmerge_adapter() first, or save the merged model"
        )
    model.eval()
    _require_finite(plain, source)
    return Subject(model, tokenizer, discover(plain), source, adapted)


def _dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known: use one of {', '.join(DTYPES)} or auto")
    return DTYPES[dtype]


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is not known: use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {str(device)!r} was asked for, but this machine has no usable CUDA device: use device='cpu' or 'auto'")
    return chosen


def _require_finite(model: nn.Module, source: str) -> None:
    for name, parameter in model.named_parameters():
        # a finite sum of squares would overflow in float16, so look at the values themselves
        if parameter.device.type != "meta" and not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise ModelError(
                f"model {source!r}: parameter {name} holds {bad} values that are NaN or infinite: the checkpoint is damaged or training diverged"
            )
