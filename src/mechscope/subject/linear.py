"""A model's maps and what PEFT puts around them: what is stored, and what acts now.

An adapter wraps the modules it changes: layers that add something to a map or scale it (LoRA, DoRA, IA³, …), copies of whole modules
(`modules_to_save`), rows of an embedding (`trainable_token_indices`). Whatever reads a weight asks here, so that no reader has to know them:
`parameters_now` gives the parameters a module computes with, as merging the adapter would leave them.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from mechscope.errors import ModelError

# what stands around modules of an adapted model
WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a linear map stores its weight as (input, output), as GPT-2's `Conv1D` does."""
    return type(base_layer(module)).__name__ == "Conv1D"


def base_layer(module: nn.Module) -> nn.Module:
    """Return the plain module inside whatever PEFT put around it, or the module itself."""
    inner: Any = module
    while isinstance(inner, WRAPPERS):
        inner = inner.original_module if isinstance(inner, AuxiliaryTrainingWrapper) else inner.base_layer
    return cast(nn.Module, inner)


def acting(module: nn.Module) -> nn.Module:
    """Return the module that computes now, of those that PEFT keeps where an adapter trains a whole module: its own copy, or the original."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    own = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.modules_to_save]
    return cast(nn.Module, module.modules_to_save[own[0]] if own else module.original_module)


def oriented_weight(module: nn.Module) -> Float[Tensor, "output input"]:
    """Return a linear map's stored weight as (output features, input features), without any adapter's change."""
    weight = cast(Tensor, base_layer(module).weight)
    return weight.T if is_conv1d(module) else weight


def linear_now(module: nn.Module, *, adapted: bool) -> tuple[Float[Tensor, "output input"], Float[Tensor, " output"] | None]:
    """Return a linear map's weight as (output features, input features) and its bias, as they act with the adapter on or off."""
    own = parameters_now(module, adapted=adapted)
    return own["weight"].T if is_conv1d(module) else own["weight"], own.get("bias")


@torch.no_grad()
def parameters_now(module: nn.Module, *, adapted: bool) -> dict[str, Tensor]:
    """Return the parameters that a module computes with when the adapter is on or off, detached.

    Raises:
        ModelError: The adapter's layer does something to its map that no weight could do; the message names the kind of layer.
    """
    if isinstance(module, ModulesToSaveWrapper):
        own = [name for name in module.active_adapters if name in module.modules_to_save] if adapted else []
        return _parameters(module.modules_to_save[own[0]] if own else module.original_module)
    layer: Any = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
    if not isinstance(layer, WRAPPERS):
        return _parameters(layer)
    # wrappers of several parameters stand around each other
    stored = parameters_now(layer.base_layer if isinstance(layer, ParamWrapper) else layer.get_base_layer(), adapted=adapted)
    names = acting_adapters(layer) if adapted else []
    if not names:
        return stored
    if isinstance(layer, TrainableTokensLayer):
        return {**stored, "weight": layer.get_merged_weights(names).detach()}
    if adds(layer):
        key = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        weight = stored[key]
        for name in names:  # rounded to the map's type after every sum, as merging does
            weight = (weight + layer.get_delta_weight(name)).to(weight.dtype)
        return {**stored, key: weight}
    try:
        merged = copy.deepcopy(layer)
        merged.merge(adapter_names=names)
    # in these ways peft's kinds of layer say that they cannot: no method, one that is not written, shapes or modes that do not fit
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"an adapter's layer of kind {type(layer).__module__.split('.')[2]} ({type(layer).__name__}) cannot be merged into its map, so there is no weight "
            f"that acts as it does: {' '.join(str(error).split())[:200]}"
        ) from error
    return _parameters(merged.get_base_layer())


def acting_adapters(layer: Any) -> list[str]:
    """Return the active adapters that a layer has a part of: each of several may be on modules of its own."""
    return [
        name
        for name in layer.active_adapters
        if name in (layer.token_indices if isinstance(layer, TrainableTokensLayer) else layer._get_available_adapters())
    ]


def adds(layer: Any) -> bool:
    """Tell whether an adapter's layer computes W + ΔW with a ΔW of its own: plain LoRA; DoRA scales the sum, IA³ scales W, LoRA may have a bias."""
    if not isinstance(layer, LoraLayer):
        return False
    more = {*layer.lora_variant, *(name for name, on in layer.lora_bias.items() if on)}
    return not more.intersection(layer.active_adapters)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}
