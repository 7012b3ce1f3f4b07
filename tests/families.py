"""Tiny random models of every supported family.

Small enough to run in milliseconds, large enough to tell heads, layers and grouped keys apart: weights, biases and norm gains are all random, so
patterns are far from uniform and nothing is accidentally zero or one. Sliding windows are shorter than the tests' texts, and head widths differ
from d_model / n_heads where the family allows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from mechscope.subject.load import Subject, load

VOCABULARY = 97
LAYERS = 3
HEADS = 4
WIDTH = 32
POSITIONS = 64
WINDOW = 5

# names that most families share
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}

FAMILIES = ("gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3")
# mixtures of experts, without neurons of their own
MIXTURES = ("gpt_oss",)
WINDOWED = frozenset({"mistral", "gemma2", "gemma3", "gpt_oss"})
SOFTCAPPED = frozenset({"gemma2"})


def config(family: str, **changes: Any) -> Any:
    """Return a tiny configuration of a family, with changes applied."""
    match family:
        case "gpt2":
            sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": POSITIONS, "vocab_size": VOCABULARY}
            return GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes})
        case "gpt_neox":
            return GPTNeoXConfig(**{**_COMMON, "rotary_pct": 0.5, **changes})
        case "opt":
            sizes = {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}
            return OPTConfig(**{**_COMMON, **sizes, **changes})
        case "llama":
            return LlamaConfig(**{**_GROUPED, **changes})
        case "mistral":
            return MistralConfig(**{**_GROUPED, "head_dim": 16, "sliding_window": WINDOW, **changes})
        case "gpt_oss":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
            rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
            layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
            mixture = GptOssConfig(
                **{
                    **_GROUPED,
                    **experts,
                    "head_dim": 16,
                    "sliding_window": WINDOW,
                    "rope_parameters": rotary,
                    "layer_types": layer_types,
                    **changes,
                }
            )
            mixture._experts_implementation = "eager"  # the grouped kernel knows no float64
            return mixture
        case "qwen2":
            return Qwen2Config(**{**_GROUPED, **changes})
        case "qwen3":
            return Qwen3Config(**{**_GROUPED, "head_dim": 16, **changes})
        case "gemma2":
            special = {"head_dim": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 12}
            return Gemma2Config(**{**_GROUPED, **special, **changes})
        case "gemma3":
            special = {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 12}
            layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
            return Gemma3TextConfig(**{**_GROUPED, **special, "layer_types": layer_types, **changes})
        case "phi":
            return PhiConfig(**{**_COMMON, "partial_rotary_factor": 0.5, **changes})
        case "phi3":
            return Phi3Config(**{**_GROUPED, **changes})
    raise ValueError(f"no tiny configuration for {family!r}")


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """Build a tiny random model of a family in evaluation mode; equal seeds give equal weights in every dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # experts and sinks start at random
        model = AutoModelForCausalLM.from_config(config(family, **changes), dtype=torch.float32)
    randomize(model, seed)
    return model.to(dtype).eval()


@lru_cache(maxsize=64)
def subject(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Subject:
    """Return a tiny subject, made once: tests that use it leave it as it was."""
    return load(build(family, dtype, seed))


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value of a size that keeps activations near one and patterns far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # maps keep the size of what they read; embeddings, biases and gains vary by a third around their first values
        fan_in = min(parameter.shape) if parameter.ndim == 2 else 1
        parameter.copy_(noise * 1.5 / fan_in**0.5 if parameter.ndim == 2 else parameter + 0.3 * noise)


def tokenizer(words: int = VOCABULARY) -> Any:
    """Return a tokenizer of single words: `<pad>`, `<s>`, `</s>`, then `w3`, `w4`, …."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, words)}}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@dataclass(frozen=True)
class Texts:
    """Three documents of different length as one batch, padded in one of three ways.

    Attributes:
        ids: ``(batch, token)``.
        real: ``(batch, token)``, True where a token is real.
    """

    ids: Tensor
    real: Tensor

    def rows(self, value: Tensor, document: int) -> Tensor:
        """Cut one document's real tokens out of ``(batch, token, …)``."""
        return value[document][self.real[document].to(value.device)]


LENGTHS = (14, 9, 11)


def documents(vocabulary: int = VOCABULARY, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Return random documents, ``(token,)`` each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]


def padded(texts: list[Tensor], side: str) -> Texts:
    """Pad documents into one batch on the `left` or the `right`; `none` takes the first document alone."""
    if side == "none":
        return Texts(texts[0][None], torch.ones(1, len(texts[0]), dtype=torch.bool))
    length = max(map(len, texts))
    ids = torch.zeros(len(texts), length, dtype=torch.int64)
    real = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        place = slice(length - len(text), None) if side == "left" else slice(0, len(text))
        ids[row, place] = text
        real[row, place] = True
    return Texts(ids, real)
