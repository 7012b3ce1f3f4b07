"""What is compared with what, and what held-out texts say of every dictionary: text by text, whatever the batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.errors import DataError
from mechscope.features.diffing import DIFFERENCE, Judged, Recipe, comparisons, judge, model_places
from mechscope.features.diffing.comparisons import views_of
from mechscope.features.places import places
from mechscope.features.rows import Reader
from mechscope.features.rules import Rule
from mechscope.instrument import Execution, model_inputs, record
from mechscope.settings.features import TokenSettings
from mechscope.subject import Subject
from tests import families
from tests.causal.pairs import random_pairs
from tests.difference.oracle import models
from tests.features import oracle

WHERE = places("resid1")
TEXTS = random_pairs(5)
BOTH = models("gpt2")
# tokens of each text that are left out
FIRST = 2


@torch.no_grad()
def stream(subject: Subject, ids: tuple[int, ...]) -> Tensor:
    """Return what stands behind block 1, of the tokens that are read."""
    with record(subject, "residual", layers={1}) as recording:
        subject.model(**model_inputs(torch.tensor([ids]), None))
    return recording["residual", 1][0, FIRST:]


def reader(first: int = FIRST) -> Reader:
    named = {"base": BOTH.base, "tuned": BOTH.tuned}
    return Reader(named, model_places(WHERE, list(named)), TokenSettings(first=first, outlier=None))


def judged(first: int = FIRST, *, tokens: int = 100) -> dict[str, Judged]:
    return judge(reader(first), DICTIONARIES, RECIPE, TEXTS, execution=Execution(tokens))


COMPARED = comparisons((), {})
RECIPE = Recipe(WHERE, views_of(COMPARED), None, {}, 0)
DICTIONARIES = {
    each.name: oracle.dictionary(each.layout(WHERE, [families.WIDTH], 30, Rule("topk", 7 - len(each.views))), scale=0.5)
    for each in COMPARED
}


def test_the_two_models_own_come_first_and_every_other_training_stands_beside_the_base() -> None:
    found = comparisons(("shuffled pairs", "same", "half", "planted"), {"other0": ("seed 1", "seed"), "other1": ("news", "other")})
    assert [(each.name, each.views, each.control) for each in found] == [
        ("crosscoder", ("base", "tuned"), ""),
        ("difference", ("difference",), ""),
        ("same", ("base", "same"), "same"),
        ("half", ("halfbase", "halftuned"), "half"),
        ("planted", ("base", "planted"), "planted"),
        ("shuffled pairs", ("base", "shuffled"), "shuffled pairs"),
        ("seed 1", ("base", "other0"), "seed"),
        ("news", ("base", "other1"), "other"),
    ]
    assert [each.name for each in comparisons(("half",), {}, difference=False)] == ["crosscoder", "half"]
    assert views_of(found[2:4]) == ("base", "tuned", "same", "halfbase", "halftuned")


@pytest.mark.parametrize("tokens", [100, 1], ids=["one batch", "a batch for each text"])
def test_every_dictionary_is_judged_text_by_text(tokens: int) -> None:
    found = judged(tokens=tokens)
    for name, dictionary in DICTIONARIES.items():
        own = found[name]
        squares = torch.zeros(30, dtype=torch.float64)
        for number, text in enumerate(TEXTS):
            base, tuned = (stream(subject, text.clean) for subject in (BOTH.base, BOTH.tuned))
            values = [tuned - base] if name == DIFFERENCE else [base, tuned]
            f, rebuilt = oracle.encode(dictionary, values), oracle.reconstruct(dictionary, values)
            assert own.tokens[number] == len(text.clean) - FIRST
            assert own.active[number] == (f != 0).sum()
            for model, (x, y, each) in enumerate(zip(values, rebuilt, dictionary.output_maps, strict=True)):
                assert own.missed[model, number] == pytest.approx(float(((x - y) * each.scale).square().sum()))
                assert own.squares[model, number] == pytest.approx(float(((x - each.centre) * each.scale).square().sum()))
            squares += f.square().sum(0)
        assert own.missed.shape == (1 if name == DIFFERENCE else 2, len(TEXTS))
        assert own.sums.tokens == own.tokens.sum()
        np.testing.assert_allclose(own.sums.squares, squares, rtol=1e-9)


def test_texts_of_which_nothing_is_left_are_refused() -> None:
    with pytest.raises(DataError, match=r"no token of the 5 texts .* is left: the first 100 of each"):
        judged(first=100)
