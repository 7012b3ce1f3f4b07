"""What a technique is run on in the contract, and what its result is reduced to: arrays by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch

from mechscope.data.newsroom import ROLES
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.data.prompt import Encoded, Example
from mechscope.instrument import Execution
from mechscope.subject import Pair, Subject
from tests import families
from tests.devices import both

Result = dict[str, np.ndarray]

# three batches of two texts of these lengths, each but one padded; the last text is the first once more, in another batch
TOKENS = 24
LENGTHS = (9, 12, 7, 10, 11)
LEVEL = 9


@dataclass(frozen=True)
class Case:
    """What a technique is run on.

    Attributes:
        pair: Two models.
        pairs: Texts of several lengths, with corrupt versions, answers, a target and named segments; the last is equal to the first.
        level: Such texts of one length.
        documents: Documents of several lengths with summaries; the last is equal to the first.
    """

    pair: Pair
    pairs: Pairs
    level: Pairs
    documents: Encoded

    @property
    def subject(self) -> Subject:
        """The base model."""
        return self.pair.base

    def with_repetition(self) -> Case:
        """Return the case with the first text itself, the very object, in the place of the one that is equal to it."""
        pairs, level = (Pairs((*texts.pairs[:-1], texts.pairs[0]), texts.source) for texts in (self.pairs, self.level))
        examples = self.documents.examples
        return Case(self.pair, pairs, level, Encoded((*examples[:-1], examples[0]), {}))


Technique = Callable[[Case, Execution], Result]


@cache
def case(family: str, dtype: torch.dtype = torch.float64, *, spread: bool = False) -> Case:
    """Return tiny models of a family, on one device or over two pretended ones, and texts."""
    models = both(family, dtype)
    return Case(models.spread if spread else models.single, texts(), texts((LEVEL,) * 5, seed=1), documents())


@cache
def techniques() -> dict[str, Technique]:
    """Return every entry by name."""
    entries = importlib.import_module("tests.contract.entries")
    every: dict[str, Technique] = {}
    for module in pkgutil.iter_modules(entries.__path__, f"{entries.__name__}."):
        table = importlib.import_module(module.name).TECHNIQUES
        assert not every.keys() & table.keys(), f"two entries have one name: {sorted(every.keys() & table.keys())}"
        every |= table
    return every


def texts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> Pairs:
    """Return random texts whose corrupt versions differ at two positions."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for number, length in enumerate(lengths):
        clean = torch.randint(3, families.VOCABULARY, (length,), generator=generator).tolist()
        corrupt = list(clean)
        for at in (2, 4):
            corrupt[at] = 3 + (clean[at] + 11) % (families.VOCABULARY - 3)
        right, wrong = (torch.randperm(families.VOCABULARY - 3, generator=generator)[:2] + 3).tolist()
        pairs.append(
            PromptPair(f"{seed}.{number}", tuple(clean), tuple(corrupt), (right,), (wrong,), (length - 3, length), segments(length))
        )
    return Pairs((*pairs, copy(pairs[0])), "made for tests")


def segments(length: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return the spans that the techniques' roles and positions are named after."""
    spans: dict[str, tuple[tuple[int, int], ...]] = {
        "beginning": ((0, 2),),
        "subject": ((1, 4),),
        "changed fact": ((2, 3), (4, 5)),
        "document": ((0, 4),),
        "summary": ((4, length),),
        "salient": ((1, 3),),
        "io": ((1, 2),),
        "s1": ((3, 4),),
        "s2": ((5, 6),),
    }
    for place, role in enumerate(ROLES[:2]):
        spans |= {f"{role} first": ((place, place + 1),), f"{role} again": ((4 + place, 5 + place),)}
    return spans


def documents(lengths: Sequence[int] = (12, 9, 10, 8, 11)) -> Encoded:
    """Return random documents with summaries, the first of them twice."""
    made = [
        Example(str(row), tuple(text.tolist()), (1, 4), (5, len(text)), False)
        for row, text in enumerate(families.documents(seed=3, lengths=tuple(lengths)))
    ]
    return Encoded((*made, copy(made[0])), {})


def columns(table: pd.DataFrame) -> Result:
    """Return a table's numbers, lists of numbers, and texts letter by letter."""
    return {str(name): _column(column) for name, column in table.items()}


def _column(column: pd.Series) -> np.ndarray:
    if column.dtype.kind in "biuf":
        return column.to_numpy()
    first = next((value for value in column if value is not None), None)
    if isinstance(first, tuple | list | np.ndarray) and len(first) and isinstance(first[0], int | float | np.number):
        return np.concatenate([np.ravel(value) for value in column if value is not None])
    return letters(*map(str, column))


def letters(*parts: str) -> np.ndarray:
    """Return texts letter by letter."""
    return np.frombuffer("\n".join(parts).encode(), dtype=np.uint8)


def numbers(value: Any, name: str = "result") -> Result:
    """Return all numbers and texts of a result: of tables, arrays, dataclasses, and what holds such; other objects (models, graphs) are left out."""
    match value:
        case pd.DataFrame():
            return {f"{name}.{column}": values for column, values in columns(value).items()}
        case torch.Tensor():
            return {name: value.detach().cpu().numpy()}
        case np.ndarray() if value.dtype.kind in "biuf":
            return {name: value}
        case bool() | int() | float() | np.number():
            return {name: np.array(value)}
        case str():
            return {name: letters(value)}
        case Mapping():
            parts = {str(key): inner for key, inner in value.items()}
        case list() | tuple():
            parts = {str(index): inner for index, inner in enumerate(value)}
        case _ if is_dataclass(value):
            parts = {one.name: getattr(value, one.name) for one in fields(value)}
        case _:
            return {}
    flat: Result = {}
    for key, inner in parts.items():
        flat |= numbers(inner, f"{name}.{key}")
    return flat
