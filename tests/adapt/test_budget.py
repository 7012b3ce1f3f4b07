"""Placements can be given the same number of parameters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechscope.adapt.budget import TOLERANCE, spend
from mechscope.adapt.targets import Target, find_targets, place
from mechscope.errors import SettingsError
from mechscope.subject.components import Components


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("where", ["layers:0", "layers:1,2", "a0.h1,a1.h0,a1.h3,a2.h2", "a0.h0,a2.h1,m1"])
@pytest.mark.parametrize("rank", [2, 3])
def test_any_selection_matches_the_budget_of_the_standard(make_subject, family, where, rank):
    subject = make_subject(family, **({"n_embd": 64} if family == "gpt2" else {"hidden_size": 64}))
    standard = place(subject, Components.of_layers(range(3)), rank=rank)
    found = spend(find_targets(subject, Components.parse(where)), standard.trainable_parameters)
    assert found.trainable_parameters == pytest.approx(standard.trainable_parameters, rel=TOLERANCE)
    assert all(rank <= target.capacity for target, rank in zip(found.targets, found.ranks, strict=True))


def test_a_third_of_the_layers_gets_three_times_the_rank(make_subject):
    subject = make_subject("gpt2")
    standard = place(subject, Components.of_layers(range(3)), rank=4)
    found = spend(find_targets(subject, Components.parse("layers:1")), standard.trainable_parameters)
    assert found.ranks == (12, 12)


def test_what_is_held_already_is_part_of_the_budget(make_subject):
    subject = make_subject("gpt2")
    standard = place(subject, Components.of_layers(range(3)), rank=4)
    low = [(target, 2) for target in find_targets(subject, Components.parse("layers:0,2"))]
    found = spend(find_targets(subject, Components.parse("layers:1")), standard.trainable_parameters, fixed=low)
    # 3 · 4 = 2 + 2 + 8
    assert found.ranks == (8, 8, 2, 2, 2, 2)
    assert found.trainable_parameters == standard.trainable_parameters


def test_an_impossible_budget_names_the_nearest(make_subject):
    subject = make_subject("gpt2")
    head = find_targets(subject, Components.parse("a0.h0"))
    most = (32 + 24) * 24 + (32 + 8) * 8
    with pytest.raises(SettingsError, match=rf"targeted_heads cannot have 9,000 trainable parameters.*nearest is {most:,}.*select more"):
        spend(head, 9000, what="targeted_heads")


def test_a_budget_below_rank_one_is_refused(make_subject):
    with pytest.raises(SettingsError, match="fewer components"):
        spend(find_targets(make_subject("gpt2"), Components.parse("layers:0,1,2")), 100)


sizes = st.tuples(st.integers(1, 60), st.integers(1, 60))


@given(st.lists(sizes, min_size=1, max_size=8), st.data())
def test_a_budget_that_some_common_rank_meets_exactly_is_met_exactly(shapes, data):
    targets = [Target(str(index), rows, columns, conv1d=False) for index, (rows, columns) in enumerate(shapes)]
    rank = data.draw(st.integers(1, max(target.capacity for target in targets)))
    budget = sum(target.cost * min(rank, target.capacity) for target in targets)
    assert spend(targets, budget).trainable_parameters == budget
