"""Tokens as text, each decoded alone and once: as its tokenizer writes it, or as `#123` where there is no tokenizer or it has no text for the token.

Models have more rows in their embedding than their tokenizer has tokens, so a token that is read off the logits need not have a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class Spelling:
    """A tokenizer's tokens as text."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a Hugging Face tokenizer; None for a model without one."""
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def token(self, token: int) -> str:
        """Write one token."""
        if token not in self._known:
            self._known[token] = ("" if self._tokenizer is None else str(self._tokenizer.decode([token]))) or f"#{token}"
        return self._known[token]

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Write tokens one by one."""
        return [self.token(token) for token in ids]

    def text(self, ids: Sequence[int]) -> str:
        """Write tokens together, as the text they stand for: a letter may be spread over several; apart by spaces without a tokenizer."""
        return " ".join(self.tokens(ids)) if self._tokenizer is None else str(self._tokenizer.decode(list(ids)))
