"""The linear maps that are edited: the last one of an MLP, which writes what its neurons hold (`mlp_down`).

Its input is called a key and its output a value (Geva et al. 2021). What stands in the way of editing a layer is said here, by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mechscope.errors import ModelError, SettingsError
from mechscope.shapes import by_shape
from mechscope.subject import Subject
from mechscope.subject.linear import is_conv1d, oriented_weight
from mechscope.subject.placement import sent


@dataclass(frozen=True)
class DownMap:
    """The map of one layer.

    Attributes:
        layer: Its layer.
        parameter: The name of its weight in the plain Hugging Face model.
        module: The `nn.Linear` or `Conv1D`.
    """

    layer: int
    parameter: str
    module: nn.Module

    __repr__ = by_shape

    @property
    def weight(self) -> Float[Tensor, "d_model d_mlp"]:
        """Its weight as (output, input), in float64, apart from the model."""
        return oriented_weight(self.module).detach().double()

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (input, output), as GPT-2's `Conv1D` does."""
        return is_conv1d(self.module)

    def stored(self, change: Float[Tensor, "d_model d_mlp"]) -> Tensor:
        """Return a change of the weight in the orientation in which the weight is stored: `Conv1D` keeps (input, output)."""
        return change.T if self.transposed else change

    def written(self, keys: Float[Tensor, "d_mlp n"]) -> Float[Tensor, "d_model n"]:
        """Return what the map makes of keys, its bias included, in float64 on the CPU."""
        bias: Any = getattr(self.module, "bias", None)
        weight = self.weight
        made = weight @ sent(keys, weight.device)
        return (made if bias is None else made + bias.detach().double()[:, None]).cpu()


def down_map(subject: Subject, layer: int) -> DownMap:
    """Return the map that is edited in a layer.

    Raises:
        SettingsError: There is no such layer.
        ModelError: The layer's MLP is a mixture of experts, or the model carries an adapter or weights that are not in memory.
    """
    anatomy = subject.anatomy
    if not 0 <= layer < anatomy.n_layers:
        raise SettingsError(f"layer {layer} does not exist: the model has layers 0-{anatomy.n_layers - 1}")
    if subject.is_adapter:
        raise ModelError(
            f"model {subject.source!r} carries an adapter: merge it (model.merge_and_unload(), save_pretrained) before editing"
        )
    subject.require_in_memory("editing")
    block = anatomy.blocks[layer]
    if block.last_map is None:
        number = f"{block.experts.number} experts" if block.experts is not None else "experts"
        raise ModelError(
            f"the MLP of layer {layer} is a mixture of {number}: no single map writes for every token, so it cannot be edited; choose a layer that is dense"
        )
    module = block.mlp_down
    name = next((name for name, own in subject.plain.named_modules() if own is module), None)
    if name is None:
        raise ModelError(f"the last map of layer {layer}'s MLP is not a module of model {subject.source!r}")
    return DownMap(layer, f"{name}.weight", module)


@contextlib.contextmanager
def shifted(module: nn.Module, where: Bool[Tensor, "batch token"], by: Float[Tensor, "*batch d_model"]) -> Iterator[None]:
    """Add a vector to a map's output at some tokens, for the duration; gradients flow to the vector.

    Args:
        module: The map.
        where: The tokens.
        by: One vector, or one for each row of the batch.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        here = sent(where, output.device)
        added = by.to(output) if by.ndim == 1 else by.to(output)[:, None].expand(*where.shape, -1)
        # OPT's MLP sees all tokens of the batch as rows of one matrix
        mask = here.reshape(output.shape[:-1])[..., None]
        return output + torch.where(mask, added if by.ndim == 1 else added.reshape(output.shape), torch.zeros_like(output))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def require_layers(subject: Subject, layers: Collection[int]) -> list[DownMap]:
    """Return the maps of several layers, in ascending order; `SettingsError` where there are none, else as `down_map`."""
    if not layers:
        raise SettingsError("no layer is named to edit: give at least one")
    return [down_map(subject, layer) for layer in sorted(set(layers))]
