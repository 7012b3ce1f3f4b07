"""Finding out what is where in a Hugging Face model.

The anatomy is discovered, not declared per family: the block list is the one `ModuleList` as long as the model is deep some of whose members hold an
attention module; an attention module is one with known reader and writer names, in a layer that the configuration does not call something else. Only the
names that libraries use (`q_proj`, `c_attn`, …) and the ways to store q, k and v (apart, side by side, interleaved by head, keys and values behind a latent)
are listed here. What the discovery concludes is verified on a tiny forward pass when the model is loaded (`mechscope.instrument.trust`), so a wrong guess is
reported and never used silently.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from mechscope.errors import ModelError
from mechscope.subject.anatomy import Anatomy, Attention, Block, Experts, Mixer, Slice
from mechscope.subject.linear import base_layer, oriented_weight

Layout = Literal["side_by_side", "interleaved"]

_SEPARATE = ("q_proj", "k_proj", "v_proj")
_FUSED: dict[str, Layout] = {"c_attn": "side_by_side", "qkv_proj": "side_by_side", "query_key_value": "interleaved"}
# queries and, behind a latent, keys and values (DeepSeek)
_LATENT = (("q_b_proj", "q_proj"), "kv_b_proj")
_WRITERS = ("o_proj", "out_proj", "dense", "c_proj")
# what mixes tokens otherwise, and what MiniMax calls its linear attention, as it calls its attention
_MIXERS = ("linear_attn", "mamba", "conv")
_MIXER_NAMED_ATTENTION = "self_attn"
# layers that configurations say mix tokens by something else than softmax attention
_OTHERWISE = ("linear_attention", "mamba", "conv", "recurrent")
_MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp")
# norms between what a sublayer computed and the residual stream: behind the MLP, and then behind attention
_BEHIND_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_norm2")
_BEHIND_ATTENTION = ("post_norm1", "post_self_attn_layernorm", "post_attention_layernorm")
_FINAL_NORMS = ("ln_f", "norm", "final_layer_norm", "final_layernorm", "layer_norm", "embedding_norm", "norm_f")


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
    d_head = _head_width(config, family) or d_model // n_heads
    kinds = _layer_kinds(config, n_layers)
    blocks = tuple(_read_block(f"{path}.{index}", block, kinds[index], config, d_head, family) for index, block in enumerate(stack))
    first = next((block for block in blocks if block.attends), None)
    if first is None:
        raise ModelError(f"{family}: none of the {n_layers} layers attends: there is no attention to study")
    kv_heads = len(set(first.value.starts))
    unembedding = model.get_output_embeddings()
    if unembedding is None:
        raise ModelError(f"{type(model).__name__} has no output embedding: mechscope studies causal language models (…ForCausalLM)")
    return Anatomy(
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=kv_heads,
        d_model=d_model,
        d_head=first.value.width,
        d_query=first.query.width,
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
        rotaries=tuple(module for module in model.modules() if depends_on_length(module)),
    )


def _head_width(config: Any, family: str) -> int:
    """Return the width of heads that the configuration names, or 0."""
    if getattr(config, "num_kv_shared_layers", 0):
        raise ModelError(
            f"{family}: {config.num_kv_shared_layers} of its layers have no keys and values of their own but read those of an earlier layer: not supported"
        )
    try:
        return int(getattr(config, "head_dim", None) or 0)
    except RuntimeError as error:  # transformers' own, where layers differ
        raise ModelError(f"{family}: its layers have heads of different width (head_dim by layer): not supported") from error


def depends_on_length(module: nn.Module) -> bool:
    """Tell whether a module makes rotary frequencies that depend on how long a text is (dynamic NTK, LongRoPE)."""
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
    if not getattr(config, "num_attention_heads", None):
        raise ModelError(f"{family} has no attention heads (it is a recurrent or state-space model): there is no attention to study")


def _find_blocks(model: nn.Module, n_layers: int, family: str) -> tuple[str, nn.ModuleList]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers]
    stacks = [(name, module) for name, module in lists if any(_find_attention(block) is not None for block in module)]
    if len(stacks) == 1:
        return stacks[0]
    names = ", ".join(name for name, _ in lists) or "none"
    known = ", ".join((*_SEPARATE, *_FUSED))
    raise ModelError(
        f"{family}: of its lists of {n_layers} blocks ({names}), {len(stacks)} hold attention modules as known here (maps named {known}), where one "
        "should: this architecture is not supported"
    )


def _layer_kinds(config: Any, n_layers: int) -> list[str]:
    """Return what the configuration calls each layer, empty where it says nothing."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return [str(kind) for kind in kinds] if len(kinds) == n_layers else [""] * n_layers


def _find_attention(block: nn.Module) -> tuple[str, nn.Module] | None:
    for name, child in block.named_children():
        fused = any(hasattr(child, reader) for reader in _FUSED)
        if (fused or all(hasattr(child, reader) for reader in _SEPARATE) or _latent(child)) and any(
            hasattr(child, writer) for writer in _WRITERS
        ):
            return name, child
    return None


def _latent(attention: nn.Module) -> str | None:
    """Return the name of the map that makes the queries, where keys and values come from a latent."""
    queries, keys_values = _LATENT
    if not hasattr(attention, keys_values):
        return None
    return next((name for name in queries if getattr(attention, name, None) is not None), None)


def _read_block(path: str, block: Any, kind: str, config: Any, d_head: int, family: str) -> Block:
    behind_mlp = next((norm for name in _BEHIND_MLP if (norm := getattr(block, name, None)) is not None), None)
    behind_mixing = next((norm for name in _BEHIND_ATTENTION if (norm := getattr(block, name, None)) is not None), None)
    write = None if behind_mlp is None else behind_mixing
    named = None if kind in _OTHERWISE else _find_attention(block)
    mixer = None if named is not None else _find_mixer(block, path, kind, write, family)
    heads = None if named is None else _read_attention(path, named, write, config, d_head, family)
    mlp_read, mlp, prefix = _find_mlp(block, path, family)
    experts = _find_experts(block, path, prefix)
    linears = _linears(block, path, prefix)
    if not linears and experts is None:
        raise ModelError(f"{family}: the MLP of block {path} holds no linear map: this architecture is not supported")
    # maps stand in the order in which they are applied
    last = None if experts is not None else block.get_submodule(linears[-1].removeprefix(f"{path}."))
    return Block(
        path,
        block,
        heads,
        mixer,
        mlp if behind_mlp is None else behind_mlp,
        mlp_read,
        linears,
        f"{path}.{prefix}",
        behind_mlp,
        last,
        experts,
        float(getattr(config, "residual_multiplier", None) or 1.0),
    )


def _find_mixer(block: nn.Module, path: str, kind: str, write: nn.Module | None, family: str) -> Mixer:
    known = (*_MIXERS, *((_MIXER_NAMED_ATTENTION,) if kind in _OTHERWISE else ()))
    names = [name for name in known if isinstance(getattr(block, name, None), nn.Module)]
    if len(names) != 1:
        raise ModelError(
            f"{family}: block {path} has no attention module as known here, and of what else may mix tokens ({', '.join(known)}) it has "
            f"{' and '.join(names) or 'nothing'}: this architecture is not supported"
        )
    module: nn.Module = getattr(block, names[0])
    linears = _linears(block, path, f"{names[0]}.")
    return Mixer(f"{path}.{names[0]}", module, module if write is None else write, linears, pair=names[0] == _MIXER_NAMED_ATTENTION)


def _read_attention(path: str, named: tuple[str, nn.Module], write: nn.Module | None, config: Any, d_head: int, family: str) -> Attention:
    attention_name, attention = f"{path}.{named[0]}", named[1]
    n_heads = int(config.num_attention_heads)
    writer = next(name for name in _WRITERS if hasattr(attention, name))
    for name, module in (
        (name, getattr(attention, name)) for name in (*_SEPARATE, *_FUSED, writer) if getattr(attention, name, None) is not None
    ):
        if getattr(base_layer(module), "weight", None) is None:
            raise ModelError(f"{family}: {attention_name}.{name} ({type(module).__name__}) is no linear map with one weight: not supported")
    readers = _readers(attention, attention_name, n_heads, d_head, config, family)
    gate = None
    if _is_gated(attention, n_heads, d_head):
        query = readers[0]
        gate = replace(query, starts=tuple(start + query.width for start in query.starts))
    width = readers[2].width
    output = Slice(f"{attention_name}.{writer}", getattr(attention, writer), "input", tuple(h * width for h in range(n_heads)), width)
    if oriented_weight(output.module).shape[1] != n_heads * width:
        raise ModelError(
            f"{family}: {output.name} reads {oriented_weight(output.module).shape[1]} features, {n_heads} heads of width {width} give "
            f"{n_heads * width}: this architecture is not supported"
        )
    return Attention(attention_name, attention, *readers, output, attention if write is None else write, gate)


def _linears(block: nn.Module, path: str, prefix: str) -> tuple[str, ...]:
    return tuple(
        f"{path}.{name}"
        for name, module in block.named_modules()
        if name.startswith(prefix) and isinstance(weight := getattr(base_layer(module), "weight", None), torch.Tensor) and weight.ndim == 2
        if ".base_layer" not in name and ".original_module" not in name and _is_map(module)
        if not any(name.endswith(f".{part}") or f".{part}." in name for part in ("lora_A", "lora_B", "modules_to_save"))
    )


def _is_map(module: nn.Module) -> bool:
    """Tell a linear map from a router that holds a matrix, and from an embedding."""
    inner = base_layer(module)
    return isinstance(inner, nn.Linear) or type(inner).__name__ in ("Conv1D", "BitLinear", "AutoBitLinear") or hasattr(inner, "in_features")


def _find_experts(block: nn.Module, path: str, prefix: str) -> Experts | None:
    for name, module in block.named_modules():
        if name.startswith(prefix) and name.rpartition(".")[2] == "experts":
            stored = [parameter for parameter in base_layer(module).parameters(recurse=False) if parameter.ndim == 3]
            if stored:
                return Experts(f"{path}.{name}", module, len(stored[0]))
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                return Experts(f"{path}.{name}", module, len(module))
    return None


def _readers(attention: Any, name: str, n_heads: int, d_head: int, config: Any, family: str) -> tuple[Slice, Slice, Slice]:
    """Say where query, key and value of each head are stored."""
    if queries := _latent(attention):
        plain, width = int(config.qk_nope_head_dim), int(config.v_head_dim)
        turned = plain + int(config.qk_rope_head_dim)
        both = f"{name}.{_LATENT[1]}", attention.kv_b_proj
        starts = tuple(head * (plain + width) for head in range(n_heads))
        return (
            Slice(f"{name}.{queries}", getattr(attention, queries), "output", tuple(head * turned for head in range(n_heads)), turned),
            Slice(*both, "output", starts, plain),
            Slice(*both, "output", tuple(start + plain for start in starts), width),
        )
    if all(hasattr(attention, reader) for reader in _SEPARATE):
        slices = []
        for reader in _SEPARATE:
            module = getattr(attention, reader)
            stored = oriented_weight(module).shape[0] // d_head
            if reader == "q_proj" and _is_gated(attention, n_heads, d_head):
                slices.append(Slice(f"{name}.{reader}", module, "output", tuple(2 * head * d_head for head in range(n_heads)), d_head))
                continue
            if stored == 0 or n_heads % stored:
                raise ModelError(
                    f"{family}: {name}.{reader} holds {stored} heads of width {d_head}, which does not divide {n_heads} query heads"
                )
            starts = tuple(head // (n_heads // stored) * d_head for head in range(n_heads))
            slices.append(Slice(f"{name}.{reader}", module, "output", starts, d_head))
        return slices[0], slices[1], slices[2]
    return _fused_readers(attention, name, n_heads, d_head, family)


def _is_gated(attention: Any, n_heads: int, d_head: int) -> bool:
    """Tell whether each head's query is followed by a gate of the same width (Qwen3-Next)."""
    queries, writer = getattr(attention, "q_proj", None), next(getattr(attention, name) for name in _WRITERS if hasattr(attention, name))
    if queries is None or oriented_weight(writer).shape[1] != n_heads * d_head:
        return False
    return oriented_weight(queries).shape[0] == 2 * n_heads * d_head


def _fused_readers(attention: nn.Module, name: str, n_heads: int, d_head: int, family: str) -> tuple[Slice, Slice, Slice]:
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


def _find_mlp(block: Any, path: str, family: str) -> tuple[nn.Module, nn.Module, str]:
    """Return what reads as the MLP, what writes as it, and the prefix of its modules within the block."""
    names = [name for name in _MLPS if isinstance(getattr(block, name, None), nn.Module)]
    if len(names) > 1:
        raise ModelError(
            f"{family}: block {path} adds what {' and '.join(names)} write together: its MLP is not one part, which is not supported"
        )
    if names:
        mlp = getattr(block, names[0])
        return mlp, mlp, f"{names[0]}."
    if hasattr(block, "fc1") and hasattr(block, "fc2"):  # OPT keeps the MLP's two maps on the block itself
        return block.fc1, block.fc2, "fc"
    raise ModelError(f"{family}: block {path} has no MLP under a known name ({', '.join(_MLPS)}, fc1/fc2)")
