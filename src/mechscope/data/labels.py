"""Texts of which something is known: attributes of a whole text, and tokens that stand for a concept. Scores of what latents stand for rest on them.

newsroom    the kind of event, and whether its day is a weekday or a date; the tokens of its five facts
files       every column of few values; which file a text is of (`source`)
both        the first letter of every token of at least two letters
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mechscope.data.newsroom import ROLES, Article, Role, split_articles
from mechscope.data.newsroom.vocabulary import WEEKDAYS
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.data.pieces import Pieces
from mechscope.data.sources import file_rows
from mechscope.data.text_files import text_pair
from mechscope.errors import DataError
from mechscope.shapes import by_shape
from mechscope.store.hashing import hash_json
from mechscope.subject.spelling import Spelling

NEWSROOM = "newsroom"
_COLUMNS = ("text", "document")
# values of an attribute at most: more of them are names, not classes
_VALUES = 20


@dataclass(frozen=True)
class Labelled:
    """Texts and what is known of them.

    Attributes:
        texts: The texts.
        attributes: By name, the value of each text.
        tokens: By concept, the tokens of each text that stand for it, counted from its first.
    """

    texts: Pairs
    attributes: Mapping[str, tuple[str, ...]]
    tokens: Mapping[str, tuple[tuple[int, ...], ...]]

    __repr__ = by_shape

    @property
    def hash(self) -> str:
        """Of texts and labels."""
        return hash_json([self.texts.hash, dict(self.attributes), dict(self.tokens)])


def read_labelled(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int,
    max_tokens: int,
    seed: int = 0,
    columns: Sequence[str] | None = None,
) -> Labelled:
    """Read labelled texts.

    Args:
        source: `newsroom`, or files (JSONL, JSON, CSV, Parquet) joined by commas, with a column `text` or `document`.
        tokenizer: Any Hugging Face tokenizer.
        limit: Texts at most; of several files as many of each.
        max_tokens: Longer texts are cut.
        seed: Of the newsroom's articles.
        columns: Of files the attributes that are read; None for every column of few values, each of several texts, and for which file a text is of.

    Raises:
        DataError: There is no text, nothing is known of them, or an attribute is known of some alone.
    """
    if source == NEWSROOM:
        articles = split_articles("test", limit=limit, seed=seed)
        labelled = labelled_articles(articles, tokenizer, max_tokens=max_tokens, source=f"{NEWSROOM}, seed {seed}")
    else:
        labelled = _files(source, tokenizer, limit, max_tokens, columns)
    known = {**labelled.tokens, **first_letters(labelled.texts, tokenizer)}
    return Labelled(labelled.texts, labelled.attributes, known)


def first_letters(texts: Pairs, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return the tokens of each text by the first letter of their word or piece; those of fewer than two letters are left out."""
    spelling = Spelling(tokenizer)
    letters = [[_letter(spelling.token(token)) for token in pair.clean] for pair in texts]
    every = sorted({letter for row in letters for letter in row if letter})
    return {
        f"first letter {letter}": tuple(tuple(at for at, found in enumerate(row) if found == letter) for row in letters) for letter in every
    }


def _letter(token: str) -> str:
    word = token.strip().lower()
    return word[0] if len(word) > 1 and word.isascii() and word.isalpha() else ""


def labelled_articles(articles: Sequence[Article], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, source: str) -> Labelled:
    """Return articles of the newsroom with their kind of event, whether their day is a weekday or a date, and the tokens of their facts.

    Args:
        articles: The articles.
        tokenizer: Any Hugging Face tokenizer.
        max_tokens: Longer articles are cut.
        source: Where they are from, for errors and manifests.
    """
    pieces = Pieces(tokenizer)
    texts = tuple(text_pair(article.document, tokenizer, max_tokens=max_tokens, name=article.id) for article in articles)
    attributes = {
        "kind": tuple(article.kind for article in articles),
        "day": tuple("weekday" if article.fact("when").text in WEEKDAYS else "date" for article in articles),
    }
    tokens = {
        f"fact {role}": tuple(_mentions(article, role, pieces, pair) for article, pair in zip(articles, texts, strict=True))
        for role in ROLES
    }
    return Labelled(Pairs(texts, source), attributes, tokens)


def _mentions(article: Article, role: Role, pieces: Pieces, pair: PromptPair) -> tuple[int, ...]:
    spans = pieces.token_spans(article.document, sorted(article.fact(role).document_spans), first=True)
    start = len(pieces.start_ids)
    return tuple(start + at for begin, end in spans for at in range(begin, end) if start + at < len(pair.clean))


@dataclass(frozen=True)
class _Known:
    """What a row of a file says of its text: its place, labels by column, and all columns that it has."""

    place: str
    labels: Mapping[str, str]
    columns: tuple[str, ...]

    def label(self, name: str) -> str:
        if name not in self.labels:
            raise DataError(
                f"{self.place} has no {name!r}, by which texts are told apart: it has {', '.join(self.columns)}; write one for every text, or for none where "
                "it is no label"
            )
        return self.labels[name]


def _files(source: str, tokenizer: PreTrainedTokenizerBase, limit: int, max_tokens: int, columns: Sequence[str] | None) -> Labelled:
    paths = [Path(name.strip()).expanduser() for name in source.split(",") if name.strip()]
    if columns is None and (twice := sorted(name for name, count in Counter(path.stem for path in paths).items() if count > 1)):
        raise DataError(f"{source}: two files are called {twice[0]}, by which their texts are told apart: name them differently")
    texts: list[PromptPair] = []
    found: list[_Known] = []
    for path in paths:
        of_file = {"source": path.stem} if len(paths) > 1 and columns is None else {}
        for row in list(file_rows(path))[: max(1, limit // len(paths))]:
            values = row.values or {}
            text = next((values[name] for name in _COLUMNS if isinstance(values.get(name), str) and values[name].strip()), None)
            if text is None:
                raise DataError(f"{path}, {row.place} has no text: labelled texts have a column {' or '.join(_COLUMNS)}")
            texts.append(text_pair(text, tokenizer, max_tokens=max_tokens, name=row.place))
            usable = {name: value for name, value in values.items() if (_is_label(name, value) if columns is None else name in columns)}
            labels = {name: str(value) for name, value in usable.items() if value not in (None, "")}
            found.append(_Known(f"{path}, {row.place}", {**labels, **of_file}, tuple(values)))
    names = _classes(each.labels for each in found) if columns is None else columns
    attributes = {name: tuple(each.label(name) for each in found) for name in names}
    if not attributes:
        raise DataError(f"nothing is known of the texts of {source}: give a column of few values, or several files to tell apart")
    return Labelled(Pairs(tuple(texts), source), attributes, {})


def _is_label(name: str, value: Any) -> bool:
    return name not in _COLUMNS and isinstance(value, str | bool | int)


def _classes(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the columns that hold classes: a few values, each of several texts."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        for name, value in row.items():
            counts.setdefault(name, Counter())[value] += 1
    return [name for name, values in counts.items() if 1 < len(values) <= _VALUES and min(values.values()) > 1]
