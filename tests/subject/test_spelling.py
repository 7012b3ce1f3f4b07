"""A token is written as its tokenizer writes it alone, or as its number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mechscope.subject.spelling import Spelling
from tests import families


class Counting:
    """A tokenizer of bytes that counts how often it decodes."""

    def __init__(self) -> None:
        self.calls = 0

    def decode(self, ids: list[int]) -> str:
        self.calls += 1
        return bytes(ids).decode(errors="replace")


def spelling_of(tokenizer: Any) -> Spelling:
    return replace(families.subject("gpt2"), tokenizer=tokenizer).spelling


def test_a_token_is_written_as_its_tokenizer_writes_it_alone() -> None:
    assert spelling_of(families.tokenizer()).tokens([7, 5, 7]) == ["w7", "w5", "w7"]


def test_a_token_without_a_text_is_a_number() -> None:
    spelling = spelling_of(families.tokenizer(90))
    assert spelling.token(93) == "#93", "a row of the embedding that no token has"


def test_without_a_tokenizer_every_token_is_a_number() -> None:
    spelling = spelling_of(None)
    assert spelling.tokens([7, 93]) == ["#7", "#93"]
    assert spelling.text([7, 93]) == "#7 #93"
    assert spelling.text([]) == ""


def test_a_letter_that_is_spread_over_tokens_is_whole_in_a_text_only() -> None:
    spelling, ids = Spelling(Counting()), list("é!".encode())
    assert spelling.tokens(ids) == ["�", "�", "!"]
    assert spelling.text(ids) == "é!"


def test_a_token_is_decoded_once() -> None:
    tokenizer = Counting()
    spelling = Spelling(tokenizer)
    assert spelling.tokens([65, 65, 66]) == ["A", "A", "B"]
    spelling.token(66)
    assert tokenizer.calls == 2
