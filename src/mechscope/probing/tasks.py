"""What a probe is to tell: rows of texts with the class of each, and the same rows with labels that mean nothing.

documents   one row per text, the mean over its tokens or its last token, with an attribute of the text
tokens      one row per token but a text's first, where models keep a state of another kind; the concept that a token stands for, or none

Labels that mean nothing are the control. Shuffled ones are those of another text, with their runs and up to the lengths of texts their frequencies, and no
tie to what is in it: what a probe makes of them is what it learns by heart and does not generalise. A control task (Hewitt and Liang 2019) draws one class for
each kind of token, so that a probe that can learn tokens by heart tells it: what it tells beyond that (selectivity) is not the token's identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from mechscope.data.labels import Labelled
from mechscope.data.pairs import Pairs
from mechscope.errors import DataError
from mechscope.shapes import by_shape
from mechscope.stats.inference import MIN_TEXTS

Reading = Literal["last", "mean", "tokens"]
LABELS, SHUFFLED, CONTROL = "labels", "shuffled labels", "control task"
NONE = "none"


@dataclass(frozen=True)
class Task:
    """Rows of texts, and the class of each.

    Attributes:
        name: What is told: the column, or the concept.
        texts: The texts.
        classes: Names of the classes.
        reading: What stands for a text: its last token, the mean over its tokens, or every token but the first.
        labels: ``(row,)`` of each text: its class.
    """

    name: str
    texts: Pairs
    classes: tuple[str, ...]
    reading: Reading
    labels: tuple[Int[np.ndarray, " row"], ...]

    __repr__ = by_shape

    def check(self, folds: int) -> None:
        """Refuse labels of which nothing could be told.

        Raises:
            DataError: There is one class only, or a class stands in too few texts to be learned from and judged.
        """
        if len(self.classes) < 2:
            given = f"only {self.classes[0]!r}" if self.classes else "no class"
            raise DataError(f"{self.name!r} of {self.texts.source} holds {given}: a probe tells two classes or more apart")
        fewest = max(folds, MIN_TEXTS)
        for number, name in enumerate(self.classes):
            count = len({pair.clean for pair, own in zip(self.texts, self.labels, strict=True) if (own == number).any()})
            if count < fewest:
                raise DataError(
                    f"class {name!r} of {self.name!r} stands in {count} different texts of {self.texts.source}, {folds} folds need at least {fewest}: "
                    "give more texts, or leave such texts out"
                )

    def labelings(self, *, shuffles: int, seed: int) -> list[tuple[str, tuple[Int[np.ndarray, " row"], ...]]]:
        """Return the labels, and labels that mean nothing: shuffled among the texts, and by kind of token where rows are tokens.

        Args:
            shuffles: How many times labels are shuffled.
            seed: Of what is drawn; the same rows get the same labels in every model.
        """
        random = np.random.default_rng([seed, len(self.labels)])
        made = [(LABELS, self.labels)]
        made += [(SHUFFLED, self._shuffled(random)) for _ in range(shuffles)]
        if self.reading == "tokens":
            every = np.concatenate(self.labels)
            shares = np.bincount(every, minlength=len(self.classes)) / len(every)
            kinds = np.unique(np.concatenate([pair.clean for pair in self.texts]))
            drawn = dict(zip(kinds.tolist(), random.choice(len(shares), p=shares, size=len(kinds)), strict=True))
            made.append((CONTROL, tuple(np.array([drawn[token] for token in pair.clean[1:]], dtype=np.int64) for pair in self.texts)))
        return made

    def _shuffled(self, random: np.random.Generator) -> tuple[Int[np.ndarray, " row"], ...]:
        """Return the labels of texts in random order: each takes another's, from a random row on, and over again where it is the longer one.

        Tokens of one text are of one class more often than those of several. Shuffled one by one, labels that mean nothing would vary less than labels do.
        """
        classes = range(len(self.classes))
        standing = [sum(bool((own == each).any()) for own in self.labels) for each in classes]
        while True:
            donors = [np.roll(each := self.labels[at], random.integers(len(each))) for at in random.permutation(len(self.labels))]
            made = tuple(np.resize(donor, len(own)) for donor, own in zip(donors, self.labels, strict=True))
            # shorter texts may lose a rare class, without which there would be nothing to learn
            if all(2 * sum(bool((own == each).any()) for own in made) >= standing[each] for each in classes):
                return made


def document_task(labelled: Labelled, name: str, *, reading: Literal["last", "mean"] = "mean") -> Task:
    """Return the task of telling an attribute of whole texts.

    Args:
        labelled: The texts.
        name: The attribute.
        reading: What stands for a text.

    Raises:
        DataError: The texts have no such attribute.
    """
    if name not in labelled.attributes:
        raise DataError(f"nothing is known of the texts of {labelled.texts.source} as {name!r}: {_known(labelled)}")
    values = labelled.attributes[name]
    classes = tuple(sorted(set(values)))
    labels = tuple(np.array([classes.index(value)]) for value in values)
    return Task(name, labelled.texts, classes, reading, labels)


def token_task(labelled: Labelled, name: str) -> Task:
    """Return the task of telling what tokens stand for: `fact` tells `fact who`, `fact what`, … and tokens of none of these apart.

    A token that stands for several is of the first. Texts of a single token have no row and are left out.

    Args:
        labelled: The texts.
        name: What the concepts' names begin with, or one concept.

    Raises:
        DataError: No token stands for such a concept.
    """
    concepts = [each for each in labelled.tokens if each == name or each.startswith(f"{name} ")]
    if not concepts:
        raise DataError(f"no token of {labelled.texts.source} stands for {name!r}: {_known(labelled)}")
    kept = [at for at, pair in enumerate(labelled.texts) if len(pair.clean) > 1]
    pairs, labels = [labelled.texts.pairs[at] for at in kept], []
    for at in kept:
        own = np.zeros(len(labelled.texts.pairs[at].clean), dtype=np.int64)
        for number, concept in reversed(list(enumerate(concepts, start=1))):
            own[list(labelled.tokens[concept][at])] = number
        labels.append(own[1:])
    classes = (NONE, *(each.removeprefix(f"{name} ") for each in concepts))
    return Task(name, Pairs(tuple(pairs), labelled.texts.source), classes, "tokens", tuple(labels))


def task_of(labelled: Labelled, name: str, *, reading: Literal["last", "mean"] = "mean") -> Task:
    """Return the task of telling an attribute of texts, or where they have none of that name, a concept of tokens; `DataError` where there is neither."""
    if name not in labelled.attributes and any(each == name or each.startswith(f"{name} ") for each in labelled.tokens):
        return token_task(labelled, name)
    return document_task(labelled, name, reading=reading)


def _known(labelled: Labelled) -> str:
    concepts = dict.fromkeys(each.rpartition(" ")[0] or each for each in labelled.tokens)
    return f"known are {_listed(list(labelled.attributes))} of texts and {_listed(list(concepts))} of tokens"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"
