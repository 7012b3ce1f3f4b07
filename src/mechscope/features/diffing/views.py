"""What the dictionaries of a comparison read: two models' activations on the same tokens, and everything that controls derive from them.

A view is a model that need not exist; its places are named as those of a model are (`planted:resid6`), so that all dictionaries are trained by one call on
the same batches, after one pass over the models:

    base, tuned          the two models; further trainings beside them, each under a name
    difference           tuned − base
    same                 the base once more: base against base
    halfbase, halftuned  the two models on the other half of the documents
    planted              the base with an effect of known truth (`mechscope.features.diffing.planted`)
    shuffled             the tuned model's tokens in another order within each text: pairs that do not belong together
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechscope.data.pairs import Pairs
from mechscope.errors import ModelError
from mechscope.features.activations import Block, Source
from mechscope.features.affine import Affine, moments_of
from mechscope.features.diffing.planted import Plant
from mechscope.features.places import Place, places
from mechscope.features.rows import TOKENS_PER_BATCH, Reader, Rows, blocks
from mechscope.instrument import Execution
from mechscope.stats.chance import drawn
from mechscope.stats.moments import Moments

BASE, TUNED, DIFFERENCE = "base", "tuned", "difference"
SAME, PLANTED, SHUFFLED = "same", "planted", "shuffled"
HALF = {"halfbase": BASE, "halftuned": TUNED}
"""Views of the other half of the documents, and whose they are."""
_UNCHANGED = "base and tuned model do not differ at {}: name a later place"


class RowSource(Source, Protocol):
    """Blocks of activations that know their texts and positions: a `Harvest` or a `Live`."""

    def rows(self, number: int) -> Rows:
        """Return a block with its texts and positions."""


@dataclass(frozen=True)
class Recipe:
    """How views are made of the models' activations.

    Attributes:
        places: Where, without a model's name.
        views: Which views there are.
        plant: What is planted; None where nothing is.
        rms: Root mean square norm of the base's activations around their mean, by place.
        seed: Of the order of shuffled tokens.
    """

    places: tuple[Place, ...]
    views: tuple[str, ...]
    plant: Plant | None
    rms: Mapping[Place, float]
    seed: int

    def made(self, rows: Rows, ids: Int[Tensor, " row"]) -> Block:
        """Return every view of some tokens, those of the other half as the two models themselves."""
        order = shuffled_within(rows, self.seed) if SHUFFLED in self.views else None
        found: Block = {}
        for place in self.places:
            base, tuned = (rows.values[replace(place, model=model)] for model in (BASE, TUNED))
            for view in self.views:
                if view in (BASE, SAME, "halfbase"):
                    value = base
                elif view in (TUNED, "halftuned"):
                    value = tuned
                elif view == DIFFERENCE:
                    value = _wide(tuned) - _wide(base)
                elif view == SHUFFLED and order is not None:
                    value = tuned[order]
                elif view == PLANTED and self.plant is not None:
                    value = self.plant.added(base, ids, place, self.rms[place])
                else:
                    value = rows.values[replace(place, model=view)]
                found[replace(place, model=view)] = value
        return found

    def moved(self, differences: Sequence[Affine]) -> float:
        """Return the root mean square of tuned − base as a share of `rms`, what all tokens are moved by included; of all places together.

        Args:
            differences: The maps of the view of differences, place by place.
        """
        squares = sum(each.scale**-2 + float(each.centre.double().square().sum()) for each in differences)
        return float((squares / sum(self.rms[place] ** 2 for place in self.places)) ** 0.5)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Read plain values back."""
        plant = values["plant"]
        return cls(
            places(values["places"]),
            tuple(values["views"]),
            None if plant is None else Plant(tuple(map(tuple, plant["kinds"])), plant["strength"], plant["seed"]),
            {Place.parse(name): value for name, value in values["rms"].items()},
            values["seed"],
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "places": [place.name for place in self.places],
            "views": list(self.views),
            "plant": None if self.plant is None else asdict(self.plant),
            "rms": {place.name: value for place, value in self.rms.items()},
            "seed": self.seed,
        }


class TokenIds:
    """The token ids of rows of some texts."""

    def __init__(self, texts: Pairs) -> None:
        """Put the texts side by side."""
        self._ids = torch.tensor([token for pair in texts for token in pair.clean], dtype=torch.int64)
        self._starts = torch.tensor(np.cumsum([0, *(len(pair.clean) for pair in texts)])[:-1], dtype=torch.int64)

    def __call__(self, rows: Rows) -> Int[Tensor, " row"]:
        """Return the ids."""
        return self._ids[self._starts[rows.text] + rows.position]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def shuffled_within(rows: Rows, seed: int) -> Int[Tensor, " row"]:
    """Return for every row another one of the same text, each once; whatever batch the text stands in."""
    text, position = rows.text.numpy(), rows.position.numpy()
    keys = drawn(seed, text, position)
    places = np.lexsort((position, text))
    by_chance = np.lexsort((keys, text))
    order = np.empty(len(text), dtype=np.int64)
    order[places] = by_chance
    return torch.from_numpy(order)


class Views:
    """The views of a harvest, to train on.

    Attributes:
        places: All views at all places.
        recipe: How they are made.
    """

    def __init__(self, source: RowSource, texts: Pairs, recipe: Recipe, *, other: RowSource | None = None) -> None:
        """Take a source of the models' activations.

        Args:
            source: The activations, of texts that are learned from.
            texts: Those texts.
            recipe: Which views.
            other: The same models on the other half of the documents.
        """
        self._source, self._other, self.recipe = source, other, recipe
        self.places = tuple(replace(place, model=view) for view in recipe.views for place in recipe.places)
        self._ids = TokenIds(texts)
        self._differences: dict[Place, Affine] = {}

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self._source.blocks if self._other is None else min(self._source.blocks, self._other.blocks)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, JSON-able."""
        other = None if self._other is None else self._other.identity
        return {**self._source.identity, "kind": "views", "source": self._source.identity, "other": other, "recipe": self.recipe.to_json()}

    @property
    def limits(self) -> dict[str, float]:
        """Norms above which tokens were left out, by the names of the places."""
        return self._source.limits

    def block(self, number: int) -> Block:
        """Return a block's rows by place; with another half as many of each."""
        rows = self._source.rows(number)
        found = self.recipe.made(rows, self._ids(rows))
        if self._other is None:
            return found
        other = self._other.block(number)
        number_of_rows = min(len(rows), len(next(iter(other.values()))))
        for place in found:
            if place.model in HALF:
                found[place] = other[replace(place, model=HALF[place.model])]
        return {place: value[:number_of_rows] for place, value in found.items()}

    def affine(self, place: Place) -> Affine:
        """Return the map to mean zero and mean squared norm one; what is made of the base is read in the base's units.

        Raises:
            ModelError: The two models hold the same at the place.
        """
        if place.model == DIFFERENCE:
            if place not in self._differences:
                moments = self.moments(place)
                if int(moments.count.max(initial=0)) > 1 and not np.any(moments.variance) and not np.any(moments.mean):
                    raise ModelError(_UNCHANGED.format(replace(place, model="")))
                self._differences[place] = Affine.fitted(moments)
            return self._differences[place]
        if place.model in HALF and self._other is not None:
            return self._other.affine(replace(place, model=HALF[place.model]))
        model = {SAME: BASE, PLANTED: BASE, SHUFFLED: TUNED, **HALF}.get(place.model, place.model)
        return self._source.affine(replace(place, model=model))

    def moments(self, place: Place) -> Moments:
        """Return count, mean and squared deviations of all rows of a view, by one pass over the blocks."""
        moments: Moments | None = None
        for number in range(self.blocks):
            value = self.block(number)[place]
            if len(value):
                own = moments_of(value)
                if moments is None:
                    moments = own
                else:
                    moments.merge(own)
        return Moments((0,)) if moments is None else moments


def require_change(reader: Reader, texts: Pairs, where: Sequence[Place], execution: Execution) -> None:
    """Refuse places at which base and tuned model hold the same for every token; ends at the first tokens that differ.

    Args:
        reader: Reads both models at the places.
        texts: What is learned from.
        where: The places, without a model's name.
        execution: Tokens of a batch.

    Raises:
        ModelError: The two models do not differ at a place.
    """
    alike = list(where)
    for some in blocks(texts, range(len(texts)), TOKENS_PER_BATCH, 0):
        values = reader.run(texts, some, execution).values
        alike = [place for place in alike if torch.equal(*(values[replace(place, model=model)] for model in (BASE, TUNED)))]
        if not alike:
            return
    raise ModelError(_UNCHANGED.format(alike[0]))


def model_places(where: Sequence[Place], models: Sequence[str]) -> tuple[Place, ...]:
    """Return places of some models, model after model."""
    return tuple(replace(place, model=model) for model in models for place in where)
