"""Texts are held out at random, and equal ones are on one side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.data.splits import folds, held_out, judged_on
from mechscope.errors import DataError


def pairs(count: int) -> Pairs:
    return Pairs(tuple(PromptPair(str(at), (at, 1), (at, 2)) for at in range(count)), "made")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.95])
def test_a_share_of_the_different_texts_is_judged_on_and_equal_ones_are_on_one_side(share: float, seed: int) -> None:
    # 20 different texts, of which the first comes 20 times
    texts = [(at,) for at in [*range(20), *[0] * 19]]
    chosen = judged_on(texts, share, seed, source="made")
    sides = [{text for text, judged in zip(texts, chosen, strict=True) if judged == side} for side in (True, False)]
    assert not sides[0] & sides[1]
    assert (len(sides[0]), len(sides[1])) == (20 * share, 20 - 20 * share)


def test_every_text_is_judged_on_by_some_seed() -> None:
    counts = np.mean([judged_on(range(8), 0.25, seed, source="made") for seed in range(400)], axis=0)
    # a quarter each, within four standard errors
    assert counts == pytest.approx(np.full(8, 0.25), abs=4 * (0.25 * 0.75 / 400) ** 0.5)


def test_equal_texts_fall_on_one_side() -> None:
    doubled = Pairs(pairs(16).pairs * 2, "twice")
    train, test = held_out(doubled, 0.25, 0)
    assert len(test) == 8
    assert not {pair.clean for pair in train} & {pair.clean for pair in test}
    assert sorted([*train, *test], key=lambda pair: pair.id) == sorted(doubled, key=lambda pair: pair.id)
    with pytest.raises(DataError, match="give at least two"):
        held_out(Pairs(doubled.pairs[:1] * 3, "one"), 0.3, 0)


def test_where_only_clean_texts_are_read_they_alone_decide_what_is_equal() -> None:
    one = pairs(4)
    turned = replace(one, pairs=(*one.pairs, *(replace(pair, corrupt=(*pair.corrupt[:1], 9)) for pair in one)))
    straddling = 0
    for seed in range(10):
        train, test = held_out(turned, 0.5, seed, of_pairs=False)
        assert not {pair.clean for pair in train} & {pair.clean for pair in test}
        train, test = held_out(turned, 0.5, seed)
        straddling += bool({pair.clean for pair in train} & {pair.clean for pair in test})
    # as pairs they differ
    assert straddling > 5


def test_folds_have_as_many_of_every_stratum_and_equal_texts_fall_into_one() -> None:
    random = np.random.default_rng(0)
    texts = [(int(each),) for each in random.integers(40, size=200)]
    strata = [text[0] % 3 for text in texts]
    fold = folds(texts, 5, 0, strata=strata, source="made")
    of_text: dict[tuple[int, ...], set[int]] = {}
    for text, each in zip(texts, fold.tolist(), strict=True):
        of_text.setdefault(text, set()).add(each)
    assert all(len(each) == 1 for each in of_text.values())
    for stratum in range(3):
        counts = np.bincount([min(each) for text, each in of_text.items() if text[0] % 3 == stratum], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert not np.array_equal(fold, folds(texts, 5, 1, strata=strata, source="made"))
    with pytest.raises(DataError, match="made has 2 different texts, 3 folds need as many"):
        folds([1, 2, 1], 3, 0, strata=[0, 0, 0], source="made")
