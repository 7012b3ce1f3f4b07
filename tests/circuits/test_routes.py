"""Information-flow routes equal the authors' formula, token by token and sender by sender."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from mechscope.circuits.graph import Graph
from mechscope.circuits.routes import flow_routes
from mechscope.circuits.scores import EdgeScores
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.errors import DataError
from mechscope.instrument.execution import Execution
from mechscope.subject.load import Subject, load
from tests import families
from tests.causal.pairs import random_pairs
from tests.circuits.brute import KINDS, TOLERANCE, brute_written, everything

FOUR = ("gpt2", "gpt_neox", "llama", "gemma2")
TEXTS = random_pairs(3)  # 9, 12 and 7 tokens


@lru_cache
def subject_of(kind: str) -> Subject:
    family, _, sequential = kind.partition(" ")
    if sequential:
        return load(families.build(family, torch.float64, use_parallel_residual=False))
    return families.subject(family, torch.float64)


@lru_cache
def flow(kind: str, tokens_per_batch: int = 512) -> EdgeScores:
    return flow_routes(subject_of(kind), TEXTS, execution=Execution(tokens_per_batch=tokens_per_batch))


@lru_cache
@torch.no_grad()
def by_hand(kind: str, place: int) -> dict[str, float]:
    """Return every edge's share in one text: max(0, |x| − |x − w|) in the L1 norm over its sum, averaged over tokens."""
    family = kind.partition(" ")[0]
    subject, text = subject_of(kind), TEXTS.pairs[place]
    parts, graph = KINDS[family](subject.model), Graph.of(subject)
    written = brute_written(subject.model, family, text.clean)
    found = {}
    for receiver in graph.receivers:
        senders = [name for name in graph.senders if f"{name}->{receiver}" in graph.names]
        layers = range(families.LAYERS)
        # a layer's projection adds its bias together with its heads
        biases = sum(any(name.startswith(f"a{layer}.") for name in senders) for layer in layers)
        x = everything(parts)(receiver, {name: written[name] for name in senders}, biases)
        shares = dict.fromkeys(senders, 0.0)
        for token in range(len(text.clean)):
            whole = float(x[token].abs().sum())
            near = {name: max(0.0, whole - float((x[token] - written[name][token]).abs().sum())) for name in senders}
            for name, value in near.items():
                shares[name] += value / sum(near.values()) / len(text.clean)
        found.update({f"{name}->{receiver}": share for name, share in shares.items()})
    return found


@pytest.mark.parametrize("tokens_per_batch", [1, 512])
@pytest.mark.parametrize("kind", [*FOUR, "gpt_neox sequential"])
def test_shares_are_those_of_a_loop_over_tokens_and_senders(kind: str, tokens_per_batch: int) -> None:
    scores = flow(kind, tokens_per_batch)
    assert scores.per_text is not None
    tolerance = TOLERANCE[kind.partition(" ")[0]]
    expected = [[by_hand(kind, place)[name] for name in scores.graph.names] for place in range(len(TEXTS))]
    np.testing.assert_allclose(scores.per_text, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(scores.mean, np.mean(expected, axis=0), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", FOUR)
def test_the_shares_into_every_receiver_sum_to_one(kind: str) -> None:
    scores = flow(kind)
    assert scores.per_text is not None
    assert (scores.per_text >= 0).all()
    into = scores.graph.matrix(scores.per_text).sum(1)  # (text, receiver)
    np.testing.assert_allclose(into, 1, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", FOUR)
def test_all_queries_keys_and_values_of_a_layer_read_the_same_stream(kind: str) -> None:
    scores = flow(kind)
    table = scores.table()
    readers = table[table["receiver"].str.contains("<")]
    per_reader = readers.groupby(["sender", "receiver_layer"])["score"]
    assert per_reader.size().eq(3 * families.HEADS).all()
    assert per_reader.nunique().eq(1).all()
    # layers differ, so it is not one number for all
    assert readers[readers["sender"] == "embed"].groupby("receiver_layer")["score"].first().nunique() == families.LAYERS


def test_who_writes_nothing_gives_nothing_and_who_writes_alone_gives_all() -> None:
    model = families.build("gpt2", torch.float64)
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[16:24] = 0  # head 2 of width 8
    table = flow_routes(load(model), TEXTS).table().set_index("edge")["score"]
    silent = table[[name.startswith("a1.h2->") for name in table.index]]
    assert len(silent)
    assert (silent == 0).all()
    first = table[[name.startswith("embed->a0.") for name in table.index]]
    np.testing.assert_allclose(first, 1, rtol=0, atol=1e-12)
    assert table["a1.h1->m2"] > 0


def test_one_forward_pass_is_all_it_costs_and_no_corrupt_text_is_read() -> None:
    swapped = random_pairs(3).swapped()
    clean_only = type(swapped)(tuple(PromptPair(p.id, p.corrupt, p.corrupt) for p in swapped), "without corrupt texts")
    found = flow_routes(subject_of("gpt2"), clean_only)
    np.testing.assert_array_equal(found.mean, flow("gpt2").mean)
    assert (found.cost.forward, found.cost.backward) == (1, 0)


def test_texts_that_do_not_fit_are_refused() -> None:
    long = random_pairs(1, lengths=(families.POSITIONS + 1,))
    with pytest.raises(DataError, match="65 tokens, the model reads 64"):
        flow_routes(subject_of("gpt2"), long)


def test_shares_which_are_never_negative_are_not_tested_against_zero() -> None:
    """On a random model every edge would be certain: 100 % had q < .05."""
    subject = families.subject("gpt2", torch.float64)
    texts = [PromptPair(str(at), tuple(range(3 + at, 9 + at)), tuple(range(4 + at, 10 + at))) for at in range(6)]
    table = flow_routes(subject, Pairs(tuple(texts), "texts")).table()
    assert {"score", "se", "low", "high"} <= set(table)
    assert not {"p", "q"} & set(table)
