"""A model trained until it does induction: its previous-token heads, its induction heads and the path between them are found."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mechscope.causal import ablate, attribution_patch, patch, path_patch
from mechscope.data.pairs import Pairs
from mechscope.data.tasks import induction
from mechscope.instrument import record
from mechscope.subject.load import Subject, load

WORDS, STEPS = 64, 450
PAIRS = induction(WORDS, 60, seed=9)


@lru_cache(maxsize=1)
def inductive() -> Subject:
    """Train a two-layer Llama on rows that repeat a random sequence of random length; about 20 s on one core."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=WORDS, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None, **shape)
    )
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 50)
        rows = []
        for _ in range(64):
            length = int(torch.randint(8, 17, (1,), generator=generator))
            rows.append(torch.randint(0, WORDS, (length,), generator=generator).repeat(5)[:32])
        ids = torch.stack(rows)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return load(model.double())


@lru_cache(maxsize=1)
def roles() -> tuple[np.ndarray, np.ndarray]:
    """Return each head's mean attention to the previous token, and to the token after the current one's earlier place: (layer, head)."""
    subject = inductive()
    half = torch.randint(0, WORDS, (32, 14), generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), record(subject, "pattern") as recording:
        subject.plain(half.repeat(1, 2), use_cache=False)
    maps = recording.stack("pattern")  # (layer, text, head, query, key)
    previous = maps.diagonal(-1, dim1=-2, dim2=-1).mean((1, 3))
    later = torch.arange(14, 28)
    after = maps[:, :, :, later, later - 13].mean((1, 3))
    return previous.numpy(), after.numpy()


def heads_by_role() -> tuple[set[str], set[str], set[str]]:
    """Return the previous-token heads, the induction heads, and the heads that are neither: the control."""
    previous, after = roles()
    heads = [(layer, head) for layer in range(2) for head in range(4)]
    first = {f"a{layer}.h{head}" for layer, head in heads if layer == 0 and previous[layer, head] > 0.35}
    second = {f"a{layer}.h{head}" for layer, head in heads if after[layer, head] > 0.4}
    return first, second, {f"a{layer}.h{head}" for layer, head in heads} - first - second


def sizes(table: pd.DataFrame, heads: set[str]) -> pd.Series:
    """Return the absolute effects of some heads."""
    return table.set_index("component")["effect"].abs().reindex(sorted(heads)).dropna()


def test_the_model_does_induction_and_its_roles_are_plain_to_see() -> None:
    right, subject = 0, inductive()
    with torch.no_grad():
        for pair in PAIRS:
            right += int(subject.plain(torch.tensor([pair.clean]), use_cache=False).logits[0, -1].argmax()) in pair.answers
    assert right > 48  # of 60; chance is one
    previous, induction_heads, others = heads_by_role()
    assert previous
    assert {name[:2] for name in induction_heads} == {"a1"}
    assert others


def test_noising_finds_the_induction_heads_far_above_the_control() -> None:
    _, induction_heads, others = heads_by_role()
    found = patch(inductive(), PAIRS, direction="noise").table
    assert sizes(found, induction_heads).min() > 3 * sizes(found, others).max()
    assert (found.set_index("component").loc[sorted(induction_heads), "high"] < 0).all()


def test_ablation_finds_the_previous_token_heads_far_above_the_control() -> None:
    previous, _, others = heads_by_role()
    found = ablate(inductive(), PAIRS, sites=["head"], source="resample", metric="logit-diff").table
    assert sizes(found, previous).min() > 2 * sizes(found, others).max()


def test_the_path_between_them_is_composition_through_the_key() -> None:
    previous, induction_heads, others = heads_by_role()
    clue = other_clue()
    for receiver in sorted(induction_heads):
        by_key, by_query = (path_patch(inductive(), clue, "layers:0", [f"{receiver}<{site}>"]).table for site in "kq")
        composed = sizes(by_key, previous)
        assert composed.min() > 5 * sizes(by_key, others).max()
        assert composed.min() > 5 * sizes(by_query, previous | others).max()


def other_clue() -> Pairs:
    """Return pairs whose corrupt text has another token before the answer's earlier place: the clue that the previous-token head moves."""
    changed = []
    for pair in PAIRS:
        corrupt = list(pair.clean)
        for at in range(*pair.segments["first"][0]):
            corrupt[at] = (corrupt[at] + 29) % WORDS
        changed.append(replace(pair, corrupt=tuple(corrupt)))
    return Pairs(tuple(changed), "clue")


def test_attribution_agrees_with_patching_on_which_heads_matter() -> None:
    assert attribution_patch(inductive(), PAIRS, direction="noise", check=8).notes["rank_correlation"] > 0.6
