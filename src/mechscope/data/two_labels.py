"""Texts with two labels: one that is to be told, and one that must not matter; and their split into a biased training set and balanced ones.

In the training set the two labels always agree, so that a classifier can use either; elsewhere the four combinations (groups) are equally frequent, and the
worst of them says which it used (Sagawa et al. 2020; Marks et al. 2024, §4). The newsroom's own: is the news dated by a weekday or by a date (intended), and
is it of one kind or another, a vote or an opening (unintended, and far easier to tell).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from transformers import PreTrainedTokenizerBase

from mechscope.data.labels import NEWSROOM, labelled_articles, read_labelled
from mechscope.data.newsroom import Article, generate
from mechscope.data.pairs import Pairs
from mechscope.errors import DataError

KINDS = ("vote", "opening")
GROUPS = ((False, False), (False, True), (True, False), (True, True))
"""The four combinations of intended and unintended label."""
_LABELS = ("intended", "unintended")
# articles that are generated at once
_CHUNK = 200


@dataclass(frozen=True)
class TwoLabels:
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

    def rows(self, at: Sequence[int] | np.ndarray) -> TwoLabels:
        """Return some of the texts."""
        at = np.asarray(at, dtype=int)
        return TwoLabels(replace(self.texts, pairs=tuple(self.texts.pairs[row] for row in at)), self.intended[at], self.unintended[at])

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

    train: TwoLabels
    development: TwoLabels
    test: TwoLabels


def newsroom_two_labels(number: int, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, seed: int = 0) -> TwoLabels:
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
    labelled = labelled_articles(articles[:number], tokenizer, max_tokens=max_tokens, source=NEWSROOM)
    day, kind = (np.array(labelled.attributes[name]) for name in ("day", "kind"))
    return TwoLabels(labelled.texts, day == "weekday", kind == KINDS[0])


def read_two_labels(source: str, tokenizer: PreTrainedTokenizerBase, *, limit: int, max_tokens: int) -> TwoLabels:
    """Read files with the columns `text`, `intended` and `unintended`, the labels each of two values.

    Args:
        source: As of `read_labelled`.
        tokenizer: The model's.
        limit: Texts at most.
        max_tokens: Longer texts are cut.

    Raises:
        DataError: A row lacks a column, or a label has not two values; the message names it.
    """
    labelled = read_labelled(source, tokenizer, limit=limit, max_tokens=max_tokens, columns=_LABELS)
    flags = []
    for name in _LABELS:
        values = labelled.attributes[name]
        seen = sorted(set(values))
        if len(seen) != 2:
            raise DataError(f"{source}: label {name!r} has {len(seen)} values ({', '.join(seen[:4])}): two are needed")
        flags.append(np.array(values) == seen[1])
    return TwoLabels(labelled.texts, *flags)


def biased_split(labelled: TwoLabels, *, test_share: float = 0.5, seed: int = 0) -> BiasedSplit:
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
