"""The model that ships with mechscope, made by `python -m mechscope.data.newsroom.train`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def newsroom_model_path() -> Path:
    """Return the folder of the shipped model and tokenizer, to load with `from_pretrained` or `mechscope.load`."""
    return Path(__file__).parent / "model"


@lru_cache(maxsize=1)
def newsroom_tokenizer() -> PreTrainedTokenizerBase:
    """Return the shipped tokenizer (one instance per process: do not change it)."""
    return AutoTokenizer.from_pretrained(newsroom_model_path())
