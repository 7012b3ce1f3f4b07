"""What is kept of texts that go by: the largest activations of every unit, random ones, random tokens; with what stands around them.

What is random is decided by a hash of seed, unit, text and position: those with the smallest hashes are kept. So a sample is uniform, two runs draw the same,
and it does not depend on how texts are batched (bottom-k sampling; Cohen and Kaplan 2007, "Summarizing data using bottom-k sketches").
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from mechscope.features.observed import Seen
from mechscope.shapes import by_shape
from mechscope.stats.chance import drawn

# candidates that wait before they are put among what is kept
_WAITING = 100_000
# of the hash that draws tokens, which have no unit
_TOKEN = 2**40
# random tokens: (token, 3) hash, text, position; codes of (token · place, unit); norms of heads
Part = tuple[np.ndarray, sparse.csr_matrix, np.ndarray]


@dataclass(frozen=True)
class Span:
    """Tokens around one: so many before it and behind it."""

    before: int
    after: int

    def __len__(self) -> int:
        return self.before + 1 + self.after

    @property
    def offsets(self) -> Int[np.ndarray, " place"]:
        """Where they stand, seen from it."""
        return np.arange(-self.before, self.after + 1)


ALONE = Span(0, 0)
"""No tokens around it."""


@dataclass(frozen=True)
class Kept:
    """Activations of units, unit after unit.

    Attributes:
        unit: ``(kept)``.
        text: ``(kept)``: the place of the text among all.
        position: ``(kept)``: the token.
        value: ``(kept)``: the activation.
        around: ``(kept, place)``: the unit's activations in the tokens around it, in half precision; 0 where it is silent, and outside of the text.
    """

    unit: Int[np.ndarray, " kept"]
    text: Int[np.ndarray, " kept"]
    position: Int[np.ndarray, " kept"]
    value: Float[np.ndarray, " kept"]
    around: Float[np.ndarray, "kept place"]

    __repr__ = by_shape

    def __len__(self) -> int:
        return len(self.unit)

    @property
    def rank(self) -> Int[np.ndarray, " kept"]:
        """``(kept)``: the place of each among those of its unit, from 0."""
        return _rank(self.unit)

    def of(self, unit: int) -> Kept:
        """Return those of one unit."""
        return self[slice(*np.searchsorted(self.unit, [unit, unit + 1]))]

    def __getitem__(self, at: slice | Int[np.ndarray, " some"]) -> Kept:
        return Kept(self.unit[at], self.text[at], self.position[at], self.value[at], self.around[at])


@dataclass(frozen=True)
class Sample:
    """Random tokens, with the tokens around each.

    Attributes:
        text: ``(token)``: the place of its text among all.
        position: ``(token)``.
        codes: ``(token · place, unit)``, sparse: what is active in the tokens around each, place after place.
        heads: ``(token, head)``: the norm of what each head writes there; no columns where it was not asked for.
    """

    text: Int[np.ndarray, " token"]
    position: Int[np.ndarray, " token"]
    codes: sparse.csr_matrix
    heads: Float[np.ndarray, "token head"]

    __repr__ = by_shape

    def __len__(self) -> int:
        return len(self.text)


class Entries:
    """The entries of a batch as arrays, and a way to look one up."""

    def __init__(self, seen: Seen, seed: int) -> None:
        codes = seen.codes
        self.text, self.position, self.heads, self.width = seen.text.numpy(), seen.position.numpy(), seen.heads, codes.width
        self.row, self.unit, self.value = codes.rows.numpy(), codes.latents.numpy(), codes.values.float().numpy()
        self.seed = seed
        self._rows = self.text.astype(np.int64) * 2**32 + self.position
        self._row_order = self._rows.argsort(kind="stable")
        self._sorted_rows = self._rows[self._row_order]
        entries = self.row * self.width + self.unit
        self._order = entries.argsort(kind="stable")
        self._entries = entries[self._order]

    def rows(self, text: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Return the rows of tokens, −1 where there is none."""
        return _found(self._sorted_rows, self._row_order, np.where(position < 0, -1, text.astype(np.int64) * 2**32 + position))

    def around(self, entries: np.ndarray, span: Span) -> np.ndarray:
        """Return the units' values in the tokens around some entries."""
        row = self.row[entries]
        near = self.rows(self.text[row][:, None], self.position[row][:, None] + span.offsets)
        at = _found(self._entries, self._order, np.where(near < 0, -1, near * self.width + self.unit[entries][:, None]))
        return np.where(at < 0, 0, self.value[at] if len(self.value) else 0).astype(np.float16)

    def active(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return what is active in some rows, nothing where one is −1."""
        every = sparse.csr_matrix((self.value, (self.row, self.unit)), shape=(len(self.text) + 1, self.width))
        return every[rows]


def _found(listed: np.ndarray, places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the places of wanted numbers in a sorted list, −1 where they are not in it."""
    if not len(listed):
        return np.full(wanted.shape, -1)
    at = np.searchsorted(listed, wanted).clip(max=len(listed) - 1)
    return np.where(listed[at] == wanted, places[at], -1)


class _Activations(ABC):
    """Some activations of every unit; which, a kind of them says."""

    def __init__(self, units: int, count: int, span: Span) -> None:
        self.units, self.count, self.span = units, count, span
        self._type = np.dtype(
            [("unit", "i8"), ("text", "i8"), ("position", "i8"), ("value", "f4"), ("draw", "u8"), ("around", "f2", (len(span),))]
        )
        self._kept = np.zeros(0, dtype=self._type)
        self._waiting: list[np.ndarray] = []

    def candidates(self, seen: Entries) -> np.ndarray:
        """Return the entries of a batch that may be kept."""
        entries = np.zeros(0, dtype=self._type)
        if not self.count:
            return entries
        draw = self.draws(seen)
        at = self.first(seen, draw, self.within(seen, draw).nonzero()[0])
        entries = np.zeros(len(at), dtype=self._type)
        row = seen.row[at]
        entries["unit"], entries["text"], entries["position"] = seen.unit[at], seen.text[row], seen.position[row]
        entries["value"], entries["draw"], entries["around"] = seen.value[at], draw[at], seen.around(at, self.span)
        return entries

    def add(self, entries: np.ndarray) -> None:
        self._waiting.append(entries)
        if sum(map(len, self._waiting)) > max(_WAITING, len(self._kept)):
            self._settle()

    def kept(self) -> Kept:
        self._settle()
        every = self._kept
        return Kept(every["unit"], every["text"], every["position"], every["value"].astype(float), every["around"])

    def _settle(self) -> None:
        every = np.concatenate([self._kept, *self._waiting])
        self._waiting = []
        self._kept = self.settled(every)

    @abstractmethod
    def draws(self, seen: Entries) -> np.ndarray:
        """Return a number for every entry of a batch, by which some are drawn."""

    @abstractmethod
    def within(self, seen: Entries, draw: np.ndarray) -> np.ndarray:
        """Tell which entries of a batch may still be among those that are kept."""

    @abstractmethod
    def first(self, seen: Entries, draw: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Return those of the entries `at` that would be kept of this batch alone."""

    @abstractmethod
    def settled(self, every: np.ndarray) -> np.ndarray:
        """Return those of all entries so far that are kept."""


class Largest(_Activations):
    """The largest of every unit, one of a text."""

    def __init__(self, units: int, count: int, span: Span) -> None:
        super().__init__(units, count, span)
        self._floor = np.full(units, -np.inf)

    def draws(self, seen: Entries) -> np.ndarray:
        return np.zeros(len(seen.unit), dtype=np.uint64)

    def within(self, seen: Entries, draw: np.ndarray) -> np.ndarray:
        return seen.value >= self._floor[seen.unit]

    def first(self, seen: Entries, draw: np.ndarray, at: np.ndarray) -> np.ndarray:
        row = seen.row[at]
        order = _largest(seen.unit[at], seen.text[row], seen.position[row], seen.value[at], self.count)
        return at[order]

    def settled(self, every: np.ndarray) -> np.ndarray:
        every = every[_largest(every["unit"], every["text"], every["position"], every["value"], self.count)]
        last = _rank(every["unit"]) == self.count - 1
        self._floor[every["unit"][last]] = every["value"][last]
        return every


class Drawn(_Activations):
    """Random ones of every unit."""

    def __init__(self, units: int, count: int, span: Span) -> None:
        super().__init__(units, count, span)
        self._ceiling = np.full(units, np.iinfo(np.uint64).max, dtype=np.uint64)

    def draws(self, seen: Entries) -> np.ndarray:
        return drawn(seen.seed, seen.unit, seen.text[seen.row], seen.position[seen.row])

    def within(self, seen: Entries, draw: np.ndarray) -> np.ndarray:
        return draw <= self._ceiling[seen.unit]

    def first(self, seen: Entries, draw: np.ndarray, at: np.ndarray) -> np.ndarray:
        order = np.lexsort((draw[at], seen.unit[at]))
        return at[order[_rank(seen.unit[at][order]) < self.count]]

    def settled(self, every: np.ndarray) -> np.ndarray:
        every = every[np.lexsort((every["draw"], every["unit"]))]
        rank = _rank(every["unit"])
        last = rank == self.count - 1
        self._ceiling[every["unit"][last]] = every["draw"][last]
        return every[rank < self.count]


class Tokens:
    """Random tokens of all texts, with what is active around them."""

    def __init__(self, units: int, count: int, span: Span) -> None:
        self.units, self.count, self.span = units, count, span
        self._parts: list[Part] = []
        self._ceiling = np.uint64(np.iinfo(np.uint64).max)

    def candidates(self, seen: Entries) -> Part | None:
        if not self.count:
            return None
        draw = drawn(seen.seed, np.full(1, _TOKEN), seen.text, seen.position)
        at = (draw <= self._ceiling).nonzero()[0]
        at = at[draw[at].argsort()[: self.count]]
        about = np.stack([draw[at], seen.text[at].astype(np.uint64), seen.position[at].astype(np.uint64)], axis=1)
        near = seen.rows(seen.text[at][:, None], seen.position[at][:, None] + self.span.offsets)
        heads = np.zeros((len(at), 0)) if seen.heads is None else seen.heads[at]
        return about, seen.active(near.ravel()), heads.astype(np.float32)

    def add(self, part: Part | None) -> None:
        if part is None:
            return
        self._parts.append(part)
        if sum(len(about) for about, _, _ in self._parts) > 2 * self.count:
            self._settle()

    def _settle(self) -> None:
        if not self._parts:
            return
        about, heads = (np.concatenate([part[at] for part in self._parts]) for at in (0, 2))
        codes = sparse.vstack([part[1] for part in self._parts])
        order = about[:, 0].argsort()[: self.count]
        rows = (order[:, None] * len(self.span) + np.arange(len(self.span))).ravel()
        self._parts = [(about[order], codes.tocsr()[rows], heads[order])]
        if len(order) == self.count:
            self._ceiling = about[order[-1], 0]

    def kept(self) -> Sample:
        self._settle()
        nothing = (
            np.zeros((0, 3), dtype=np.uint64),
            sparse.csr_matrix((0, self.units), dtype=np.float32),
            np.zeros((0, 0), dtype=np.float32),
        )
        about, codes, heads = self._parts[0] if self._parts else nothing
        return Sample(about[:, 1].astype(np.int64), about[:, 2].astype(np.int64), codes, heads)


def _rank(unit: np.ndarray) -> np.ndarray:
    """Return the place of each entry among those of its unit, of entries sorted by unit."""
    return np.arange(len(unit)) - np.searchsorted(unit, unit)


def _largest(unit: np.ndarray, text: np.ndarray, position: np.ndarray, value: np.ndarray, count: int) -> np.ndarray:
    """Return the places of the largest entries of each unit, one of a text: unit after unit, the largest first."""
    order = np.lexsort((position, -value, text, unit))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(unit[order]) != 0) | (np.diff(text[order]) != 0)
    order = order[new]
    order = order[np.lexsort((text[order], -value[order], unit[order]))]
    return order[_rank(unit[order]) < count]
