"""On the newsroom, swapping one fact is traced to the tokens of that fact: the shipped model reads it there and nowhere else."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from mechscope.causal import attention_knockout, patch
from mechscope.data.newsroom import newsroom_model_path
from mechscope.data.newsroom_pairs import newsroom_pairs
from mechscope.data.pairs import Pairs
from mechscope.subject.load import Subject, load


@lru_cache(maxsize=1)
def model() -> Subject:
    return load(newsroom_model_path())


@lru_cache(maxsize=4)
def facts(role: Any) -> Pairs:
    """Return articles with one fact swapped, and as many other tokens of each as a control."""
    pairs, drawn = newsroom_pairs(24, role=role), random.Random(0)
    with_control = []
    for pair in pairs:
        fact = {at for span in pair.segments["fact"] for at in range(*span)}
        others = drawn.sample([at for at in range(len(pair.clean) - 1) if at not in fact], len(fact))
        with_control.append(replace(pair, segments={**pair.segments, "control": tuple((at, at + 1) for at in sorted(others))}))
    return Pairs(tuple(with_control), pairs.source)


@pytest.mark.parametrize("role", ["what", "when"])
def test_only_the_facts_tokens_carry_it_at_the_first_block_and_the_end_carries_it_at_the_last(role: str) -> None:
    table = patch(model(), facts(role), site="residual", positions=["fact", "control", "last"]).table
    shares = table.set_index(["layer", "positions"])["normalised"]
    assert shares[0, "fact"] > 0.8
    assert abs(shares[0, "control"]) < 0.1
    assert shares[5, "last"] == pytest.approx(1.0, abs=1e-3)
    assert abs(shares[5, "fact"]) < 0.05
    row = table[(table["layer"] == 0) & (table["positions"] == "fact")].iloc[0]
    assert row["low"] > 0


@pytest.mark.parametrize("role", ["what", "when"])
def test_an_end_that_cannot_see_the_fact_loses_the_answer_and_as_many_other_tokens_cost_far_less(role: str) -> None:
    # a window of six layers around layer 2 is the whole model
    blind, control = (
        attention_knockout(model(), facts(role), queries="last", keys=keys, window=6, components="layers:2").table.iloc[0]
        for keys in ("fact", "control")
    )
    assert blind["high"] < 0
    assert abs(control["effect"]) < abs(blind["effect"]) / 3
