"""A model small enough to run whole studies on, with the shipped tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from mechscope.data.newsroom import newsroom_model_path
from mechscope.report import page
from mechscope.report.marks.figure import Figure

# what every test study is asked, as small as it can be and still go through every stage
TINY: dict[str, Any] = {
    "data": "newsroom",
    "train_documents": 24,
    "validation_documents": 6,
    "test_documents": 8,
    "max_tokens": 128,
    "learning_rate_full": 1e-3,
    "learning_rate_lora": 1e-2,
    "batch_size": 4,
    "max_steps": 4,
    "eval_every": 2,
    "seeds": 2,
    "rank": 2,
    "rouge_documents": 3,
    "max_new_tokens": 8,
    "replicates": 50,
}
# a whole study of it; the circuit has tests of its own
TINY_STUDY: dict[str, Any] = {**TINY, "circuit": False, "noise_draws": 2, "role_documents": 4, "lens_documents": 3}


@pytest.fixture(scope="module", autouse=True)
def _no_pixels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave figures as SVG, and those of whole studies undrawn: sixty of them take half of a small study, and are tested with the report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "png", lambda svg: b"\x89PNG")
        if request.path.parent == Path(__file__).parent:
            patch.setattr(Figure, "svg", lambda figure: "<svg></svg>")
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a four-layer GPT-2 with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(newsroom_model_path())
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=160,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
