"""Views are what they say of the two models' activations, and dictionaries trained on them find what was planted and nothing between equal models."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.errors import ModelError
from mechscope.features import Dictionary, FeatureTraining, Objective, Plan, Rule, train
from mechscope.features.activations import Block
from mechscope.features.affine import Affine, moments_of
from mechscope.features.diffing import (
    Plant,
    Recipe,
    Views,
    classified,
    comparisons,
    model_places,
    require_change,
    scaled_latents,
    scaling_sums,
)
from mechscope.features.diffing.comparisons import views_of
from mechscope.features.diffing.views import TokenIds, shuffled_within
from mechscope.features.places import Place, places
from mechscope.features.rows import Reader, Rows
from mechscope.instrument import Execution
from mechscope.settings.diffing import ExclusiveSettings
from mechscope.settings.features import TokenSettings
from mechscope.subject.load import load
from tests import families
from tests.features.planted import Planted
from tests.features.test_harvest import texts as texts_of_lengths

WHERE = places("resid1")
(PLACE,) = WHERE
BASE, TUNED = model_places(WHERE, ["base", "tuned"])
WIDTH, LENGTH, TEXTS = 24, 40, 100
DIRECTIONS = Planted.of(WIDTH, 30, 3)
NEW = torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(9)), dim=0)


def texts(seed: int = 0) -> Pairs:
    ids = torch.randint(0, 200, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(seed)).tolist()
    return Pairs(tuple(PromptPair(str(at), tuple(row), tuple(row)) for at, row in enumerate(ids)), "made")


class Made:
    """Two models that hold the same directions; the tuned one writes another on every token below five."""

    def __init__(self, seed: int = 0) -> None:
        self.texts, self.blocks, self.seed = texts(seed), 2, seed
        self.places: tuple[Place, ...] = (BASE, TUNED)
        self.identity: dict[str, Any] = {"models": {}, "made": seed}
        self.limits: dict[str, float] = {}

    def rows(self, number: int) -> Rows:
        half = TEXTS // 2
        text = torch.arange(number * half, (number + 1) * half).repeat_interleave(LENGTH - 1)
        position = torch.arange(1, LENGTH).repeat(half)
        base = 3 * DIRECTIONS.rows(len(text), 10 * self.seed + number) + 1
        ids = TokenIds(self.texts)(Rows({}, text, position))
        tuned = base + 2.0 * (ids < 5)[:, None] * NEW
        return Rows({BASE: base, TUNED: tuned}, text, position)

    def block(self, number: int) -> Block:
        return self.rows(number).values

    def affine(self, place: Place) -> Affine:
        return Affine.fitted(moments_of(torch.cat([self.block(number)[place] for number in range(2)])))


def recipe(*views: str, plant: Plant | None = None) -> Recipe:
    return Recipe(WHERE, ("base", "tuned", *views), plant, {PLACE: 3.0}, 0)


def of(block: Block, view: str) -> Tensor:
    return block[replace(PLACE, model=view)]


def test_every_view_is_made_of_the_two_models_activations() -> None:
    source = Made()
    plant = Plant(((7, 9), (11,)), 0.5, 3)
    made = recipe("same", "difference", "planted", "shuffled", plant=plant)
    block, rows = Views(source, source.texts, made).block(1), source.rows(1)
    base, tuned = rows.values[BASE], rows.values[TUNED]
    assert torch.equal(of(block, "same"), base)
    torch.testing.assert_close(of(block, "difference"), tuned - base)
    directions = plant.directions(PLACE, WIDTH).float()
    assert directions.norm(dim=1).tolist() == pytest.approx([1, 1])
    for row in range(0, len(rows), 7):
        token = source.texts.pairs[rows.text[row]].clean[rows.position[row]]
        wanted = base[row] + (1.5 * directions[0] if token in (7, 9) else 1.5 * directions[1] if token == 11 else 0)
        torch.testing.assert_close(of(block, "planted")[row], wanted)
    assert not torch.equal(of(block, "shuffled"), tuned)
    for text in rows.text.unique():
        own = rows.text == text
        assert sorted(of(block, "shuffled")[own].sum(1).tolist()) == sorted(tuned[own].sum(1).tolist())


def test_the_order_of_shuffled_tokens_does_not_hang_on_the_batch() -> None:
    rows = Made().rows(0)
    order = shuffled_within(rows, 4)
    own = rows.text == 3
    alone = shuffled_within(Rows({}, rows.text[own], rows.position[own]), 4)
    assert (order[own] - int(own.nonzero()[0])).tolist() == alone.tolist()
    assert (order == torch.arange(len(order))).float().mean() < 0.1
    assert order.tolist() != shuffled_within(rows, 5).tolist()
    # every text has an order of its own
    other = rows.text == 4
    assert (order[other] - int(other.nonzero()[0])).tolist() != alone.tolist()


def test_the_other_half_stands_beside_it_with_as_many_rows_and_units_of_its_own() -> None:
    source, other = Made(), Made(seed=1)
    views = Views(source, source.texts, recipe("halfbase", "halftuned", "same", "shuffled", "difference"), other=other)
    block = views.block(0)
    assert torch.equal(of(block, "halftuned"), other.rows(0).values[TUNED])
    assert len({len(value) for value in block.values()}) == 1
    of_whom = {
        "halfbase": other.affine(BASE),
        "halftuned": other.affine(TUNED),
        "same": source.affine(BASE),
        "shuffled": source.affine(TUNED),
    }
    # what is planted stays as large as it is, in the base's units
    of_whom["planted"] = source.affine(BASE)
    for view, expected in of_whom.items():
        torch.testing.assert_close(views.affine(replace(PLACE, model=view)).centre, expected.centre)
        assert views.affine(replace(PLACE, model=view)).scale == pytest.approx(expected.scale)
    moved = torch.cat([source.rows(number).values[TUNED] - source.rows(number).values[BASE] for number in range(2)])
    affine = views.affine(replace(PLACE, model="difference"))
    torch.testing.assert_close(affine.centre, moved.mean(0))
    assert affine.scale == pytest.approx(float((moved - moved.mean(0)).square().sum(1).mean() ** -0.5), rel=1e-5)
    # the mean of the difference is a part of how far tokens are moved
    assert views.recipe.moved([affine]) == pytest.approx(float(moved.square().sum(1).mean().sqrt()) / 3, rel=1e-5)


def test_of_halves_that_are_not_as_long_as_much_is_read_as_both_have() -> None:
    class Shorter(Made):
        def __init__(self) -> None:
            super().__init__(seed=1)
            self.blocks = 1

        def rows(self, number: int) -> Rows:
            rows = super().rows(number)
            return Rows({place: value[:70] for place, value in rows.values.items()}, rows.text[:70], rows.position[:70])

    for source, other in ((Made(), Shorter()), (Shorter(), Made())):
        views = Views(source, source.texts, recipe("halfbase", "difference"), other=other)
        assert views.blocks == 1
        block = views.block(0)
        assert {len(value) for value in block.values()} == {70}
        assert torch.equal(of(block, "halfbase"), other.rows(0).values[BASE][:70])
        assert torch.equal(of(block, "base"), source.rows(0).values[BASE][:70])


def test_a_place_that_fine_tuning_did_not_change_is_named() -> None:
    class Unchanged(Made):
        def rows(self, number: int) -> Rows:
            rows = super().rows(number)
            return Rows({BASE: rows.values[BASE], TUNED: rows.values[BASE]}, rows.text, rows.position)

    source = Unchanged()
    with pytest.raises(ModelError, match="base and tuned model do not differ at resid1: name a later place"):
        Views(source, source.texts, recipe("difference")).affine(replace(PLACE, model="difference"))


def test_one_token_that_differs_is_a_change() -> None:
    given, model = texts_of_lengths((12, 9, 14), seed=2), families.build("gpt2")
    token = given.pairs[2].clean[5]
    with torch.no_grad():
        model.transformer.wte.weight[token] += 1
    models = {"base": families.subject("gpt2"), "tuned": load(model)}
    reader = Reader(models, model_places(WHERE, list(models)), TokenSettings())
    require_change(reader, given, WHERE, Execution(8))
    without = replace(given, pairs=tuple(pair for pair in given if token not in pair.clean))
    assert len(without) > 0
    with pytest.raises(ModelError, match="do not differ at resid1: name a later place"):
        require_change(reader, without, WHERE, Execution(8))


def test_a_recipe_comes_back_from_plain_values() -> None:
    made = replace(recipe("planted", plant=Plant(((7, 9), (11,)), 0.5, 3)), seed=4)
    assert Recipe.from_json(made.to_json()) == made


@cache
def trained() -> tuple[dict[str, tuple[Dictionary, pd.DataFrame]], Plant]:
    """Train dictionaries on all views at once, and judge them on activations that they have not seen; and what was planted."""
    source, several = Made(), comparisons(("same", "planted", "shuffled pairs"), {}, difference=False)
    plant = Plant.chosen(source.texts, directions=2, share=0.03, strength=0.6, seed=0)
    made = replace(recipe(plant=plant), views=views_of(several))
    plans = {
        each.name: Plan(
            each.layout(WHERE, [WIDTH], 64, Rule("batchtopk", 4, by_norm=True)), Objective(norms="free"), apart=each.control == "same"
        )
        for each in several
    }
    found = train(Views(source, source.texts, made), plans, training=FeatureTraining(steps=400, batch=256, learning_rate=5e-3))
    judged, unseen = {}, Made(seed=2)
    block = Views(unseen, unseen.texts, made).block(0)
    for name, each in found.items():
        inputs = [block[place] for place in each.dictionary.layout.inputs]
        judged[name] = (
            each.dictionary,
            classified(scaled_latents(each.dictionary, scaling_sums(each.dictionary, inputs)[0]), ExclusiveSettings()),
        )
    return judged, plant


def test_what_fine_tuning_added_is_found_and_nothing_between_equal_models() -> None:
    judged, _ = trained()
    dictionary, latents = judged["crosscoder"]
    new = latents[latents["judged"] == "new"]
    assert len(new) >= 1
    decoders = torch.nn.functional.normalize(dictionary.tensors["decoder.0"][torch.tensor(new["latent"].to_numpy())][:, WIDTH:], dim=1)
    assert (decoders @ NEW).max() > 0.95
    # what the base holds too is shared, and equal models have nothing of their own though no latent begins as one that they share
    assert (latents["by_norm"] == "shared").sum() > 20
    _, same = judged["same"]
    assert not (same["judged"] != "").any()
    assert (same["by_norm"] == "shared").sum() > 20


def test_equal_models_can_be_said_to_differ_where_their_decoders_were_left_apart() -> None:
    # both hold f (u + 0.2 v); the second's decoders say v twice, once against the other, and the first's hardly say it
    u, v = torch.eye(WIDTH)[0], torch.eye(WIDTH)[1]
    (several,) = (each for each in comparisons(("same",), {}) if each.control == "same")
    layout = several.layout(WHERE, [WIDTH], 2, Rule("relu"))
    decoders = [torch.cat([u + 0.05 * v, u - 0.8 * v]), torch.cat([0 * v, v])]
    tensors = layout.tensors() | {"encoder.0": torch.cat([u, u]).expand(2, -1) / 2, "decoder.0": torch.stack(decoders)}
    base = torch.rand(50, 1, generator=torch.Generator().manual_seed(0)) * (u + 0.2 * v)
    latents = scaled_latents(dictionary := Dictionary.plain(layout, tensors), scaling_sums(dictionary, [base, base])[0])
    judged = classified(latents, ExclusiveSettings()).iloc[1]
    assert (judged["relative_norm"], judged["nu_error"], judged["nu_reconstruction"]) == pytest.approx((1, 0.15, 0.25), abs=1e-5)
    assert (judged["by_norm"], judged["judged"]) == ("second only", "new")


def test_the_planted_effect_is_found_and_tokens_that_do_not_belong_together_share_little() -> None:
    judged, plant = trained()
    dictionary, latents = judged["planted"]
    new = torch.tensor(latents[latents["judged"] == "new"]["latent"].to_numpy())
    decoders = torch.nn.functional.normalize(dictionary.tensors["decoder.0"][new][:, WIDTH:].double(), dim=1)
    assert (plant.directions(PLACE, WIDTH) @ decoders.T).max(dim=1).values.min() > 0.9
    _, shuffled = judged["shuffled pairs"]
    _, together = judged["crosscoder"]
    assert (shuffled["by_norm"] == "shared").sum() < 0.2 * (together["by_norm"] == "shared").sum()
