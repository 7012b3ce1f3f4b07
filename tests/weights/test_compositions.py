"""Composition scores are the dense formula's, and their baseline that of random rotations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mechscope.errors import ModelError, SettingsError
from mechscope.subject.load import load
from mechscope.subject.pair import pair
from mechscope.weights import composition, composition_change
from mechscope.weights.compositions import random_score
from tests import families
from tests.weights import oracle


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt", "gemma2"])
def test_every_pair_of_heads_scores_as_the_dense_matrices_say(family: str) -> None:
    subject = families.subject(family, torch.float64)
    table = composition(subject).set_index(["kind", "from", "to"]).to_dict("index")
    assert len(table) == 3 * 3 * families.HEADS**2, "three kinds, three pairs of layers"
    for later, head in subject.anatomy.heads():
        reads = oracle.head(subject.plain, family, later, head)
        for earlier, sender in subject.anatomy.heads():
            if earlier >= later:
                continue
            writes = oracle.head(subject.plain, family, earlier, sender).ov
            for kind, reader in (("q", reads.qk), ("k", reads.qk.T), ("v", reads.ov)):
                expected = torch.linalg.norm(writes @ reader) / torch.linalg.norm(writes) / torch.linalg.norm(reader)
                row = table[kind, f"a{earlier}.h{sender}", f"a{later}.h{head}"]
                assert row["score"] == pytest.approx(float(expected), abs=1e-7)
                assert (row["from_layer"], row["from_head"], row["to_layer"], row["to_head"]) == (earlier, sender, later, head)


def test_a_turn_between_query_and_key_counts_in_rotary_families_only() -> None:
    for family in ("gpt2", "llama"):
        here, there = (composition(families.subject(family, torch.float64), offset=offset) for offset in (0, 5))
        moved = (here["score"] - there["score"]).abs().groupby(here["kind"]).max()
        assert moved["v"] == 0
        assert (moved["q"] > 1e-3) == (family == "llama")
        assert (moved["k"] > 1e-3) == (family == "llama")


def rotations(size: int, n: int) -> Tensor:
    noise = torch.randn(n, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, r = torch.linalg.qr(noise)
    return q * r.diagonal(dim1=1, dim2=2).sign()[:, None]  # Haar measure


@pytest.mark.parametrize("spectra", [([1.0], [1.0]), ([1.0], [1.0, 0.5, 0.2]), ([3.0, 1.0, 1.0, 0.1], [1.0] * 6), ([1.0] * 8, [1.0] * 8)])
def test_the_baseline_is_that_of_random_rotations(spectra: tuple[list[float], list[float]]) -> None:
    size, n = 16, 20_000
    first, second = (torch.tensor(values, dtype=torch.float64) for values in spectra)
    turned = first[:, None] * rotations(size, n)[:, : len(first), : len(second)] * second
    scores = turned.square().sum((1, 2)).sqrt() / first.norm() / second.norm()
    one, two = ((values**4).sum() / values.square().sum() ** 2 for values in (first, second))
    mean, sd = random_score(one, two, size)
    assert float(mean.square() + sd.square()) == pytest.approx(1 / size, rel=1e-9)
    assert float(mean) == pytest.approx(float(scores.mean()), rel=0.015)
    assert float(sd) == pytest.approx(float(scores.std()), rel=0.06)


def test_circuits_of_all_directions_have_one_score() -> None:
    mean, sd = random_score(torch.tensor(1 / 24, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64), 24)
    assert float(mean) == pytest.approx(24**-0.5, rel=1e-9)
    assert float(sd) < 1e-7


def test_heads_of_random_weights_score_at_the_baseline_and_a_head_that_reads_another_far_above() -> None:
    model = families.build("llama", torch.float64, num_hidden_layers=6)
    table = composition(load(model))
    assert abs(table["z"].mean()) < 0.3
    assert 0.5 < table["z"].std() < 1.5
    with torch.no_grad():  # key head 1 of layer 3 (query heads 2 and 3) reads what head 1 of layer 0 writes
        reads, writes = model.model.layers[3].self_attn.k_proj.weight, model.model.layers[0].self_attn.o_proj.weight
        reads[8:] = writes[:, 8:16].T / model.model.layers[3].input_layernorm.weight
    planted = composition(load(model), kinds=("k",)).sort_values("z")
    best = planted.tail(2)
    assert set(zip(best["from"], best["to"], strict=True)) == {("a0.h1", "a3.h2"), ("a0.h1", "a3.h3")}
    assert best["z"].min() > 5


def test_a_circuit_that_is_zero_has_no_score() -> None:
    model = families.build("llama", torch.float64)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, :8] = 0
    table = composition(load(model), kinds=("v",))
    assert (table["score"].isna() == (table["from"] == "a0.h0")).all()


def test_norms_of_queries_and_keys_leave_values_only() -> None:
    subject = families.subject("qwen3")
    with pytest.raises(ModelError, match="qwen3"):
        composition(subject)
    assert set(composition(subject, kinds=("v",))["kind"]) == {"v"}
    with pytest.raises(SettingsError, match="q, k, v"):
        composition(subject, kinds=())


def test_the_change_is_tuned_less_base() -> None:
    base, tuned = load(families.build("llama", seed=0)), load(families.build("llama", seed=1))
    table, one, two = composition_change(pair(base, tuned)), composition(base), composition(tuned)
    assert table["change"].tolist() == (two["score"] - one["score"]).tolist()
    assert table["z_tuned"].tolist() == two["z"].tolist()
    assert table["from"].tolist() == one["from"].tolist()


def test_one_layer_has_no_pairs() -> None:
    assert composition(load(families.build("llama", num_hidden_layers=1))).empty
