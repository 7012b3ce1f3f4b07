"""Tiny models and adapters on disk, as people save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mechscope.subject.load import Subject, load
from tests import families

LORA: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn", "mlp.c_fc"], "fan_in_fan_out": True},
    "llama": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
    "gpt_neox": {"target_modules": ["query_key_value"]},
}
IDS = families.documents()[0][None]


def save(folder: Path, family: str = "gpt2", seed: int = 0, **changes: Any) -> Path:
    """Write a tiny model with its tokenizer, as `save_pretrained` does."""
    families.build(family, seed=seed, **changes).save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def save_adapter(folder: Path, base: Path, family: str, **changes: Any) -> Path:
    """Write a LoRA adapter with random matrices on a saved base."""
    model = load(base).model
    adapter = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **{**LORA[family], **changes}))
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    adapter.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(subject: Subject) -> Tensor:
    with subject.active():
        return subject.model(input_ids=IDS).logits


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])
