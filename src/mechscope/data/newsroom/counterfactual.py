"""The same article with one fact changed.

Attribution by patching wants two inputs that differ in one thing and line up token by token. `counterfactual` swaps one fact, at every
mention in article and summary, for another of its type whose mentions have the same number of tokens. What counts as the same is decided by
the tokenizer at hand, in the text alone and inside the prompt: everything outside the fact's spans must be the same tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from mechscope.data.newsroom.articles import Article, Fact, Role, Span
from mechscope.data.newsroom.events import EVENTS
from mechscope.data.newsroom.shipped import newsroom_tokenizer
from mechscope.data.newsroom.vocabulary import COUNTS, DATES, FIRST_NAMES, LAST_NAMES, PLACES, WEEKDAYS
from mechscope.data.pieces import Pieces
from mechscope.errors import DataError


def counterfactual(article: Article, role: Role, seed: int, tokenizer: PreTrainedTokenizerBase | None = None) -> Article:
    """Swap one fact everywhere for another of its type, token by token in line with the original.

    Args:
        article: a generated article.
        role: which fact to swap.
        seed: of the choice among the values that fit.
        tokenizer: must give offsets; the shipped model's where none is given, for which a value always fits.

    Returns:
        The article with the other fact; its id ends in the role.

    Raises:
        DataError: no other value of this type lines up under the tokenizer, or the tokenizer gives no offsets.
    """
    pieces = Pieces(tokenizer or newsroom_tokenizer())
    fact = article.fact(role)
    candidates = _alternatives(article, fact)
    random.Random(f"{seed}/{article.id}/{role}").shuffle(candidates)
    before = _Outline(article, fact, pieces)
    mentioned = set(re.findall(r"\w+", article.document))
    for value in candidates:
        if _mentioned(value, article, mentioned):
            continue
        swapped = _swap(article, fact, value)
        if _Outline(swapped, swapped.fact(role), pieces).tokens == before.tokens:
            return swapped
    raise DataError(
        f"{article.id}: none of {len(candidates)} other values for {role} has as many tokens as {fact.text!r} under "
        f"{type(pieces.tokenizer).__name__} at every mention: swap another fact, or use the shipped tokenizer"
    )


class _Outline:
    """The tokens of an article and summary with a fact's own tokens blanked out: equal outlines line up."""

    def __init__(self, article: Article, fact: Fact, pieces: Pieces) -> None:
        self.tokens = []
        for text, spans in ((article.document, fact.document_spans), (article.summary, fact.summary_spans)):
            self.tokens.append(self._blank(text, spans, pieces, first=True))
            # as in a prompt, where a space comes before the text
            self.tokens.append(self._blank(" " + text, [(begin + 1, end + 1) for begin, end in spans], pieces, first=False))

    @staticmethod
    def _blank(text: str, spans: tuple[Span, ...] | list[Span], pieces: Pieces, *, first: bool) -> list[int]:
        ids = pieces.ids([text], first=first)[0]
        for begin, end in pieces.token_spans(text, spans, first=first):
            ids[begin:end] = [-1] * (end - begin)
        return ids


@lru_cache(maxsize=1)
def _people() -> frozenset[str]:
    return frozenset(f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES)


def _alternatives(article: Article, fact: Fact) -> list[str]:
    values: dict[Role, Sequence[str]] = {
        "who": sorted(_people()),
        "what": next(event.whats for event in EVENTS if event.kind == article.kind),
        "where": PLACES,
        "when": WEEKDAYS if fact.text in WEEKDAYS else DATES,
        "count": COUNTS,
    }
    return [value for value in values[fact.role] if value != fact.text]


def _mentioned(value: str, article: Article, words: set[str]) -> bool:
    """Tell whether a value (of a person, either name) stands in the article already: a swap for it would not be one change."""
    if " " not in value:
        return value in words
    if value in _people():
        return not words.isdisjoint(value.split())
    return re.search(rf"\b{value}\b", article.document) is not None


def _form(value: str, mention: str, fact: Fact) -> str:
    """Write a value as a mention writes the fact: in full, or the surname alone."""
    return value if mention == fact.text else value.split()[-1]


def _swap(article: Article, fact: Fact, value: str) -> Article:
    document, document_moves = _replace(article.document, fact.document_spans, fact, value)
    summary, summary_moves = _replace(article.summary, fact.summary_spans, fact, value)
    facts = tuple(
        replace(
            old,
            text=value if old.role == fact.role else old.text,
            document_spans=_moved(old.document_spans, document_moves),
            summary_spans=_moved(old.summary_spans, summary_moves),
        )
        for old in article.facts
    )
    return replace(article, id=f"{article.id}-{fact.role}", document=document, summary=summary, facts=facts)


def _replace(text: str, spans: tuple[Span, ...], fact: Fact, value: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the new text, and by how much it grew after each old end of a span."""
    moves = []
    parts = []
    at = 0
    for begin, end in sorted(spans):
        new = _form(value, text[begin:end], fact)
        parts += [text[at:begin], new]
        moves.append((end, len(new) - (end - begin)))
        at = end
    return "".join([*parts, text[at:]]), moves


def _moved(spans: tuple[Span, ...], moves: list[tuple[int, int]]) -> tuple[Span, ...]:
    return tuple(
        (begin + sum(by for end, by in moves if end <= begin), stop + sum(by for end, by in moves if end <= stop)) for begin, stop in spans
    )
