"""A knockout is the model with those scores at −∞, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.causal import attention_knockout
from mechscope.causal.knockout import attention_flow
from mechscope.data.metrics import pair_metric
from mechscope.data.pairs import Pairs, collate_pairs
from mechscope.errors import DataError, SettingsError
from mechscope.instrument.attention import observed
from tests import families
from tests.causal.pairs import random_pairs

PAIRS = random_pairs()


def by_hand(family: str, cut_layers: tuple[int, ...], head: int | None, keys: list[int]) -> list[float]:
    """Run each text alone; in the cut layers the last row of the pattern loses its keys and is renormalised."""
    subject = families.subject(family, torch.float64)
    found = []
    for pair in PAIRS:
        batch = collate_pairs([pair])

        def tap(call: Any) -> Any:
            if call.layer not in cut_layers:
                return None
            groups = call.query.shape[1] // call.key.shape[1]
            key, value = call.key.repeat_interleave(groups, 1), call.value.repeat_interleave(groups, 1)
            scores = call.query[:, :, -1][:, :, None] @ key.mT * call.scaling
            if call.softcap:
                scores = torch.tanh(scores / call.softcap) * call.softcap
            if call.window is not None:
                scores[..., : max(0, scores.shape[-1] - call.window)] = -torch.inf
            cut = scores.clone()
            cut[..., keys] = -torch.inf
            chosen = range(scores.shape[1]) if head is None else [head]
            z = call.z.clone()
            for h in chosen:
                z[:, -1, h] = (cut[:, h].softmax(-1) @ value[:, h])[:, 0]
            return z

        with torch.no_grad(), observed(subject, tap):
            logits = subject.plain(batch.clean, use_cache=False).logits
        found.append(float(pair_metric("logit-diff", batch)(logits)[0]))
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2", "mistral"])
def test_windows_of_layers_equal_the_pattern_cut_by_hand(family: str) -> None:
    subject = families.subject(family, torch.float64)
    keys = [5, 6]  # inside every text's sliding window
    found = attention_knockout(subject, PAIRS, keys=keys, window=2)
    assert list(found.table["component"]) == ["layers:0-1", "layers:1-2", "layers:2"]
    for row, layers in enumerate([(0, 1), (1, 2), (2,)]):
        np.testing.assert_allclose(found.values[row], by_hand(family, layers, None, keys), rtol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_single_heads_are_cut_alone(family: str) -> None:
    found = attention_knockout(
        families.subject(family, torch.float64), PAIRS, keys="changed fact", each_head=True, components="a1.h2,a2.h0"
    )
    assert list(found.table["component"]) == ["a1.h2", "a2.h0"]
    np.testing.assert_allclose(found.values[0], by_hand(family, (1,), 2, [2, 4]), rtol=1e-9)
    np.testing.assert_allclose(found.values[1], by_hand(family, (2,), 0, [2, 4]), rtol=1e-9)


def test_some_heads_of_a_window_are_cut_together() -> None:
    subject = families.subject("llama", torch.float64)
    found = attention_knockout(subject, PAIRS, keys=[1, 3], window=3, heads="a1.h2")
    # the window around layer 0 holds layer 1, as do the others
    for values in found.values:
        np.testing.assert_allclose(values, by_hand("llama", (1,), 2, [1, 3]), rtol=1e-9)
    elsewhere = attention_knockout(subject, PAIRS, keys=[1, 3], heads="a1.h2")
    np.testing.assert_allclose(elsewhere.values[[0, 2]], np.tile(elsewhere.unchanged, (2, 1)), rtol=1e-12)
    np.testing.assert_allclose(elsewhere.values[1], found.values[0], rtol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_flow_is_one_knockout_per_pair_of_segments_that_can_see_each_other(family: str) -> None:
    subject = families.subject(family, torch.float64)
    segments = ["beginning", "changed fact", "last"]
    found = attention_flow(subject, PAIRS, segments, window=2)
    asked = ["changed fact → beginning", "changed fact → changed fact", "last → beginning", "last → changed fact", "last → last"]
    assert list(found.table["positions"].unique()) == asked
    for positions in asked:
        queries, keys = positions.split(" → ")
        alone = attention_knockout(subject, PAIRS, queries=queries, keys=keys, window=2)
        rows = found.table["positions"] == positions
        np.testing.assert_allclose(found.values[rows], alone.values, rtol=1e-9)
        assert list(found.table["component"][rows]) == list(alone.table["component"])
    # the first token sees only itself: that cannot be cut
    assert found.notes["left_out"] == ["beginning → beginning", "beginning → changed fact", "beginning → last", "changed fact → last"]


def test_a_text_counts_only_where_flow_has_something_to_cut() -> None:
    subject = families.subject("gpt2", torch.float64)
    swapped = [
        replace(pair, segments={"one": ((1, 2),), "two": ((4, 5),)} if index else {"one": ((4, 5),), "two": ((1, 2),)})
        for index, pair in enumerate(PAIRS)
    ]
    found = attention_flow(subject, Pairs(tuple(swapped), "swapped"), ["one", "two"])
    counted = found.table.set_index(["positions", "layer"])["n"]
    assert [counted["one → two", 0], counted["two → one", 0], counted["one → one", 0]] == [1, 3, 4]
    first = attention_knockout(subject, Pairs((swapped[0],), "first"), queries="one", keys="two")
    np.testing.assert_allclose(found.values[found.table["positions"] == "one → two", 0], first.values[:, 0], rtol=1e-9)


def test_a_query_that_would_see_nothing_is_refused() -> None:
    subject = families.subject("gpt2")
    with pytest.raises(SettingsError, match=r"pair 'pair 1': token 11 of queries 'last' sees nothing but keys 'all': leave it out"):
        attention_knockout(subject, PAIRS, keys="all")
    with pytest.raises(SettingsError, match="token 0 of queries '0,-1' sees nothing but keys '0,1'"):
        attention_knockout(subject, PAIRS, queries=[0, -1], keys=[0, 1])


def test_segments_and_heads_that_make_no_sense_are_refused() -> None:
    subject = families.subject("gpt2")
    with pytest.raises(SettingsError, match="none of the segments beginning can see another"):
        attention_flow(subject, PAIRS, ["beginning"])
    with pytest.raises(SettingsError, match=r"segments \['last', 'last'\]: give one name or more, each once"):
        attention_flow(subject, PAIRS, ["last", "last"])
    with pytest.raises(DataError, match="positions 'subject' are not known in pair 'pair 1'"):
        attention_flow(subject, PAIRS, ["subject", "last"])
    with pytest.raises(SettingsError, match="each_head cuts single heads: choose those by components"):
        attention_knockout(subject, PAIRS, keys="changed", heads="a1.h2", each_head=True)


def test_cutting_what_cannot_be_seen_anyway_is_refused() -> None:
    subject = families.subject("gpt2")
    with pytest.raises(
        SettingsError, match=r"keys 'last' all stand behind queries 'beginning', which cannot see them anyway: swap the two"
    ):
        attention_knockout(subject, PAIRS, keys="last", queries="beginning")


def test_bad_windows_and_positions_are_named() -> None:
    subject = families.subject("gpt2")
    with pytest.raises(SettingsError, match="a window of 9 layers does not fit a model of 3: choose 1 to 3"):
        attention_knockout(subject, PAIRS, keys="changed", window=9)
    with pytest.raises(DataError, match="positions 'subject' are not known in pair 'pair 1': use all, last, changed, target, changed fact"):
        attention_knockout(subject, PAIRS, keys="subject")
    with pytest.raises(DataError, match="position 40 lies outside pair"):
        attention_knockout(subject, PAIRS, keys=[40])
