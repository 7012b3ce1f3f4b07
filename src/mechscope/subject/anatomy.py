"""What is where in a model: blocks, attention, MLP, experts, norms, and each head's slice of the weights.

How it is found out stands in `discovery`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
class Block:
    """One transformer block.

    Attributes:
        name: Path of the block in the plain Hugging Face model.
        attention_write: Module whose output is what attention adds to the residual stream (a norm after attention where the family has one).
        mlp_write: Module whose output is what the MLP adds (a norm after the MLP where the family has one).
        mlp_read: Module whose input is what the MLP reads.
        mlp_linears: Paths of the MLP's linear maps; of a mixture of experts those that all tokens pass.
        mlp_prefix: With what the names of the MLP's weights begin.
        mlp_behind: The norm between the MLP and the residual stream, in families that have one.
        last_map: The MLP's last linear map; None for a mixture of experts, which has no single one.
        experts: The experts, where the MLP is a mixture of them.
        multiplier: The family's factor on what attention and MLP add (Granite). What is recorded and edited is what is added: with it.
    """

    name: str
    module: nn.Module
    attention: nn.Module
    attention_name: str
    query: Slice
    key: Slice
    value: Slice
    output: Slice
    attention_write: nn.Module
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

    def heads(self) -> Iterator[tuple[int, int]]:
        """Yield every (layer, head)."""
        for layer in range(self.n_layers):
            for head in range(self.n_heads):
                yield layer, head
