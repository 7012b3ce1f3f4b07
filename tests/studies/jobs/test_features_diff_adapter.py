"""`mechscope features diff` finds what an adapter is known to write."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from mechscope import features
from mechscope.data.prompt import Encoded
from mechscope.studies.jobs.features_diff import JOB
from mechscope.studies.runner import run_job
from mechscope.subject.load import load
from tests import families
from tests.difference.oracle import examples


def test_what_a_planted_adapter_writes_is_the_one_new_latent(tmp_path: Path) -> None:
    """An adapter of rank one on the embedding writes one direction on 24 of 597 kinds of tokens: more kinds than latents, so that it is one latent."""
    base = families.build("gpt2", vocab_size=600)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "c_proj" in name:
                parameter.mul_(0.05)  # what the adapter writes is to arrive behind the first block as it is
    kinds = np.random.default_rng(0).choice(np.arange(3, 600), 24, replace=False)
    direction = torch.nn.functional.normalize(torch.randn(families.WIDTH, generator=torch.Generator().manual_seed(3)), dim=0)
    tuned = get_peft_model(copy.deepcopy(base), LoraConfig(r=1, lora_alpha=1, target_modules=["wte"])).eval()
    embedding = tuned.get_submodule("base_model.model.transformer.wte")
    with torch.no_grad():
        embedding.lora_embedding_A["default"].zero_()[0, kinds] = 1
        length = base.get_input_embeddings().weight.norm(dim=1).square().mean().sqrt()
        embedding.lora_embedding_B["default"][:, 0] = 3 * length * direction
    loaded = {
        "base": load(base, tokenizer=families.tokenizer(600)),
        "tuned": load(tuned, tokenizer=families.tokenizer(600)),
        "data": Encoded(examples(lengths=[40] * 400, vocabulary=600), {}),
    }
    sizes: dict[str, Any] = {"latents": 96, "k": 4, "steps": 700, "batch": 256, "learning_rate": 1e-2}
    others: dict[str, Any] = {"own_controls": "none", "difference": False, "causal_documents": 4, "random_draws": 2}
    settings = JOB.resolve(base="base", tuned="tuned", data="in memory", places="resid0", **sizes, **others)
    result = run_job(JOB, settings, tmp_path / "run", given=loaded)
    (new,) = result.feature_latents.query("judged == 'new'").to_dict("records")
    assert new["density"] == pytest.approx(24 / 597, rel=0.1)
    learned = features.Dictionary.load(tmp_path / "run" / "dictionaries" / "crosscoder.safetensors")
    written = learned.tensors["decoder.0"][int(new["component"].split(".f")[1]), families.WIDTH :]
    assert torch.nn.functional.normalize(written, dim=0) @ direction > 0.95
