"""A family's own modules by the names that Hugging Face gives them: the tests' view of neurons, independent of the package's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechscope.subject.load import Subject
from tests import families

LAYERNORM = ("gpt2", "gpt_neox", "opt", "phi")
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


# one of each kind of MLP, norm and block
KINDS = ("gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma2", "gemma3", "phi3")


def close(family: str) -> dict[str, Any]:
    # RMS norms compute in float32 whatever the type
    return {"rtol": 1e-9, "atol": 1e-9} if family in LAYERNORM else {"rtol": 1e-5, "atol": 1e-5}


class Named:
    """A family's own modules, reached by the names that Hugging Face gives them: the tests' view, independent of the package's."""

    def __init__(self, subject: Subject) -> None:
        self.model, self.family = subject.plain, subject.family
        inner: Any = self.model
        match self.family:
            case "gpt2":
                self.blocks, self.final, self.head = inner.transformer.h, inner.transformer.ln_f, inner.lm_head
            case "gpt_neox":
                self.blocks, self.final, self.head = inner.gpt_neox.layers, inner.gpt_neox.final_layer_norm, inner.lm_head
            case "opt":
                self.blocks, self.final = inner.model.decoder.layers, inner.model.decoder.final_layer_norm
                self.head = inner.lm_head
            case _:
                self.blocks, self.final, self.head = inner.model.layers, inner.model.norm, inner.lm_head

    def embedded(self) -> Tensor:
        """All tokens as they enter the residual stream, without position."""
        found = self.model.get_input_embeddings()(torch.arange(families.VOCABULARY))
        # gemma 3 scales inside its embedding, gemma 2 behind it
        return found * families.WIDTH**0.5 if self.family == "gemma2" else found

    def norm(self, layer: int) -> Any:
        block: Any = self.blocks[layer]
        match self.family:
            case "gpt2":
                return block.ln_2
            case "opt":
                return block.final_layer_norm
            case "gemma2" | "gemma3_text":
                return block.pre_feedforward_layernorm
            case _:
                return block.post_attention_layernorm

    def inputs(self, layer: int, x: Tensor) -> dict[str, Tensor]:
        """What goes into the activation, and what it is multiplied with."""
        block: Any = self.blocks[layer]
        match self.family:
            case "gpt2":
                return {"in": block.mlp.c_fc(x)}
            case "gpt_neox":
                return {"in": block.mlp.dense_h_to_4h(x)}
            case "opt":
                return {"in": block.fc1(x)}
            case "phi3":
                gate, up = block.mlp.gate_up_proj(x).chunk(2, dim=-1)
                return {"gate": gate, "in": up}
            case _:
                return {"gate": block.mlp.gate_proj(x), "in": block.mlp.up_proj(x)}

    def written(self, layer: int) -> Tensor:
        """``(neuron, d_model)``: what each neuron alone writes for an activation of 1, the scale of a norm behind it left out."""
        block: Any = self.blocks[layer]
        match self.family:
            case "gpt2":
                return block.mlp.c_proj.weight
            case "gpt_neox":
                return block.mlp.dense_4h_to_h.weight.T
            case "opt":
                return block.fc2.weight.T
            case "gemma2" | "gemma3_text":
                return block.mlp.down_proj.weight.T * (1 + block.post_feedforward_layernorm.weight)
            case _:
                return block.mlp.down_proj.weight.T

    def directions(self) -> Tensor:
        """``(token, d_model)``: what each token's logit reads, less the mean over tokens."""
        gain = 1 + self.final.weight if self.family.startswith("gemma") else self.final.weight
        read = self.head.weight * gain
        if self.family in LAYERNORM:
            read = read - read.mean(1, keepdim=True)
        return read - read.mean(0)
