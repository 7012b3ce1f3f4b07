"""Tokenizers of four kinds: the shipped one, GPT-2's, a SentencePiece-like one that sets a BOS token, and a slow one without offsets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase

from mechscope.data.newsroom import newsroom_tokenizer


class CharacterTokenizer(PreTrainedTokenizer):
    """A slow tokenizer (one token per byte), as old models have them: no offsets, no start token, and an end token."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(eos_token="<eos>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): code for code in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return b"".join(token.encode("latin-1") for token in tokens).decode(errors="replace")


@pytest.fixture(params=["newsroom", "gpt2", "tinystories", "slow"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == "newsroom":
        return newsroom_tokenizer()
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def slow() -> PreTrainedTokenizerBase:
    return CharacterTokenizer()


@pytest.fixture(scope="session")
def gpt2(shared: Path) -> PreTrainedTokenizerBase:
    folder = shared / "tokenizers" / "gpt2"
    return GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


@pytest.fixture(scope="session")
def tinystories(shared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared / "models" / "TinyStories-656K")


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[Sequence[object]], Path]:
    def write(rows: Sequence[object]) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
