"""Texts with two labels: one that is to be told, and one that must not matter; and their split into a biased training set and balanced ones.

In the training set the two labels always agree, so that a classifier can use either; elsewhere the four combinations (groups) are equally frequent, and the
worst of them says which it used (Sagawa et al. 2020; Marks et al. 2024, §4). The newsroom's own: is the news dated by a weekday or by a date (intended), and
is it of one kind or another, a vote or an opening (unintended, and far easier to tell).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from mechscope.data.newsroom import Article, generate
from mechscope.data.newsroom.vocabulary import WEEKDAYS
from mechscope.data.pairs import Pairs
from mechscope.data.sources import file_rows
from mechscope.data.text_files import text_pair
from mechscope.errors import DataError

KINDS = ("vote", "opening")
GROUPS = ((False, False), (False, True), (True, False), (True, True))
"""The four combinations of intended and unintended label."""
# articles that are generated at once
_CHUNK = 200


@dataclass(frozen=True)
class Labelled:
    """Texts with two labels.

    Attributes:
        texts: The texts.
        intended: ``(text)``: whether the label that is to be told is positive.
        unintended: ``(text)``: the same of the one that must not matter.
    """

    texts: Pairs
    intended: np.ndarray
    unintended: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, at: Sequence[int] | np.ndarray) -> Labelled:
        """Return some of the texts."""
        at = np.asarray(at, dtype=int)
        return Labelled(replace(self.texts, pairs=tuple(self.texts.pairs[row] for row in at)), self.intended[at], self.unintended[at])

    def group(self, number: int) -> np.ndarray:
        """Return which texts belong to one of `GROUPS`."""
        return (self.intended == GROUPS[number][0]) & (self.unintended == GROUPS[number][1])


@dataclass(frozen=True)
class BiasedSplit:
    """Texts to train on, whose labels agree, and balanced ones.

    Attributes:
        train: Both labels are equal.
        development: All groups equally often: to find out what is unintended, and for what stands beside it.
        test: The same; nothing is learned from it.
    """

    train: Labelled
    development: Labelled
    test: Labelled


def newsroom_labelled(number: int, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, seed: int = 0) -> Labelled:
    """Generate articles of two kinds, dated by a weekday (intended) or a date, of one kind (unintended) or the other.

    Args:
        number: How many.
        tokenizer: The model's.
        max_tokens: Longer articles are cut.
        seed: At least 0.
    """
    articles: list[Article] = []
    # far from the seeds of the corpus's splits
    for chunk in count(10**6 * (seed + 1)):
        articles += [each for each in generate(_CHUNK, chunk) if each.kind in KINDS]
        if len(articles) >= number:
            break
    del articles[number:]
    texts = tuple(text_pair(each.document, tokenizer, max_tokens=max_tokens, name=each.id) for each in articles)
    intended = np.array([each.fact("when").text in WEEKDAYS for each in articles])
    return Labelled(Pairs(texts, "newsroom"), intended, np.array([each.kind == KINDS[0] for each in articles]))


def read_labelled(source: str, tokenizer: PreTrainedTokenizerBase, *, limit: int, max_tokens: int) -> Labelled:
    """Read a JSONL, JSON, CSV or Parquet file with the columns `text`, `intended` and `unintended`, the labels each of two values.

    Raises:
        DataError: A row lacks a column, or a label has not two values; the message names it.
    """
    texts, labels = [], []
    for row in list(file_rows(Path(source).expanduser()))[:limit]:
        values = row.values or {}
        if missing := [name for name in ("text", "intended", "unintended") if values.get(name) in (None, "")]:
            raise DataError(f"{source}, {row.place} has no {missing[0]}: write the columns text, intended and unintended")
        texts.append(text_pair(str(values["text"]), tokenizer, max_tokens=max_tokens, name=row.place))
        labels.append((str(values["intended"]), str(values["unintended"])))
    found = []
    for at, name in enumerate(("intended", "unintended")):
        seen = sorted({label[at] for label in labels})
        if len(seen) != 2:
            raise DataError(f"{source}: label {name!r} has {len(seen)} values ({', '.join(seen[:4])}): two are needed")
        found.append(np.array([label[at] == seen[1] for label in labels]))
    return Labelled(Pairs(tuple(texts), source), found[0], found[1])


def biased_split(labelled: Labelled, *, test_share: float = 0.5, seed: int = 0) -> BiasedSplit:
    """Split labelled texts.

    Args:
        labelled: The texts.
        test_share: Share of the smallest group that is tested on; as much of the other groups. Half of the rest is for development.
        seed: Of the choice.

    Raises:
        DataError: A group is too small for that.
    """
    random = np.random.default_rng(seed)
    cells = [random.permutation(np.flatnonzero(labelled.group(number))) for number in range(len(GROUPS))]
    fewest = min(map(len, cells))
    test = round(test_share * fewest)
    develop = (fewest - test) // 2
    train = [cells[number][test + develop :] for number, (one, two) in enumerate(GROUPS) if one == two]
    if min(test, develop, *map(len, train)) < 2:
        raise DataError(
            f"{labelled.texts.source}: the smallest of the four groups of labels has {fewest} texts: at least 8 are needed to train, find out and test"
        )
    return BiasedSplit(
        labelled.rows(np.concatenate(train)),
        labelled.rows(np.concatenate([cell[test : test + develop] for cell in cells])),
        labelled.rows(np.concatenate([cell[:test] for cell in cells])),
    )
