"""Causal tracing restores exactly what was corrupted, by the token's role, and is the same for the same seed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope.causal import trace
from mechscope.causal.tracing import ROLES, role_of
from mechscope.data.metrics import pair_metric
from mechscope.data.pairs import Pairs, PromptPair, collate_pairs
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import observed
from tests import families


def texts(n: int = 3) -> Pairs:
    generator = torch.Generator().manual_seed(4)
    pairs = []
    for index in range(n):
        ids = tuple(torch.randint(3, families.VOCABULARY, (8 + index,), generator=generator).tolist())
        pairs.append(PromptPair(f"fact {index}", ids, ids, answers=(7 + index,), segments={"subject": ((1, 4),)}))
    return Pairs(tuple(pairs), "facts")


def test_tokens_are_named_by_their_role_in_the_text() -> None:
    assert role_of(texts().pairs[0], "subject") == ["", *ROLES[:3], ROLES[3], ROLES[4], ROLES[4], ROLES[5]]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_the_corrupted_run_is_the_model_on_noisy_embeddings(family: str) -> None:
    subject, pairs = families.subject(family, torch.float64), texts()
    found = trace(subject, pairs, samples=2, seed=5, tokens_per_batch=1)
    generator = torch.Generator().manual_seed(5)
    table = subject.plain.get_input_embeddings()
    ids = torch.tensor(sorted({token for pair in pairs for token in pair.clean}))
    spread = 3.0 * float(table(ids).std())
    # texts come longest first
    for row in reversed(range(len(pairs.pairs))):
        pair = pairs.pairs[row]
        batch = collate_pairs([pair])
        values = []
        for _ in range(2):
            noise = spread * torch.randn(1, len(pair.clean), families.WIDTH, generator=generator, dtype=torch.float64)
            noise[:, :1], noise[:, 4:] = 0, 0
            block = subject.anatomy.blocks[0].module
            handle = block.register_forward_pre_hook(
                lambda _, args, kwargs, noise=noise: ((args[0] + noise, *args[1:]), kwargs), with_kwargs=True
            )
            try:
                with torch.no_grad(), observed(subject):
                    logits = subject.plain(batch.clean, use_cache=False).logits
            finally:
                handle.remove()
            values.append(float(pair_metric("probability", batch)(logits)[0]))
        assert found.unchanged[row] == pytest.approx(np.mean(values), rel=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_restoring_the_last_tokens_last_residual_stream_undoes_the_corruption(family: str) -> None:
    found = trace(families.subject(family, torch.float64), texts(), samples=3)
    table = found.table.set_index(["layer", "positions"])
    assert table.loc[(2, "last token"), "normalised"] == pytest.approx(1.0, abs=1e-9)
    # behind the last block other tokens reach no logits
    for role in ROLES[:5]:
        assert table.loc[(2, role), "normalised"] == pytest.approx(0.0, abs=1e-9)


def test_restoring_a_sublayer_in_all_layers_at_all_tokens_of_a_role_differs_from_one_layer() -> None:
    subject = families.subject("gpt2", torch.float64)
    one, three = (trace(subject, texts(), site="mlp", window=window, samples=1) for window in (1, 3))
    assert np.nanmax(np.abs(one.values - three.values)) > 1e-6
    # a window around the middle layer of three is all layers
    rows = three.table["layer"] == 1
    assert rows.sum() == len(ROLES)


def test_equal_seeds_give_equal_tables_and_others_do_not() -> None:
    subject = families.subject("gpt2")
    one, two, other = (trace(subject, texts(), samples=2, seed=seed).table for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(one, two)
    assert not np.allclose(one["value"], other["value"], equal_nan=True)


def test_a_text_without_its_subject_is_named() -> None:
    subject = families.subject("gpt2")
    with pytest.raises(DataError, match=r"pair 'fact \d' has no segment 'hero' to corrupt; its segments: subject"):
        trace(subject, texts(), segment="hero")
    ends = Pairs((PromptPair("end", (3, 4, 5), (3, 4, 5), answers=(6,), segments={"subject": ((1, 3),)}),), "x")
    with pytest.raises(DataError, match="pair 'end': nothing follows segment 'subject'"):
        trace(subject, ends)
    with pytest.raises(SettingsError, match="site 'head' is not traced"):
        trace(subject, texts(), site="head")
