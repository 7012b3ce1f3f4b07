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
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechscope import ranks
from mechscope.errors import ModelError
from mechscope.store.hashing import hash_state
from mechscope.store.paths import check_model_path, located
from mechscope.subject.adapter import displaced, read_adapter, read_adapter_config, require_studied
from mechscope.subject.anatomy import Anatomy
from mechscope.subject.checkpoint import read_model, read_tokenizer
from mechscope.subject.discovery import discover
from mechscope.subject.linear import WRAPPERS, base_layer, linear_now, parameters_now
from mechscope.subject.modes import evaluating
from mechscope.subject.placement import fetched, place_of, require_in_memory, warn_if_emulated
from mechscope.subject.quantized import require_plain
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
        adds: Whether what attention and MLPs write adds up to the residual stream, as the check at load found.
        heads_write: Whether heads write their z times their slice of W_O, with nothing (a gate, a norm) in between, as the check at load found.
        displaced: Weights of the base that putting the adapter on has changed: with it off, the model is not its base.
    """

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    source: str
    adapted: bool = False
    displaced: tuple[str, ...] = ()
    adds: bool = True
    heads_write: bool = True

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
        return place_of(self.anatomy.embedding)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the weights."""
        return next(self.plain.parameters()).dtype

    @property
    def is_adapter(self) -> bool:
        """Whether the model carries a PEFT adapter, active or not."""
        return isinstance(self.model, PeftModel)

    @property
    def tied(self) -> bool:
        """Whether the unembedding is the embedding's weight."""
        embedding, unembedding = (
            getattr(base_layer(module), "weight", None) for module in (self.anatomy.embedding, self.anatomy.unembedding)
        )
        return embedding is not None and embedding is unembedding

    def without_adapter(self) -> Subject:
        """Return a view of the same weights with the adapter disabled: no memory, no second model.

        Raises:
            ModelError: The model carries no adapter, or one that has changed the weights beneath it.
        """
        if not self.is_adapter:
            raise ModelError(f"model {self.source!r} carries no adapter to disable")
        if self.displaced:
            raise ModelError(
                f"model {self.source!r} with its adapter off is not its base: putting the adapter on changed {len(self.displaced)} of the base's weights "
                f"({self.displaced[0]}, …; trained biases or embeddings, or a start from the base's singular vectors): load the base by itself"
            )
        return replace(self, adapted=False, source=f"{self.source} (adapter disabled)")

    @cached_property
    def _modules(self) -> dict[int | None, tuple[nn.Module, ...]]:
        """The modules of the model (None) and of each block."""
        parts: dict[int | None, Any] = {None: self.model, **{layer: block.module for layer, block in enumerate(self.anatomy.blocks)}}
        return {part: tuple(module.modules()) for part, module in parts.items()}

    @cached_property
    def _tuner_layers(self) -> dict[int | None, tuple[Any, ...]]:
        return {part: tuple(module for module in modules if isinstance(module, WRAPPERS)) for part, modules in self._modules.items()}

    @contextlib.contextmanager
    def active(self, layer: int | None = None) -> Iterator[None]:
        """Hold the model in evaluation mode and its adapter in this subject's state (on or off) for the duration; both are put back.

        Args:
            layer: The one block that runs meanwhile, the others are left alone: going over all modules for each block costs time. None: all of the model.
        """
        changed = [wrapper for wrapper in self._tuner_layers[layer] if wrapper.disable_adapters is self.adapted] if self.is_adapter else []
        for wrapper in changed:
            wrapper._disable_adapters = not self.adapted  # PEFT's enable_adapters would also set requires_grad
        try:
            with evaluating(self._modules[layer]):
                yield
        finally:
            for wrapper in changed:
                wrapper._disable_adapters = self.adapted

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter by its name in the plain model, with the active adapter's change added in; offloaded ones are fetched module by module."""
        # the parameters themselves, not their ids: fetched ones are replaced, and an id may be given out again
        seen: set[Tensor] = set()
        shared = getattr(self.anatomy.unembedding, "weight", None)
        if shared is not None and shared.is_meta and self.plain.config.get_text_config().tie_word_embeddings:
            seen.add(shared)  # offloaded, it is an empty tensor of its own, yet the embedding's
        inside = ""  # the adapter layer whose parts come next
        for name, module in self.plain.named_modules():
            if inside and name.startswith(inside):
                continue
            if isinstance(module, WRAPPERS):
                inside = f"{name}."
                known = seen.issuperset(module.parameters())  # tied to one that came before
                seen.update(module.parameters())
                if not known:
                    with fetched(module):
                        yield from ((f"{name}.{key}", value) for key, value in parameters_now(module, adapted=self.adapted).items())
                continue
            new = [key for key, parameter in module.named_parameters(recurse=False) if parameter not in seen]
            seen.update(module.parameters(recurse=False))
            with fetched(module, recurse=False):
                yield from ((f"{name}.{key}" if name else key, getattr(module, key).detach()) for key in new)

    def linear(self, module: nn.Module) -> tuple[Float[Tensor, "output input"], Float[Tensor, " output"] | None]:
        """Return a linear map's weight as (output features, input features) and its bias, as they act now (an active adapter's change included)."""
        return linear_now(module, adapted=self.adapted)

    def require_in_memory(self, purpose: str) -> None:
        """Refuse a model with offloaded weights, for what reads them itself; raises ModelError that names the purpose."""
        require_in_memory(self.source, self.plain, purpose)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of all weights as they act (adapter included if active): what a result's manifest records."""
        return hash_state(self.weights())

    @cached_property
    def spelling(self) -> Spelling:
        """How its tokens are written as text."""
        return Spelling(self.tokenizer)

    def __repr__(self) -> str:
        size = self.anatomy
        return f"Subject({self.source!r}, {self.family}, {size.n_layers} layers × {size.n_heads} heads, width {size.d_model}, {self.dtype})"


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
        device: `auto` (CUDA where there is one; of several ranks each has its own), `spread` (over the machine's devices, for a model too large for
            one; of several ranks each has its share of them), or a torch device.
        device_map: Passed to transformers to place parts by hand; then `device` is not used.
        base: For an adapter, the base model to put it on instead of the one its configuration names.
        unsafe: Also accept pickled checkpoints (`.bin`), read with `weights_only`.

    Raises:
        ModelError: Nothing loadable is there, the architecture is not supported, or weights are missing, truncated or not finite.
    """
    if isinstance(source, nn.Module):
        tokenizer = None if tokenizer is None else read_tokenizer(tokenizer, [])
        return _wrap(source, tokenizer, str(getattr(source, "name_or_path", "")) or type(source).__name__)
    source = located(source)
    check_model_path(source)
    options = {"dtype": _dtype(dtype), "device_map": device_map, "unsafe": unsafe}
    if device == "spread" and device_map is None:
        options |= {"device_map": "auto", "max_memory": _memory_of_rank()}
    adapter, beneath = read_adapter_config(source), ""
    changed: tuple[str, ...] = ()
    if adapter is None:
        model = read_model(source, **options)
    else:
        recorded = adapter.get("base_model_name_or_path")
        beneath = str(base or recorded or "")
        if base is not None and recorded not in (None, beneath):
            log.info("adapter %s was trained on %s and is put on %s as asked", source, recorded, base)
        model, changed = read_adapter(source, beneath, adapter, **options)
    if options["device_map"] is None:
        model = model.to(_device(device))
    return _wrap(model, read_tokenizer(tokenizer, [source, *([beneath] if beneath else [])]), source, changed)


def is_adapter(source: str | Path) -> bool:
    """Tell whether a source is a PEFT adapter rather than a whole model."""
    return read_adapter_config(located(source)) is not None


def _wrap(model: Any, tokenizer: Any, source: str, changed: tuple[str, ...] | None = None) -> Subject:
    adapted = isinstance(model, PeftModel)
    for config in model.peft_config.values() if adapted else ():
        require_studied(source, vars(config))
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
    require_plain(source, plain)
    _require_finite(plain, source)
    warn_if_emulated(plain)
    if changed is None:  # in memory: what it was before is not known
        changed = displaced(model) if adapted else ()
    anatomy = discover(plain)
    _require_known_tokens(tokenizer, anatomy, source)
    return Subject(model, tokenizer, anatomy, source, adapted, changed)


def _dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known: use one of {', '.join(DTYPES)} or auto")
    return DTYPES[dtype]


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda", ranks.local_rank() % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is not known: use auto, cpu, cuda, cuda:N or spread") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {str(device)!r} was asked for, but this machine has no usable CUDA device: use device='cpu' or 'auto'")
    return chosen


def _memory_of_rank() -> dict[int | str, int] | None:
    """Return the free bytes of the devices that are this rank's, or None for all of them."""
    if ranks.local_size() == 1 or not torch.cuda.is_available():
        return None
    own = devices_of(ranks.local_rank(), ranks.local_size(), torch.cuda.device_count())
    return {device: torch.cuda.mem_get_info(device)[0] for device in own}


def devices_of(rank: int, n_ranks: int, n_devices: int) -> range:
    """Return the devices of one of a machine's ranks, each of which gets as many.

    Raises:
        ModelError: There are fewer devices than ranks.
    """
    each = n_devices // n_ranks
    if not each:
        raise ModelError(f"{n_ranks} ranks cannot spread a model over {n_devices} devices: start at most {n_devices} of them")
    return range(rank * each, (rank + 1) * each)


def _require_known_tokens(tokenizer: Any, anatomy: Anatomy, source: str) -> None:
    """Refuse a tokenizer whose control tokens the embedding does not have: they stand in every text, or pad every batch."""
    for name in ("pad", "bos", "eos"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is not None and token >= anatomy.vocab_size:
            text = getattr(tokenizer, f"{name}_token")
            raise ModelError(
                f"model {source!r}: the tokenizer's {name} token {text!r} has id {token:,}, the embedding has {anatomy.vocab_size:,} tokens: call "
                "resize_token_embeddings(len(tokenizer)) and save, or choose a token that the model has (tokenizer.pad_token = tokenizer.eos_token)"
            )


def _require_finite(model: nn.Module, source: str) -> None:
    for name, parameter in model.named_parameters():
        # a finite sum of squares would overflow in float16, so look at the values themselves
        if parameter.device.type != "meta" and not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise ModelError(
                f"model {source!r}: parameter {name} holds {bad} values that are NaN or infinite: the checkpoint is damaged or training diverged"
            )
