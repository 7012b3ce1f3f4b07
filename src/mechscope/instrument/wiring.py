"""What stands between the residual stream and the heads and MLPs that read and write it: norms, and each head's own weights.

A head's query (key, value) is a norm of the residual stream times its slice of W_Q (W_K, W_V); an MLP reads through a norm of its own. What a
head writes is z times its slice of W_O. Families with a norm behind attention (Gemma 2/3) write that times the norm's gain and scale; the scale
is shared by the heads of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechscope.instrument.norms import Norm
from mechscope.instrument.structure import Structure, discovered
from mechscope.subject.anatomy import Slice
from mechscope.subject.load import Subject

# the structure of a model, with and without its adapter (which may bring norms of its own); the weights themselves are read anew each time
_KNOWN: WeakKeyDictionary[nn.Module, dict[bool, Structure]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Reader:
    """One head projection of a layer: all heads' queries, keys or values.

    Attributes:
        weight: ``(stored head, d_head, d_model)``; grouped-query families store fewer keys and values than query heads.
        bias: ``(stored head, d_head)`` or None.
    """

    weight: Float[Tensor, "stored d_head d_model"]
    bias: Float[Tensor, "stored d_head"] | None


class Wiring:
    """How a model's heads and MLPs read and write, with the weights as they act now (an active adapter's change included).

    Attributes:
        subject: The model.
        parallel: Whether a block's MLP reads what the block reads, without its heads.
        group: Query heads that share a key and value.
    """

    def __init__(self, subject: Subject) -> None:
        """Find out what stands where; once per model.

        Raises:
            ModelError: Heads or MLPs read the residual stream in a way that is not supported, or weights are offloaded; the message names it.
        """
        subject.require_in_memory("taking heads and MLPs apart")
        self.subject = subject
        known = _KNOWN.setdefault(subject.plain, {})
        if subject.adapted not in known:
            known[subject.adapted] = discovered(subject)
        self._structure = structure = known[subject.adapted]
        self.parallel = structure.parallel
        self.group = subject.anatomy.n_heads // subject.anatomy.n_kv_heads
        self._constants: dict[tuple[int, str], Tensor | None] = {}
        self._linears: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}

    def attention_norm(self, layer: int) -> Norm | None:
        """Return the norm that a layer's heads read through."""
        return self._structure.layers[layer].attention_norm

    def mlp_norm(self, layer: int) -> Norm | None:
        """Return the norm that a layer's MLP reads through."""
        return self._structure.layers[layer].mlp_norm

    def written_norm(self, layer: int) -> Norm | None:
        """Return the norm behind attention, of families that have one."""
        return self._structure.layers[layer].written_norm

    def reader(self, layer: int, part: str) -> Reader:
        """Return the weights of all heads' queries, keys or values of a layer."""
        slices: Slice = getattr(self.subject.anatomy.blocks[layer], part)
        starts = tuple(dict.fromkeys(slices.starts))
        weight, bias = self._linear(slices)
        return Reader(_cut(weight, starts, slices.width), None if bias is None else _cut(bias, starts, slices.width))

    def folded(self, layer: int, part: str) -> Float[Tensor, "stored d_head d_model"]:
        """Return a reader's weight with its norm's gain and centring: times x̂, plus `constant`, it gives the projection."""
        weight, norm = self.reader(layer, part).weight, self.attention_norm(layer)
        if norm is None:
            return weight
        if not norm.centred:
            return weight * norm.gain
        mean = (weight @ norm.gain)[..., None] / weight.shape[-1]
        return torch.addcmul(-mean, weight, norm.gain)

    def constant(self, layer: int, part: str) -> Float[Tensor, "stored d_head"] | None:
        """Return what a projection is where x̂ is zero: its bias and what the norm's shift brings; None for nothing."""
        if (layer, part) not in self._constants:
            reader, norm = self.reader(layer, part), self.attention_norm(layer)
            shift = None if norm is None or norm.shift is None else reader.weight @ norm.shift
            self._constants[layer, part] = reader.bias if shift is None else shift if reader.bias is None else reader.bias + shift
        return self._constants[layer, part]

    def writer(self, layer: int) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, " d_model"] | None]:
        """Return each head's slice of W_O, as it turns z into what is written, and the projection's bias, which is no head's.

        Behind a norm (Gemma 2/3) its gain is part of the weights, and so is a family's factor on what is added (Granite).
        """
        slices = self.subject.anatomy.blocks[layer].output
        weight, bias = self._linear(slices)
        heads = _cut(weight.T, slices.starts, slices.width)
        norm, factor = self.written_norm(layer), self.subject.anatomy.blocks[layer].multiplier
        if factor != 1.0:
            heads, bias = heads * factor, None if bias is None else bias * factor
        return (heads if norm is None else heads * norm.gain), bias

    def written_scale(self, layer: int, z: Float[Tensor, "*rows head d_head"]) -> Float[Tensor, "*rows 1 1"] | None:
        """Return the scale that a norm behind attention gives all heads of a token; None without such a norm."""
        norm = self.written_norm(layer)
        if norm is None:
            return None
        with self.subject.active():
            whole = self.subject.anatomy.blocks[layer].output.module(z.flatten(-2))
        return norm.normalised(whole)[1][..., None]

    def _linear(self, part: Slice) -> tuple[Tensor, Tensor | None]:
        if not self.subject.is_adapter:
            return self.subject.linear(part.module)
        if part.module not in self._linears:  # what an adapter makes of a map is computed once
            self._linears[part.module] = self.subject.linear(part.module)
        return self._linears[part.module]


def _cut(values: Tensor, starts: tuple[int, ...], width: int) -> Tensor:
    """Cut slices of the first axis and put them on an axis of their own; a view where they lie evenly."""
    step = starts[1] - starts[0] if len(starts) > 1 else width
    if all(start == starts[0] + place * step for place, start in enumerate(starts)):
        return values.as_strided(
            (len(starts), width, *values.shape[1:]),
            (step * values.stride(0), *values.stride()),
            values.storage_offset() + starts[0] * values.stride(0),
        )
    return torch.stack([values[start : start + width] for start in starts])
