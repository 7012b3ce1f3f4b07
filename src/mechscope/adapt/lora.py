"""LoRA placed exactly where a selection says, by peft's ordinary layers.

Standard LoRA (Hu et al. 2021, arXiv 2106.09685) adds ΔW = (α/r) B A to a whole linear map. To let a single head learn, the rows of B outside
the head's output features (query, key, value) or the columns of A outside its input features (output projection) are set to zero and their
gradients are masked. Zero stays exactly zero under AdamW with weight decay, gradient clipping and mixed precision, because moments, decay
and update of an entry that is zero with a zero gradient are zero. What is saved is an ordinary PEFT adapter, which plain peft loads.

α/r is one number for all maps (`scaling`), so maps with different ranks learn at the same scale.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from mechscope.adapt.targets import Placement, Target, place
from mechscope.choices import LoraModules
from mechscope.errors import ModelError, SettingsError
from mechscope.subject.components import Components

_ADAPTER = "default"


def attach(
    subject: Any,
    where: Components | Placement,
    *,
    rank: int = 8,
    modules: LoraModules = "attention",
    scaling: float = 2.0,
    dropout: float = 0.0,
    seed: int = 0,
    share_weights: bool = False,
) -> PeftModel:
    """Put a fresh LoRA adapter on a copy of the subject's model.

    Args:
        subject: The base `Subject`; its model is not changed.
        where: What learns; a `Placement` brings its own ranks.
        rank: Rank of every map, for `Components`.
        modules: What a whole layer means, for `Components`: `"attention"`, `"mlp"` or `"all"`.
        scaling: α/r of every map; the paper states no α, 2 is the usual choice.
        dropout: LoRA dropout, a fraction.
        seed: Seed of the initial A (B starts at zero, so the adapted model starts as the base).
        share_weights: Let the copy read the base's own weights instead of duplicating them. Safe as long as nobody merges the adapter.

    Returns:
        The model with one adapter named `default`. Copies of it made by `copy.deepcopy` lose the gradient masks; attach again instead.

    Raises:
        SettingsError: A rank does not fit or the selection is empty.
        ModelError: The subject itself carries an adapter.
    """
    placed = where if isinstance(where, Placement) else place(subject, where, rank=rank, modules=modules)
    if scaling <= 0:
        raise SettingsError(f"LoRA scaling {scaling} must be positive")
    if not 0 <= dropout < 1:
        raise SettingsError(f"LoRA dropout {dropout} must be a fraction from 0 up to but not including 1")
    base = base_copy(subject, share_weights=share_weights)
    config = lora_config(placed, scaling=scaling, dropout=dropout)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a renamed attribute
        torch.manual_seed(seed)
        model = get_peft_model(base, config, adapter_name=_ADAPTER)
        for target in placed.targets:
            _confine(_layer(model, target), target)
    model.peft_config[_ADAPTER].base_model_name_or_path = _base_name(subject)
    return model


def lora_config(placed: Placement, *, scaling: float = 2.0, dropout: float = 0.0) -> LoraConfig:
    """Write a placement as peft's own configuration: full module names, the commonest rank as the default, the others by name."""
    common = Counter(placed.ranks).most_common(1)[0][0]
    # peft reads the pattern's keys as regular expressions
    others = {re.escape(target.name): rank for target, rank in zip(placed.targets, placed.ranks, strict=True) if rank != common}
    return LoraConfig(
        r=common,
        lora_alpha=_alpha(common, scaling),
        rank_pattern=others,
        alpha_pattern={name: _alpha(rank, scaling) for name, rank in others.items()},
        target_modules=[target.name for target in placed.targets],
        lora_dropout=dropout,
        bias="none",
        fan_in_fan_out=any(target.conv1d for target in placed.targets),
        task_type="CAUSAL_LM",
    )


def base_copy(subject: Any, *, share_weights: bool = False) -> Any:
    """Return a copy of the subject's plain model whose structure can be changed freely.

    With `share_weights` it has the original's storage (frozen parameters) instead of its own.

    Raises:
        ModelError: The subject carries an adapter, so its plain model is not plain.
    """
    if subject.is_adapter:
        raise ModelError(
            f"model {subject.source!r} is itself an adapter: merge it (model.merge_and_unload(), save_pretrained) before adapting it further"
        )
    memo: dict[int, Any] = {}
    if share_weights:
        for tensor in itertools.chain(subject.model.parameters(), subject.model.buffers()):
            memo[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor
    return copy.deepcopy(subject.model, memo)


def leak(model: PeftModel, placed: Placement) -> float:
    """Return the largest absolute entry of the adapter that should be zero: 0.0 exactly if the update stayed inside its slices."""
    worst = 0.0
    for target in placed.targets:
        layer = _layer(model, target)
        for weight, keep in _masks(layer, target):
            worst = max(worst, float(weight.detach().masked_fill(keep.to(weight.device), 0).abs().max()))
    return worst


def total_parameters(model: nn.Module) -> int:
    """Count a model's parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _base_name(subject: Any) -> str | None:
    """Say where the adapter's base can be loaded from: a hub id, a folder that is found from anywhere, or nothing for a model built in memory."""
    name = subject.plain.name_or_path
    if not name:
        return None
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _alpha(rank: int, scaling: float) -> float:
    alpha = rank * scaling
    return int(alpha) if float(alpha).is_integer() else alpha


def _layer(model: PeftModel, target: Target) -> Any:
    return model.get_base_model().get_submodule(target.name)


def _masks(layer: Any, target: Target) -> list[tuple[nn.Parameter, Tensor]]:
    """Pair each confined factor with the mask of what may move in it: A is (rank, in_features), B is (out_features, rank)."""
    pairs: list[tuple[nn.Parameter, Tensor]] = []
    if target.rows is not None:
        keep = torch.zeros(target.out_features, 1, dtype=torch.bool)
        keep[list(target.rows)] = True
        pairs.append((layer.lora_B[_ADAPTER].weight, keep))
    if target.columns is not None:
        keep = torch.zeros(1, target.in_features, dtype=torch.bool)
        keep[:, list(target.columns)] = True
        pairs.append((layer.lora_A[_ADAPTER].weight, keep))
    return pairs


def _confine(layer: Any, target: Target) -> None:
    """Zero what may not move and mask its gradient."""
    for weight, keep in _masks(layer, target):
        with torch.no_grad():
            if target.columns is not None and weight is layer.lora_A[_ADAPTER].weight:
                # a slice of width n is initialised as a map with n inputs would be, not as a piece of a wider one
                own = torch.empty(weight.shape[0], len(target.columns), dtype=weight.dtype, device=weight.device)
                nn.init.kaiming_uniform_(own, a=math.sqrt(5))
                weight.zero_()
                weight[:, list(target.columns)] = own
            weight.masked_fill_(~keep.to(weight.device), 0)
        weight.register_hook(_gradient_mask(~keep))


def _gradient_mask(drop: Tensor) -> Callable[[Tensor], Tensor]:
    # filling, not multiplying: an infinite gradient times zero would be NaN
    return lambda gradient: gradient.masked_fill(drop.to(gradient.device), 0)
