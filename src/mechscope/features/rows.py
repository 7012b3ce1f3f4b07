"""Rows of activations: what stands at some places for the tokens of texts, all places in one pass, which ends behind the last block that is needed.

What is no ordinary token is left out, the same tokens at all places, of all models: padding; the first `first` tokens of each text (the first is an
attention sink, whose norm is hundreds of times that of others); and tokens with a norm above `outlier` times the median at any place. The median is that
of the first 4,096 tokens, so that what is left out depends on no batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechscope import ranks
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import check_fits
from mechscope.errors import DataError
from mechscope.features.dictionary import Dictionary
from mechscope.features.places import Place, subject_of
from mechscope.instrument import Execution, Walk, record
from mechscope.instrument.texts import over_texts
from mechscope.settings.features import TokenSettings
from mechscope.shapes import by_shape
from mechscope.subject import Subject

# tokens whose median norm bounds those of all
PROBE = 4096
TOKENS_PER_BATCH = 4096
Models = Subject | Mapping[str, Subject]


@dataclass(frozen=True)
class Rows:
    """Activations of some tokens.

    Attributes:
        values: ``(row, width)`` by place.
        text: ``(row)``: the place of its text among all.
        position: ``(row)``: its token, counted in the text.
        left_out: Tokens that were left out, by reason: `first`, `outlier`.
    """

    values: dict[Place, Float[Tensor, "row width"]]
    text: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    left_out: Counter[str] = field(default_factory=Counter)

    __repr__ = by_shape

    def __len__(self) -> int:
        return len(self.text)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Put rows together, text after text."""
        text = torch.cat([part.text for part in parts])
        order = text.argsort(stable=True)
        values = {place: torch.cat([part.values[place] for part in parts])[order] for place in parts[0].values}
        left_out: Counter[str] = Counter()
        for part in parts:
            left_out.update(part.left_out)
        return cls(values, text[order], torch.cat([part.position for part in parts])[order], left_out)


class Reader:
    """Reads rows at places of one model, or of several that are given the same tokens.

    Attributes:
        models: The model, or models by name.
        places: What is read.
        tokens: Which tokens are left out.
        limits: Norm above which a token is left out, by place; empty until `probe`.
    """

    def __init__(self, models: Models, places: Sequence[Place], tokens: TokenSettings) -> None:
        """Check that the places exist; `SettingsError` where one does not."""
        self.models, self.places, self.tokens = models, tuple(places), tokens
        self.limits: dict[Place, float] = {}
        for place in self.places:
            place.check(subject_of(models, place))

    @property
    def subjects(self) -> dict[str, Subject]:
        """The models that are read, by name."""
        return {place.model: subject_of(self.models, place) for place in self.places}

    def check(self, texts: Pairs) -> None:
        """Refuse texts that a model cannot read; `DataError`."""
        for subject in self.subjects.values():
            check_fits(subject, texts)

    @torch.no_grad()
    def streams(self, batch: PairBatch) -> dict[Place, Float[Tensor, "batch token width"]]:
        """Return what stands at the places for every token of a batch, padding included; blocks behind the last place are not run."""
        real = None if bool(batch.real.all()) else batch.real
        found: dict[Place, Tensor] = {}
        for name, subject in self.subjects.items():
            own = [place for place in self.places if place.model == name]
            layers = {place.layer for place in own}
            with record(subject, *dict.fromkeys(place.site for place in own), layers=layers) as recording:
                walk = Walk(subject, batch.clean, real)
                hidden = walk.hidden
                for layer in range(max(layers) + 1):
                    hidden = walk.step(layer, hidden)
            found |= {place: place.of(recording) for place in own}
        return found

    def kept(self, batch: PairBatch, streams: Mapping[Place, Tensor]) -> tuple[Bool[Tensor, "batch token"], Counter[str]]:
        """Return which tokens are not left out, and how many are, by reason."""
        later = batch.real & (batch.real.cumsum(1) > self.tokens.first)
        ordinary = torch.ones_like(later)
        for place, limit in self.limits.items():
            # not a comparison with <=, so that what is no number counts as an outlier and not as a quiet token
            ordinary &= (torch.linalg.vector_norm(streams[place].float(), dim=-1) <= limit).cpu()
        kept = later & ordinary
        return kept, Counter(first=int((batch.real & ~later).sum()), outlier=int((later & ~ordinary).sum()))

    def rows(self, batch: PairBatch, streams: Mapping[Place, Tensor] | None = None) -> Rows:
        """Return the rows of a batch, on the CPU; the models are run where it is not given what stands at the places."""
        streams = self.streams(batch) if streams is None else {place: streams[place] for place in self.places}
        kept, left_out = self.kept(batch, streams)
        text = torch.tensor(batch.indices)[:, None].expand_as(kept)[kept]
        position = (batch.real.cumsum(1) - 1)[kept]
        return Rows({place: value[kept.to(value.device)].cpu() for place, value in streams.items()}, text, position, left_out)

    def run(self, texts: Pairs, indices: Sequence[int], execution: Execution, *, label: str = "") -> Rows:
        """Return the rows of some of the texts, as `run_together` does."""
        (rows,) = run_together([self], texts, indices, execution, label=label)
        return rows

    def probe(self, texts: Pairs, indices: Sequence[int], execution: Execution) -> None:
        """Set the limits from the first texts.

        Raises:
            DataError: No token is left.
        """
        self.limits = {}
        if self.tokens.outlier is None:
            return
        chosen = next(blocks(texts, indices, PROBE, self.tokens.first))
        rows = self.run(texts, chosen, execution)
        require_rows(len(rows), texts, self.tokens)
        norms = {place: torch.linalg.vector_norm(value.float(), dim=-1) for place, value in rows.values.items()}
        self.limits = {place: float(norm.median()) * self.tokens.outlier for place, norm in norms.items()}


def rows_together(readers: Sequence[Reader], batch: PairBatch) -> list[Rows]:
    """Return each reader's rows of a batch, of which the models, the same for all, are run once."""
    places = dict.fromkeys(place for reader in readers for place in reader.places)
    streams = Reader(readers[0].models, tuple(places), TokenSettings()).streams(batch)
    return [reader.rows(batch, streams) for reader in readers]


def run_together(readers: Sequence[Reader], texts: Pairs, indices: Sequence[int], execution: Execution, *, label: str = "") -> list[Rows]:
    """Return each reader's rows of some of the texts, in their order; ranks share the batches, and each gets all rows.

    Raises:
        DataError: Values are not finite.
        RunError: A single text does not fit into memory.
    """
    chosen = Pairs(tuple(texts.pairs[index] for index in indices), texts.source)

    def work(batch: PairBatch) -> list[Rows]:
        return rows_together(readers, batch)

    own = [rows for _, rows in over_texts(chosen, work, execution, tokens=TOKENS_PER_BATCH, label=label, dealt=True)]
    found = [Rows.joined(parts) for parts in zip(*(rows for parts in ranks.exchange(own) for rows in parts), strict=True)]
    for place, value in (each for rows in found for each in rows.values.items()):
        if not bool(value.isfinite().all()):
            raise DataError(f"activations at {place} are not finite: the model's type is too narrow for it, try dtype float32")
    return [Rows(rows.values, torch.tensor(indices)[rows.text], rows.position, rows.left_out) for rows in found]


def reader_of(
    models: Models, dictionary: Dictionary, texts: Pairs, tokens: TokenSettings | None, *, other_model: bool, execution: Execution
) -> Reader:
    """Return a reader of a dictionary's places, ready for texts.

    Args:
        models: The model, or several by name.
        dictionary: The dictionary.
        texts: What will be read; the limits of norms are found here where they are not known.
        tokens: Which tokens are left out; None for those that its training left out, or the defaults where that is not known.
        other_model: Allow a dictionary of a model with other weights.
        execution: Tokens of a batch.

    Raises:
        MechscopeError: The dictionary or the texts do not fit, or no token is left.
    """
    dictionary.check(models, other_model=other_model)
    trained, limits = left_out_in_training(dictionary)
    reader = Reader(models, dictionary.layout.places, tokens or trained or TokenSettings())
    reader.check(texts)
    if tokens is None:
        reader.limits = limits
    if not reader.limits:
        reader.probe(texts, range(len(texts)), Execution(execution.tokens_per_batch))
    return reader


def left_out_in_training(dictionary: Dictionary) -> tuple[TokenSettings | None, dict[Place, float]]:
    """Return which tokens a dictionary's training left out, None where that is not known, and the norms above which it did."""
    trained = dictionary.about.get("source", {})
    if not isinstance(trained, Mapping) or "settings" not in trained:
        return None, {}
    tokens = TokenSettings(first=trained["settings"]["first"], outlier=trained["settings"]["outlier"])
    return tokens, limits_at(dictionary.layout.places, dictionary.about.get("limits", {}))


def limits_at(places: Sequence[Place], known: Mapping[str, float]) -> dict[Place, float]:
    """Return norms above which tokens are left out, given by the names of places, by those of some places."""
    return {place: known[place.name] for place in places if place.name in known}


def require_rows(rows: int, texts: Pairs, tokens: TokenSettings) -> None:
    """Refuse texts of which nothing is left; `DataError`."""
    if not rows:
        raise DataError(
            f"no token of the {len(texts)} texts of {texts.source} is left: the first {tokens.first} of each and outliers are left out; give longer texts, or "
            "set first=0"
        )


def blocks(texts: Pairs, indices: Sequence[int], rows: int, first: int) -> Iterator[list[int]]:
    """Cut texts, in an order, into neighbours that hold about so many rows together."""
    held: list[int] = []
    size = 0
    for index in indices:
        held.append(index)
        size += max(0, len(texts.pairs[index].clean) - first)
        if size >= rows:
            yield held
            held, size = [], 0
    if held:
        yield held
