"""What is where in a model: blocks, attention, MLP, norms, and each head's slice of the weights.

The anatomy is discovered, not declared per family: the block list is the one `ModuleList` as long as the model is deep whose members hold an
attention module; an attention module is one with known reader and writer names. Only the names that libraries use (`q_proj`, `c_attn`, …)
and the three ways to store q, k and v (apart, side by side, interleaved by head) are listed here. What the discovery concludes is verified on
a tiny forward pass when the model is loaded (`mechscope.instrument.trust`), so a wrong guess is reported and never used silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechscope.errors import ModelError
from mechscope.shapes import by_shape
from mechscope.subject.linear import base_layer, oriented_weight

Layout = Literal["apart", "side_by_side", "interleaved"]

_SEPARATE = ("q_proj", "k_proj", "v_proj")
_FUSED: dict[str, Layout] = {"c_attn": "side_by_side", "qkv_proj": "side_by_side", "query_key_value": "interleaved"}
_WRITERS = ("o_proj", "out_proj", "dense", "c_proj")
_MLPS = ("mlp", "feed_forward", "ffn")
_FINAL_NORMS = ("ln_f", "norm", "final_layer_norm", "final_layernorm")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


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
class Block:
    """One transformer block.

    Attributes:
        name: Path of the block in the plain Hugging Face model.
        attention_write: Module whose output is what attention adds to the residual stream (a norm after attention where the family has one).
        mlp_write: Module whose output is what the MLP adds (a norm after the MLP where the family has one).
        mlp_read: Module whose input is what the MLP reads.
        mlp_down: The MLP's last linear map: its input are the neurons.
        mlp_linears: Paths of the MLP's linear maps.
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
    mlp_down: nn.Module
    mlp_linears: tuple[str, ...]

    __repr__ = by_shape

    @property
    def d_mlp(self) -> int:
        """Number of the MLP's neurons."""
        return oriented_weight(self.mlp_down).shape[1]


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder-only transformer and its sizes; `rotaries` are those modules whose rotary frequencies depend on how long a text is."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
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


def discover(model: Any) -> Anatomy:
    """Find the parts of a Hugging Face causal language model.

    Args:
        model: A `PreTrainedModel` (not wrapped by PEFT; its linear maps may be PEFT layers).

    Raises:
        ModelError: The structure is not a supported decoder-only transformer; the message names what was found.
    """
    config = model.config.get_text_config()
    family = config.model_type
    _refuse(config, family)
    n_layers = int(config.num_hidden_layers)
    n_heads = int(config.num_attention_heads)
    d_model = int(config.hidden_size)
    backbone = model.base_model
    path, stack = _find_blocks(model, n_layers, family)
    holder = model.get_submodule(path.rpartition(".")[0]) if "." in path else model
    d_head = int(getattr(config, "head_dim", None) or d_model // n_heads)
    blocks = tuple(_read_block(f"{path}.{index}", block, n_heads, d_head, family) for index, block in enumerate(stack))
    kv_heads = len(set(blocks[0].value.starts))
    unembedding = model.get_output_embeddings()
    if unembedding is None:
        raise ModelError(f"{type(model).__name__} has no output embedding: mechscope studies causal language models (…ForCausalLM)")
    return Anatomy(
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=kv_heads,
        d_model=d_model,
        d_head=d_head,
        vocab_size=oriented_weight(unembedding).shape[0],
        max_positions=int(getattr(config, "max_position_embeddings", None) or 2**31),
        blocks=blocks,
        backbone=backbone,
        embedding=model.get_input_embeddings(),
        final_norm=next((child for name in _FINAL_NORMS if isinstance(child := getattr(holder, name, None), nn.Module)), None),
        projection_out=getattr(holder, "project_out", None),
        unembedding=unembedding,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        logit_multiplier=float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0),
        rotaries=tuple(module for module in model.modules() if _depends_on_length(module)),
    )


def _depends_on_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    return any("dynamic" in kind or kind == "longrope" for kind in (kinds.values() if isinstance(kinds, dict) else [str(kinds)]))


def _refuse(config: Any, family: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{family} is an encoder-decoder model: mechscope studies decoder-only models (GPT-2, Llama, GPT-NeoX, …)")
    if family == "gpt_neo":
        raise ModelError(
            "gpt_neo is not supported: its attention does not go through transformers' attention interface, so it cannot be observed "
            "without rewriting it; GPT-NeoX/Pythia, GPT-2 and OPT are the nearest supported families"
        )
    experts = next((name for name in _EXPERTS if (getattr(config, name, None) or 0) > 1), None)
    if experts:
        raise ModelError(
            f"{family} is a mixture of experts ({experts}={getattr(config, experts)}): not supported, its MLP is not one map per layer"
        )


def _find_blocks(model: nn.Module, n_layers: int, family: str) -> tuple[str, nn.ModuleList]:
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and _find_attention(module[0]) is not None
    ]
    if len(stacks) != 1:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise ModelError(
            f"{family}: expected one list of {n_layers} blocks with an attention module (readers {', '.join((*_SEPARATE, *_FUSED))}), "
            f"found {len(stacks)} among {lists or 'no module lists'}: this architecture is not supported"
        )
    return stacks[0]


def _find_attention(block: nn.Module) -> tuple[str, nn.Module] | None:
    for name, child in block.named_children():
        fused = any(hasattr(child, reader) for reader in _FUSED)
        if (fused or all(hasattr(child, reader) for reader in _SEPARATE)) and any(hasattr(child, writer) for writer in _WRITERS):
            return name, child
    return None


def _read_block(path: str, block: nn.Module, n_heads: int, d_head: int, family: str) -> Block:
    named = _find_attention(block)
    if named is None:
        raise ModelError(f"{family}: block {path} has no attention module like its first block; hybrid stacks are not supported")
    attention_name, attention = f"{path}.{named[0]}", named[1]
    readers = _readers(attention, attention_name, n_heads, d_head, family)
    writer = next(name for name in _WRITERS if hasattr(attention, name))
    output = Slice(f"{attention_name}.{writer}", getattr(attention, writer), "input", tuple(h * d_head for h in range(n_heads)), d_head)
    attention_write, mlp_write, mlp_read, mlp_prefixes = _writers(block, attention, path, family)
    linears = tuple(
        f"{path}.{name}"
        for name, module in block.named_modules()
        if name.startswith(mlp_prefixes) and getattr(base_layer(module), "weight", torch.empty(0)).ndim == 2 and ".base_layer" not in name
        if not any(name.endswith(f".{part}") or f".{part}." in name for part in ("lora_A", "lora_B", "modules_to_save"))
    )
    if not linears:
        raise ModelError(f"{family}: the MLP of block {path} holds no linear map: this architecture is not supported")
    mlp_down = block.get_submodule(linears[-1].removeprefix(f"{path}."))  # maps stand in the order in which they are applied
    return Block(path, block, attention, attention_name, *readers, output, attention_write, mlp_write, mlp_read, mlp_down, linears)


def _readers(attention: nn.Module, name: str, n_heads: int, d_head: int, family: str) -> tuple[Slice, Slice, Slice]:
    """Say where query, key and value of each head are stored."""
    if all(hasattr(attention, reader) for reader in _SEPARATE):
        slices = []
        for reader in _SEPARATE:
            module = getattr(attention, reader)
            stored = oriented_weight(module).shape[0] // d_head
            if stored == 0 or n_heads % stored:
                raise ModelError(
                    f"{family}: {name}.{reader} holds {stored} heads of width {d_head}, which does not divide {n_heads} query heads"
                )
            starts = tuple(head // (n_heads // stored) * d_head for head in range(n_heads))
            slices.append(Slice(f"{name}.{reader}", module, "output", starts, d_head))
        return slices[0], slices[1], slices[2]
    reader = next(key for key in _FUSED if hasattr(attention, key))
    module = getattr(attention, reader)
    stored = oriented_weight(module).shape[0] // d_head
    kv_heads = (stored - n_heads) // 2
    if kv_heads < 1 or n_heads % kv_heads or n_heads + 2 * kv_heads != stored:
        raise ModelError(
            f"{family}: {name}.{reader} holds {stored} slices of width {d_head}, which is not {n_heads} queries plus keys and values"
        )
    if _FUSED[reader] == "interleaved":
        if kv_heads != n_heads:
            raise ModelError(f"{family}: {name}.{reader} interleaves {kv_heads} key/value heads with {n_heads} query heads: not supported")
        offsets = [tuple((3 * head + part) * d_head for head in range(n_heads)) for part in range(3)]
    else:
        shared = [head // (n_heads // kv_heads) for head in range(n_heads)]
        offsets = [
            tuple(head * d_head for head in range(n_heads)),
            tuple((n_heads + head) * d_head for head in shared),
            tuple((n_heads + kv_heads + head) * d_head for head in shared),
        ]
    query, key, value = (Slice(f"{name}.{reader}", module, "output", starts, d_head) for starts in offsets)
    return query, key, value


def _writers(block: Any, attention: nn.Module, path: str, family: str) -> tuple[nn.Module, nn.Module, nn.Module, tuple[str, ...]]:
    """Return what attention writes, what the MLP writes and reads, and the prefixes of the MLP's modules."""
    name = next((name for name in _MLPS if hasattr(block, name)), None)
    if name is not None:
        mlp_read = mlp_write = getattr(block, name)
        prefixes: tuple[str, ...] = (f"{name}.",)
    elif hasattr(block, "fc1") and hasattr(block, "fc2"):  # OPT keeps the MLP's two maps on the block itself
        mlp_read, mlp_write, prefixes = block.fc1, block.fc2, ("fc1", "fc2")
    else:
        raise ModelError(f"{family}: block {path} has no MLP under a known name ({', '.join(_MLPS)}, fc1/fc2)")
    # Gemma 2/3 and OLMo 2 normalise what a sublayer computed before adding it: there the norm's output is what is written
    if hasattr(block, "post_feedforward_layernorm"):
        return block.post_attention_layernorm, block.post_feedforward_layernorm, mlp_read, prefixes
    return attention, mlp_write, mlp_read, prefixes
