"""Real models and real documents, where `../shared` is beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

import mechscope
from mechscope.data.documents import load_documents


def perturbed(model: GPT2LMHeadModel, layer: int) -> GPT2LMHeadModel:
    """Change the attention of one layer by a tenth of its weights' size."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".h.{layer}.attn." in name and parameter.ndim == 2:
                parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", ["gpt2-news-7m", "TinyStories-656K"])
def test_every_check_passes_on_a_real_model(shared: Path, name: str) -> None:
    assert all(check.passed for check in mechscope.check_subject(mechscope.load(shared / "models" / name)))


def test_a_change_of_one_layer_of_a_real_model_is_found_there(shared: Path) -> None:
    source = shared / "models" / "gpt2-news-7m"
    tuned = mechscope.load(source)
    perturbed(tuned.model, 3)
    data = str(shared / "data" / "summarization" / "cnn_dailymail.test.jsonl")
    result = mechscope.diff(mechscope.load(source), tuned, data, documents=4, max_tokens=256, noise_draws=0)
    layers = result.layers[result.layers["rows"] == "all"].set_index("layer")
    assert layers["kl_base_tuned"].idxmax() == 3
    assert layers.loc[3, "weight_change"] == pytest.approx(0.1, abs=0.07)
    assert (layers.loc[[0, 1, 2], ["kl_base_tuned", "cosine_distance", "weight_change"]] == 0).all().all()


@pytest.mark.slow
def test_gpt2_small_shape_on_twenty_articles_of_up_to_1024_tokens(shared: Path) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    torch.manual_seed(0)
    base, tuned = GPT2LMHeadModel(GPT2Config()).eval(), GPT2LMHeadModel(GPT2Config()).eval()
    tuned.load_state_dict(base.state_dict())
    corpus = load_documents(shared / "data" / "summarization" / "cnn_dailymail.test.jsonl", limit=20)
    result = mechscope.diff(base, perturbed(tuned, 5), corpus, tokenizer=tokenizer, max_tokens=1024, tokens_per_batch=4096)
    heads = result.heads[result.heads["rows"] == "all"]
    assert len(heads) == 144
    assert (heads["n"] == 20).all()
    assert heads.groupby("layer")["kl_base_tuned"].mean().idxmax() == 5
    # random weights attend almost evenly: the relative entropy of every head is close to one
    assert (heads["relative_entropy_base"] > 0.95).all()
