"""What is where in a model: blocks, attention, other mixers of tokens, MLP, experts, norms, and each head's slice of the weights.

In a hybrid stack some blocks attend and others mix tokens in another way (linear attention, a state-space model, a short convolution): these have no
heads, and one mixer whose output they add. How it is found out stands in `discovery`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechscope.errors import ModelError
from mechscope.shapes import by_shape
from mechscope.subject.linear import oriented_weight


@dataclass(frozen=True)
class Slice:
    """Where each head's share of one linear map lives.

    Attributes:
        name: Path of the linear module in the plain Hugging Face model; GPT-2's query, key and value share one module.
        module: The `nn.Linear` or `Conv1D` (or the PEFT layer wrapped around it).
        side: `"output"` if a head owns output features (query, key, value), `"input"` if it owns input features (output projection).
        starts: First feature of every query head; heads that share a key/value head have the same start.
        width: Features per head.
    """

    name: str
    module: nn.Module
    side: Literal["output", "input"]
    starts: tuple[int, ...]
    width: int

    __repr__ = by_shape

    def features(self, head: int) -> Int[Tensor, " width"]:
        """Return the indices of the features that belong to a query head."""
        return torch.arange(self.starts[head], self.starts[head] + self.width)

    @property
    def all_features(self) -> Int[Tensor, " n"]:
        """The indices of the features of all heads, in head order, each once."""
        return torch.cat([torch.arange(start, start + self.width) for start in dict.fromkeys(self.starts)])

    def take(self, weight: Float[Tensor, "rows columns"], head: int) -> Tensor:
        """Cut a head's slice out of a weight oriented as (output features, input features)."""
        start, stop = self.starts[head], self.starts[head] + self.width
        return weight[start:stop] if self.side == "output" else weight[:, start:stop]

    def weight(self, head: int) -> Tensor:
        """Return a head's stored weights: (d_head, d_model) for query, key and value, (d_model, d_head) for the output projection."""
        return self.take(oriented_weight(self.module), head)


@dataclass(frozen=True)
class Experts:
    """The experts of one block.

    Attributes:
        name: Path of their module in the plain Hugging Face model.
        module: Called with the tokens, and for each token the experts that were chosen and their weights.
        number: How many there are.
    """

    name: str
    module: nn.Module
    number: int

    __repr__ = by_shape


@dataclass(frozen=True)
class Attention:
    """The attention of one block, and where its heads are stored.

    Attributes:
        name: Path of its module in the plain Hugging Face model.
        module: The attention module.
        write: Module whose output is what attention adds to the residual stream (a norm after attention where the family has one).
        gate: Where each head's gate is made, which its output is multiplied with (Qwen3-Next); None without.
    """

    name: str
    module: nn.Module
    query: Slice
    key: Slice
    value: Slice
    output: Slice
    write: nn.Module
    gate: Slice | None = None

    __repr__ = by_shape

    @property
    def slices(self) -> dict[str, Slice]:
        """All that belongs to single heads, by the name of the part."""
        own = {"query": self.query, "key": self.key, "value": self.value, "output": self.output}
        return own if self.gate is None else {**own, "gate": self.gate}


@dataclass(frozen=True)
class Mixer:
    """What mixes a block's tokens other than attention: linear attention, a state-space model, a short convolution.

    Attributes:
        name: Path of its module in the plain Hugging Face model.
        module: Its module.
        write: Module whose output is what it adds to the residual stream.
        linears: Paths of its linear maps.
        pair: Whether its module returns a pair, as attention does.
    """

    name: str
    module: nn.Module
    write: nn.Module
    linears: tuple[str, ...]
    pair: bool = False

    __repr__ = by_shape


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        name: Path of the block in the plain Hugging Face model.
        heads: Its attention; None where it does not attend.
        mixer: What mixes tokens instead; None where it attends.
        mlp_write: Module whose output is what the MLP adds (a norm after the MLP where the family has one).
        mlp_read: Module whose input is what the MLP reads.
        mlp_linears: Paths of the MLP's linear maps; of a mixture of experts those that all tokens pass.
        mlp_prefix: With what the names of the MLP's weights begin.
        mlp_behind: The norm between the MLP and the residual stream, in families that have one.
        last_map: The MLP's last linear map; None for a mixture of experts, which has no single one.
        experts: The experts, where the MLP is a mixture of them.
        multiplier: The family's factor on what attention (or the mixer) and MLP add (Granite). What is recorded and edited is what is added: with it.
    """

    name: str
    module: nn.Module
    heads: Attention | None
    mixer: Mixer | None
    mlp_write: nn.Module
    mlp_read: nn.Module
    mlp_linears: tuple[str, ...]
    mlp_prefix: str
    mlp_behind: nn.Module | None = None
    last_map: nn.Module | None = None
    experts: Experts | None = None
    multiplier: float = 1.0

    __repr__ = by_shape

    @property
    def attends(self) -> bool:
        """Whether it has attention heads."""
        return self.heads is not None

    @property
    def own_heads(self) -> Attention:
        """Its attention; raises ModelError where the block does not attend."""
        if self.heads is None:
            kind = "something else" if self.mixer is None else type(self.mixer.module).__name__
            raise ModelError(
                f"{self.name} does not attend: it mixes tokens by {kind}, which has no heads; it is measured as a whole, mixer…"
            )
        return self.heads

    @property
    def attention(self) -> nn.Module:
        """The attention module; this and what follows raise ModelError where the block does not attend."""
        return self.own_heads.module

    @property
    def attention_name(self) -> str:
        """Path of the attention module."""
        return self.own_heads.name

    @property
    def attention_write(self) -> nn.Module:
        """Module whose output is what attention adds to the residual stream."""
        return self.own_heads.write

    @property
    def query(self) -> Slice:
        """Where the heads' queries are made."""
        return self.own_heads.query

    @property
    def key(self) -> Slice:
        """Where the heads' keys are made."""
        return self.own_heads.key

    @property
    def value(self) -> Slice:
        """Where the heads' values are made."""
        return self.own_heads.value

    @property
    def output(self) -> Slice:
        """Where the heads' outputs are projected to the residual stream."""
        return self.own_heads.output

    @property
    def mixing(self) -> Attention | Mixer:
        """What mixes its tokens, by attention or otherwise."""
        return self.own_heads if self.mixer is None else self.mixer

    @property
    def mixing_site(self) -> Literal["attention_output", "mixer_output"]:
        """What the site is called at which this is recorded and edited."""
        return "attention_output" if self.mixer is None else "mixer_output"

    @property
    def mlp_down(self) -> nn.Module:
        """The MLP's last linear map: its input are the neurons.

        Raises:
            ModelError: The MLP is a mixture of experts.
        """
        if self.last_map is None:
            number = f"{self.experts.number} experts" if self.experts is not None else "experts"
            raise ModelError(
                f"the MLP of {self.name} is a mixture of {number}: it has no neurons that every token passes; it is measured as a whole, m…"
            )
        return self.last_map

    @property
    def d_mlp(self) -> int:
        """Number of the MLP's neurons; raises ModelError for a mixture of experts."""
        return oriented_weight(self.mlp_down).shape[1]


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder-only transformer and its sizes.

    Attributes:
        d_head: Width of a head's value and output z.
        d_query: Width of a head's query and key; another one with latent attention.
        rotaries: Those modules whose rotary frequencies depend on how long a text is.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_query: int
    vocab_size: int
    max_positions: int
    blocks: tuple[Block, ...]
    backbone: nn.Module
    embedding: nn.Module
    final_norm: nn.Module | None
    projection_out: nn.Module | None
    unembedding: nn.Module
    logit_softcap: float | None
    logit_multiplier: float
    rotaries: tuple[nn.Module, ...] = ()

    __repr__ = by_shape

    @cached_property
    def attending(self) -> tuple[int, ...]:
        """The layers that attend."""
        return tuple(layer for layer, block in enumerate(self.blocks) if block.attends)

    @cached_property
    def mixing(self) -> tuple[int, ...]:
        """The layers that mix tokens in another way."""
        return tuple(layer for layer, block in enumerate(self.blocks) if block.mixer is not None)

    def instead(self, layer: int) -> str:
        """Say, of a layer that lacks a site of attention or of a mixer, what it has instead."""
        if layer not in self.mixing:
            return "it attends, and what attention adds is attention_output"
        return f"layers {', '.join(map(str, self.mixing))} do not attend, so they have no heads; what mixes tokens there adds mixer_output"

    def require_all_attending(self, purpose: str) -> None:
        """Refuse a hybrid stack for what needs heads in every layer; raises ModelError that names the purpose and the layers that do not attend."""
        if self.mixing:
            kinds = sorted({type(mixer.module).__name__ for block in self.blocks if (mixer := block.mixer) is not None})
            raise ModelError(
                f"{purpose} needs a model that attends in every layer: layers {', '.join(map(str, self.mixing))} mix tokens by {' and '.join(kinds)}"
            )

    def heads(self) -> Iterator[tuple[int, int]]:
        """Yield every (layer, head) of the layers that attend."""
        for layer in self.attending:
            for head in range(self.n_heads):
                yield layer, head
