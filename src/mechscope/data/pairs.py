"""Prompt pairs: a clean and a corrupt text of equal length, what follows them, and named spans.

An intervention compares two runs token by token, so a pair is two texts that line up. Each pair says what the right and wrong next tokens are
(`answers`, `wrong_answers`), or which of its own tokens are to be predicted (`target`, for example a summary), and may name spans ("subject").
Texts without a corrupt version have corrupt equal to clean: ablations and noise need no second text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechscope.data.prompt import Encoded, Padding, packs
from mechscope.errors import DataError
from mechscope.shapes import by_shape, short

Span = tuple[int, int]
Where = str | int | Sequence[int] | Bool[Tensor, "batch token"]


@dataclass(frozen=True)
class PromptPair:
    """Two texts that line up token by token.

    Attributes:
        id: Name of the pair.
        clean: Token ids.
        corrupt: As many token ids.
        answers: Token ids that are right after the last token; each one token.
        wrong_answers: Token ids that are wrong there.
        target: Half-open span of tokens whose loss is the metric, for example the summary.
        segments: Named half-open token spans.
    """

    id: str
    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answers: tuple[int, ...] = ()
    wrong_answers: tuple[int, ...] = ()
    target: Span | None = None
    segments: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.clean) != len(self.corrupt):
            raise DataError(
                f"pair {self.id!r}: clean has {len(self.clean)} tokens, corrupt has {len(self.corrupt)}: patching compares them token by token, "
                "so rewrite one of them to the other's length"
            )
        if not self.clean:
            raise DataError(f"pair {self.id!r} is empty")
        if self.target is not None and not 0 < self.target[0] < self.target[1] <= len(self.clean):
            raise DataError(
                f"pair {self.id!r}: target {self.target} does not lie in its {len(self.clean)} tokens; the first token cannot be predicted"
            )
        if both := sorted(set(self.answers) & set(self.wrong_answers)):
            raise DataError(f"pair {self.id!r}: token {both[0]} is both a right and a wrong answer")

    def __repr__(self) -> str:
        facts = [f"{len(self.clean)} tokens", f"{len(self.changed)} differ"]
        facts += [f"{len(ids)} {name}" for name, ids in (("right", self.answers), ("wrong", self.wrong_answers)) if ids]
        facts += [f"target {self.target[0]}–{self.target[1]}"] if self.target is not None else []
        facts += [f"segments {', '.join(self.segments)}"] if self.segments else []
        return f"PromptPair({self.id!r}: {'; '.join(facts)})"

    @property
    def changed(self) -> tuple[int, ...]:
        """Positions where clean and corrupt differ."""
        return tuple(at for at, (one, two) in enumerate(zip(self.clean, self.corrupt, strict=True)) if one != two)


@dataclass(frozen=True)
class Pairs:
    """A set of pairs, where it comes from, and what was left out by reason."""

    pairs: tuple[PromptPair, ...]
    source: str
    problems: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        lengths = [len(pair.clean) for pair in self.pairs]
        of = f" of {min(lengths)}–{max(lengths)} tokens" if lengths else ""
        left_out = f"; left out: {', '.join(f'{count} {reason}' for reason, count in self.problems.items())}" if self.problems else ""
        return f"Pairs({len(self)} from {short(self.source)}{of}{left_out})"

    def written(self, tokenizer: Any) -> pd.DataFrame:
        """Return the texts as a reader sees them.

        Args:
            tokenizer: The tokenizer of the model that the pairs were made for.

        Returns:
            One row per pair: `id`, `clean`, `corrupt`, `answers` and `wrong_answers` (tokens joined by " | "), `target` (its text).
        """

        def read(ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(ids)))

        def each(ids: Sequence[int]) -> str:
            return " | ".join(read([one]) for one in ids)

        return pd.DataFrame(
            {
                "id": pair.id,
                "clean": read(pair.clean),
                "corrupt": read(pair.corrupt),
                "answers": each(pair.answers),
                "wrong_answers": each(pair.wrong_answers),
                "target": read(pair.clean[slice(*pair.target)]) if pair.target is not None else "",
            }
            for pair in self.pairs
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[PromptPair]:
        return iter(self.pairs)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the content of all pairs in order."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(json.dumps([*vars(pair).values()], default=dict).encode())
        return digest.hexdigest()

    def first(self, n: int) -> Pairs:
        """Return the first pairs."""
        return Pairs(self.pairs[:n], self.source, self.problems)

    def swapped(self) -> Pairs:
        """Return the pairs with clean and corrupt texts, and right and wrong answers, exchanged."""
        turned = (
            replace(pair, clean=pair.corrupt, corrupt=pair.clean, answers=pair.wrong_answers, wrong_answers=pair.answers)
            for pair in self.pairs
        )
        return Pairs(tuple(turned), f"{self.source}, swapped")

    def batches(self, *, tokens_per_batch: int = 4096, pad_id: int = 0, padding: Padding = "right") -> Iterator[PairBatch]:
        """Batch pairs by length, longest first.

        Args:
            tokens_per_batch: Most tokens of a batch, padding included; a longer pair is a batch by itself.
            pad_id: Token to pad with; it is masked.
            padding: Side to pad on.
        """
        for indices in packs([len(pair.clean) for pair in self.pairs], tokens_per_batch=tokens_per_batch):
            yield collate_pairs([self.pairs[index] for index in indices], indices=indices, pad_id=pad_id, padding=padding)


@dataclass(frozen=True)
class PairBatch:
    """Pairs side by side.

    Attributes:
        clean: ``(batch, token)`` ids, padded.
        corrupt: ``(batch, token)`` ids of the corrupt texts, padded.
        real: ``(batch, token)``, True where a token is real.
        pairs: The pairs, row by row.
        padding: The side of the padding.
        indices: The place of each row's pair in the `Pairs` that were batched; the same pair may stand at several.
    """

    clean: Int[Tensor, "batch token"]
    corrupt: Int[Tensor, "batch token"]
    real: Bool[Tensor, "batch token"]
    pairs: tuple[PromptPair, ...]
    padding: Padding
    indices: tuple[int, ...]

    __repr__ = by_shape

    def __len__(self) -> int:
        return len(self.pairs)

    def halves(self) -> tuple[PairBatch, PairBatch]:
        """Return the first and the second half of the pairs, each padded no further than it needs."""
        middle = (len(self) + 1) // 2
        first, second = (
            collate_pairs(self.pairs[part], indices=self.indices[part], padding=self.padding)
            for part in (slice(middle), slice(middle, None))
        )
        return first, second

    def shift(self, row: int) -> int:
        """Return the column of a text's first token."""
        return self.real.shape[1] - len(self.pairs[row].clean) if self.padding == "left" else 0

    def positions(self, which: Where) -> Bool[Tensor, "batch token"]:
        """Mark tokens.

        Args:
            which: `all` real tokens, the `last` one, those that `changed` between clean and corrupt, `target`, the name of a segment, one or several
                positions (counted in each text; negative ones from its end), or a mask ``(batch, token)``.

        Raises:
            DataError: A name is not known, a position lies outside a text, a text has nothing there, or a mask has another shape.
        """
        if isinstance(which, Tensor):
            if which.shape != self.real.shape:
                raise DataError(f"a mask of positions has shape {tuple(which.shape)}, the batch has {tuple(self.real.shape)}")
            return which & self.real
        if isinstance(which, str) and which == "all":
            return self.real.clone()
        marked = torch.zeros_like(self.real)
        for row, pair in enumerate(self.pairs):
            places = _positions(pair, which)
            if not places:
                raise DataError(f"pair {pair.id!r} has no token at {which!r}: leave the pair out, or choose other positions")
            marked[row, [at + self.shift(row) for at in places]] = True
        return marked


def _positions(pair: PromptPair, which: str | int | Sequence[int]) -> list[int]:
    length = len(pair.clean)
    if not isinstance(which, str):
        wanted = [which] if isinstance(which, int) else list(which)
        for at in wanted:
            if not -length <= at < length:
                raise DataError(f"position {at} lies outside pair {pair.id!r}, which has {length} tokens")
        return [at % length for at in wanted]
    if which == "last":
        return [length - 1]
    if which == "changed":
        return list(pair.changed)
    if which == "target" and pair.target is not None:
        return list(range(*pair.target))
    if which not in pair.segments:
        known = ", ".join(["all", "last", "changed", *(["target"] if pair.target else []), *pair.segments])
        raise DataError(f"positions {which!r} are not known in pair {pair.id!r}: use {known}, or numbers")
    return [at for span in pair.segments[which] for at in range(*span)]


def collate_pairs(
    pairs: Sequence[PromptPair], *, indices: Sequence[int] | None = None, pad_id: int = 0, padding: Padding = "right"
) -> PairBatch:
    """Put pairs side by side in the order given.

    Args:
        pairs: The pairs.
        indices: Their places in the `Pairs` they come from; by default 0, 1, ….
        pad_id: Token to pad with; it is masked.
        padding: Side to pad on.

    Raises:
        DataError: There are none.
    """
    if not pairs:
        raise DataError("a batch needs at least one pair")
    width = max(len(pair.clean) for pair in pairs)
    clean = torch.full((len(pairs), width), pad_id, dtype=torch.int64)
    corrupt, real = clean.clone(), torch.zeros(len(pairs), width, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        length = len(pair.clean)
        place = slice(width - length, width) if padding == "left" else slice(0, length)
        clean[row, place], corrupt[row, place] = torch.tensor(pair.clean), torch.tensor(pair.corrupt)
        real[row, place] = True
    return PairBatch(clean, corrupt, real, tuple(pairs), padding, tuple(range(len(pairs)) if indices is None else indices))


def from_examples(encoded: Encoded, source: str) -> Pairs:
    """Take encoded documents as texts whose target is the summary; there is no corrupt version."""
    pairs = tuple(
        PromptPair(
            example.id,
            example.input_ids,
            example.input_ids,
            target=example.summary,
            segments={"document": (example.document,), "summary": (example.summary,)},
        )
        for example in encoded.examples
    )
    return Pairs(pairs, source, dict(encoded.problems))


def from_tokens(texts: Int[Tensor, "text token"], corrupt: Int[Tensor, "text token"] | None = None, source: str = "tokens") -> Pairs:
    """Take rows of token ids as texts; every token but the first is a target."""
    other = texts if corrupt is None else corrupt
    rows = zip(texts.tolist(), other.tolist(), strict=True)
    return Pairs(tuple(PromptPair(str(at), tuple(a), tuple(b), target=(1, len(a))) for at, (a, b) in enumerate(rows)), source)
