"""Heads' circuits written out by hand for each family, dense, from the Hugging Face modules by their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests import families

FAMILIES = ("gpt2", "llama", "gpt_neox", "opt", "qwen3", "gemma2")
# queries and keys have no norm of their own
BILINEAR = ("gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "gemma2", "phi", "phi3")


@dataclass(frozen=True)
class Norm:
    """Weights of a norm: y = gain ⊙ x̂ + shift."""

    gain: Tensor
    shift: Tensor | None
    centred: bool
    eps: float

    def standard(self, x: Tensor) -> Tensor:
        """Return x̂."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


@dataclass(frozen=True)
class Head:
    """One head's weights: q, k and v as (d_model, d_head), o as (d_head, d_model)."""

    norm: Norm
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    scaling: float

    def folded(self, weight: Tensor) -> Tensor:
        """Return what acts on the bare or scaled residual stream."""
        acting = self.norm.gain[:, None] * weight
        if not self.norm.centred:
            return acting
        size = len(acting)
        return (torch.eye(size, dtype=acting.dtype) - torch.ones(size, size, dtype=acting.dtype) / size) @ acting

    @property
    def ov(self) -> Tensor:
        """Return W_OV: (read, written)."""
        return self.folded(self.v) @ self.o

    @property
    def qk(self) -> Tensor:
        """Return W_QK, nothing turned: (query, key)."""
        return self.folded(self.q) @ self.folded(self.k).T * self.scaling


def norm(module: Any, family: str) -> Norm:
    """Read a norm."""
    eps = next(getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name))
    gain = module.weight.detach() + (1 if family.startswith("gemma") else 0)
    shift = module.bias.detach() if hasattr(module, "bias") else None
    return Norm(gain, shift, family in ("gpt2", "gpt_neox", "opt"), eps)


def head(model: Any, family: str, layer: int, index: int) -> Head:
    """Cut a head's weights out by hand."""
    if family == "gpt2":
        block, width = model.transformer.h[layer], families.WIDTH // families.HEADS
        q, k, v = (part[:, index * width : (index + 1) * width] for part in block.attn.c_attn.weight.detach().split(families.WIDTH, dim=1))
        o = block.attn.c_proj.weight.detach()[index * width : (index + 1) * width]
        return Head(norm(block.ln_1, family), q, k, v, o, width**-0.5)
    if family == "gpt_neox":
        block, width = model.gpt_neox.layers[layer], families.WIDTH // families.HEADS
        q, k, v = block.attention.query_key_value.weight.detach().view(families.HEADS, 3, width, families.WIDTH)[index].transpose(1, 2)
        o = block.attention.dense.weight.detach()[:, index * width : (index + 1) * width].T
        return Head(norm(block.input_layernorm, family), q, k, v, o, width**-0.5)
    if family == "opt":
        block = model.model.decoder.layers[layer]
        attention, before, writer, group = block.self_attn, block.self_attn_layer_norm, block.self_attn.out_proj, 1
    else:
        block = model.model.layers[layer]
        attention, before, writer, group = block.self_attn, block.input_layernorm, block.self_attn.o_proj, 2
    width = attention.head_dim
    cut = slice(index * width, (index + 1) * width)
    shared = slice(index // group * width, (index // group + 1) * width)
    o = writer.weight.detach()[:, cut].T
    scaling = width**-0.5
    if family == "gemma2":
        o = o * (1 + block.post_attention_layernorm.weight.detach())
        scaling = 12**-0.5
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    return Head(norm(before, family), q.weight.detach()[cut].T, k.weight.detach()[shared].T, v.weight.detach()[shared].T, o, scaling)


def tokens(model: Any, family: str) -> Tensor:
    """Return what each token puts into the residual stream, without position."""
    rows = model.get_input_embeddings().weight.detach()
    return rows * families.WIDTH**0.5 if family.startswith("gemma") else rows


def directions(model: Any, family: str) -> Tensor:
    """Return what each token's logit reads: the final norm's gain and centring, less the vocabulary's mean."""
    final = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm", "opt": "model.decoder.final_layer_norm"}
    last = norm(model.get_submodule(final.get(family, "model.norm")), family)
    rows = model.get_output_embeddings().weight.detach() * last.gain
    rows = rows - rows.mean(1, keepdim=True) if last.centred else rows
    return rows - rows.mean(0)


def dense_ov(model: Any, family: str, layer: int, index: int, *, raw: bool = False) -> Tensor:
    """Return the vocabulary × vocabulary OV circuit: (source, target)."""
    one = head(model, family, layer, index)
    read = tokens(model, family)
    return (read if raw else one.norm.standard(read)) @ one.ov @ directions(model, family).T
