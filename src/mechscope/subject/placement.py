"""Where a model's weights lie and its modules compute.

A model may be spread over several devices, and accelerate may keep weights of it on the CPU or on a disk until their module runs (offloading): until
then their parameters are empty. Whatever only runs such a model works as it is, because accelerate's hooks stand around every module. What reads weights itself
must fetch them, or refuse.
"""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Int
from torch import Tensor, nn

from mechscope.errors import ModelError

log = logging.getLogger(__name__)
_expected: ContextVar[bool] = ContextVar("_expected", default=False)


def place_of(module: nn.Module) -> torch.device:
    """Return where a module computes: where its first parameter lies, or where accelerate puts it when the module runs."""
    first = next(module.parameters())
    if not first.is_meta:
        return first.device
    owner = next(part for part in module.modules() if any(own is first for own in part.parameters(recurse=False)))
    hook: Any = getattr(owner, "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    if place is None:
        return torch.device("cpu")
    # accelerate numbers CUDA devices; to `torch.device` a bare number is whatever accelerator there is, and an error where there is none
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; from the CPU without waiting for the work that is queued there, as a plain copy would."""
    if x.device.type != "cpu":
        # on the way to the CPU the host would read before the copy has arrived
        return x.to(device)
    if device.type == "cuda" and torch.cuda.is_available():
        # from memory that may be swapped out the driver copies only while the host waits; an expanded tensor cannot be pinned as it is
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=True)


def index_for(indices: Sequence[int], of: Tensor) -> Int[Tensor, " n"]:
    """Return an index beside what it is to be used on: a list would be copied there with a wait for the device."""
    return sent(torch.tensor(indices, dtype=torch.int64), of.device)


@contextlib.contextmanager
def fetched(module: nn.Module, *, recurse: bool = True) -> Iterator[None]:
    """Hold a module's offloaded weights in memory for the duration; a no-op for weights that are there."""
    with contextlib.ExitStack() as stack:
        for part in module.modules() if recurse else (module,):
            if any(own.is_meta for own in part.parameters(recurse=False)):
                stack.enter_context(align_module_device(part))
        yield


def require_in_memory(source: str, module: nn.Module, purpose: str) -> None:
    """Refuse a model whose weights are offloaded, for what reads those of a module itself.

    Raises:
        ModelError: Some are not in memory; the message names the model and the purpose.
    """
    away = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if away:
        raise ModelError(
            f"model {source!r}: {len(away)} weights ({away[0]}, …) are offloaded to the CPU's memory or a disk, and {purpose} reads them: load the "
            "model without offloading (more devices, or dtype='bfloat16'); recording, statistics, differences, patching and generation work as it is"
        )


@contextlib.contextmanager
def known_to_be_slow() -> Iterator[None]:
    """Say nothing of emulated bfloat16 inside: mechscope's own copies in it are read once, and their rounding is what is asked."""
    before = _expected.set(True)
    try:
        yield
    finally:
        _expected.reset(before)


def warn_if_emulated(model: nn.Module) -> None:
    """Say once that a processor has no bfloat16 arithmetic of its own, where a model is to run in it."""
    if _expected.get():
        return
    if any(parameter.dtype == torch.bfloat16 and parameter.device.type == "cpu" for parameter in model.parameters()):
        _warn_once()


@cache
def _warn_once() -> None:
    if platform.machine().lower() in ("x86_64", "amd64") and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        log.warning(
            "bfloat16 on this processor is emulated (it has neither AVX512-BF16 nor AMX): half the memory, but slower than float32, and numbers "
            "with three digits"
        )
