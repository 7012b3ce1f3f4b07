"""A knockout is the model with those scores at −∞, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mechscope.causal import knock_out
from mechscope.data.metrics import pair_metric
from mechscope.data.pairs import collate_pairs
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
    found = knock_out(subject, PAIRS, keys=keys, window=2)
    assert list(found.table["component"]) == ["layers:0-1", "layers:1-2", "layers:2"]
    for row, layers in enumerate([(0, 1), (1, 2), (2,)]):
        np.testing.assert_allclose(found.values[row], by_hand(family, layers, None, keys), rtol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_single_heads_are_cut_alone(family: str) -> None:
    found = knock_out(families.subject(family, torch.float64), PAIRS, keys="changed fact", each_head=True, components="a1.h2,a2.h0")
    assert list(found.table["component"]) == ["a1.h2", "a2.h0"]
    np.testing.assert_allclose(found.values[0], by_hand(family, (1,), 2, [2, 4]), rtol=1e-9)
    np.testing.assert_allclose(found.values[1], by_hand(family, (2,), 0, [2, 4]), rtol=1e-9)


def test_cutting_what_cannot_be_seen_anyway_is_refused() -> None:
    subject = families.subject("gpt2")
    with pytest.raises(
        SettingsError, match=r"keys 'last' all stand behind queries 'beginning', which cannot see them anyway: swap the two"
    ):
        knock_out(subject, PAIRS, keys="last", queries="beginning")


def test_bad_windows_and_positions_are_named() -> None:
    subject = families.subject("gpt2")
    with pytest.raises(SettingsError, match="a window of 9 layers does not fit a model of 3: choose 1 to 3"):
        knock_out(subject, PAIRS, keys="changed", window=9)
    with pytest.raises(DataError, match="positions 'subject' are not known in pair 'pair 1': use all, last, changed, target, changed fact"):
        knock_out(subject, PAIRS, keys="subject")
    with pytest.raises(DataError, match="position 40 lies outside pair"):
        knock_out(subject, PAIRS, keys=[40])
