"""Heads turned at random: turns keep lengths and positions, random models are named as seldom as promised, and known heads of real models are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope.data.pairs import collate_pairs
from mechscope.heads import copying_roles, pattern_roles, roles_table
from mechscope.heads.turned import Turns, commuting, false_share, orthogonal, reached
from mechscope.instrument import AttentionCall, Walk, observed
from mechscope.instrument.execution import Execution
from mechscope.subject.load import load
from mechscope.weights import position_turn
from tests import families
from tests.contract.technique import texts


@pytest.mark.parametrize("family", families.FAMILIES)
def test_turns_commute_with_a_shift_by_one_position(family: str) -> None:
    shift = position_turn(families.subject(family, torch.float64), 1).numpy()
    np.testing.assert_allclose(shift @ shift.T, np.eye(len(shift)), rtol=0, atol=1e-6)
    turns = commuting(shift, 5, np.random.default_rng(0))
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(len(shift)), turns.shape), rtol=0, atol=1e-12)
    np.testing.assert_allclose(turns @ shift, shift @ turns, rtol=0, atol=1e-6)
    if family in ("gpt2", "opt"):
        np.testing.assert_array_equal(shift, np.eye(len(shift)))
    # they are turns: none is near the identity, and two differ
    assert np.abs(turns - np.eye(len(shift))).max(axis=(1, 2)).min() > 0.1
    assert np.abs(turns[0] - turns[1]).max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
@torch.no_grad()
def test_scores_of_turned_heads_depend_on_distance_alone_where_those_of_heads_do(family: str) -> None:
    """Of one token repeated, a rotary layer that reads it sees distance only; turning keeps that. Lengths of queries and values stay in every family."""
    subject, calls = families.subject(family, torch.float64), list[AttentionCall]()
    with observed(subject, calls.append):
        Walk(subject, torch.full((1, 12), 7)).run()
    turned = list[AttentionCall]()

    def kept(call: AttentionCall, batch: object) -> torch.Tensor:
        turned.append(call)
        return call.z

    Turns(subject, seed=0, draws=2).each(kept)(calls[0], collate_pairs(texts((5, 5)).pairs))
    assert len(turned) == 2
    for call in turned:
        for part in ("query", "value", "z"):
            torch.testing.assert_close(getattr(call, part).norm(dim=-1), getattr(calls[0], part).norm(dim=-1), rtol=1e-5, atol=1e-7)
        assert not torch.allclose(call.query, calls[0].query, atol=1e-2)
        assert torch.equal(call.key, calls[0].key)
        if family != "gpt2":
            key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
            scores = (call.query @ key.transpose(-1, -2))[0]
            for distance in (0, 1, 5):
                along = scores.diagonal(-distance, -2, -1)
                torch.testing.assert_close(along, along[..., :1].expand_as(along), rtol=0, atol=1e-4)


def test_the_share_of_false_ones_is_counted_from_turned_heads() -> None:
    """By hand: of 3 heads and 4 draws, above .9 lies no turned head: (1 + 0) / 5 / 1; above .5 lie two: (1 + 2) / 5 / 2."""
    own = np.array([[0.9, 0.5, -1.0]])
    turned = np.array([[[0.6, 0.1, 0.0]], [[0.7, 0.1, 0.0]], [[0.4, 0.1, 0.0]], [[np.nan, 0.1, 0.0]]])
    np.testing.assert_allclose(false_share(own, turned), [[1 / 5, 3 / 10, 12 / 15]])
    # a better one below lowers the share above it
    np.testing.assert_allclose(false_share(np.array([[0.65, 0.65, 0.65]]), turned), [[2 / 15] * 3])
    assert np.isnan(false_share(np.array([[np.nan]]), turned[:, :, :1])).all()
    assert reached(turned, 0, 0.2) == 0.7
    assert reached(turned, 3, 0.2) == 0.4


@pytest.mark.parametrize("models", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_random_models_are_named_by_turning_as_seldom_as_promised(models: int) -> None:
    """Weights so large that every head has a taste of its own, the same in every text: a test of means over texts names heads in every model."""
    named = pd.DataFrame([_named(seed) for seed in range(models)]).mean()
    assert set(named.index) == {"previous-token", "duplicate-token", "induction", "induction-offset", "copying", "negative-ov"}
    assert named.max() <= 0.05 + 3 * (0.05 * 0.95 / models) ** 0.5
    assert 0 < named.mean() <= 0.05 + 2 * (0.05 * 0.95 / (6 * models)) ** 0.5


def _named(seed: int) -> pd.Series:
    subject, execution = load(families.build("gpt2", torch.float32, 1000 + seed)), Execution(seed=seed)
    scores = (*pattern_roles(subject, n=6, execution=execution), *copying_roles(subject, n=64, execution=execution))
    freely = [replace(one, role=replace(one.role, least=-np.inf)) for one in scores if one.role.least is not None]
    return roles_table(freely).groupby("role")["has_role"].any()


@pytest.mark.parametrize(("checkpoint", "inducing"), [("from-scratch", {"a1.h0"}), ("checkpoint-0", {"a1.h0"}), ("checkpoint-400", set())])
def test_the_known_heads_of_a_real_model_are_found_and_fine_tuning_dissolves_induction(
    shared: Path, checkpoint: str, inducing: set[str]
) -> None:
    table = roles_table(pattern_roles(load(str(shared / "models" / "induction-2L" / checkpoint)), n=32))
    named = {role: set(rows["component"]) for role, rows in table[table["has_role"]].groupby("role")}
    assert named == {"previous-token": {"a0.h0"}} | ({"induction": inducing} if inducing else {})


def test_a_previous_token_head_below_the_old_threshold_is_found(shared: Path) -> None:
    """A quarter of a row on the token before, three times what its neighbours give: .3 of a row missed it."""
    table = roles_table(pattern_roles(load(str(shared / "models" / "TinyStories-656K")), n=32)).query("role == 'previous-token'")
    named = table[table["has_role"]].set_index("component")["score"]
    assert "a1.h1" in named.index
    assert named["a1.h1"] < 0.3


def test_orthogonal_matrices_of_one_dimension_are_signs() -> None:
    assert set(orthogonal(1, 20, np.random.default_rng(0)).ravel()) == {-1.0, 1.0}
