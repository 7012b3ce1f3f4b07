"""Where heads look in random text equals what Hugging Face's eager maps say, row by row; planted heads score their extremes, untrained ones chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mechscope.data.pairs import Pairs, collate_pairs
from mechscope.errors import DataError
from mechscope.heads import pattern_roles, roles_table
from mechscope.heads.pattern_roles import ROLES, _control, _looks, repeated_texts
from mechscope.instrument import Walk, observed
from mechscope.instrument.execution import Execution
from mechscope.subject.load import Subject, load
from tests import families
from tests.causal.test_known_truth import heads_by_role, inductive
from tests.circuits import planted


def scored(subject: Subject, n: int = 4, **options: Any) -> dict[str, Any]:
    return {one.role.name: one for one in pattern_roles(subject, n=n, **options)}


def by_hand(maps: torch.Tensor, half: int) -> dict[str, np.ndarray]:
    """Return each role's number from a text's maps, (layer, head, query, key), with loops; there is no start token."""
    length = maps.shape[-1]
    first, second = range(1, length), range(half, 2 * half)
    entropy = [-(p := maps[..., row, : row + 1].clamp(min=1e-300)).mul(p.log()).sum(-1) / np.log(row + 1) for row in first]
    return {
        "previous": torch.stack([maps[..., row, row - 1] for row in range(2, length)]).mean(0).numpy(),
        "again": torch.stack([maps[..., row, row - half] for row in second]).mean(0).numpy(),
        "behind": torch.stack([maps[..., row, row - half + 1] for row in second]).mean(0).numpy(),
        "sink": torch.stack([maps[..., row, 0] for row in first]).mean(0).numpy(),
        "broad": torch.stack(entropy).mean(0).numpy(),
    }


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3", "opt", "phi"])
@torch.no_grad()
def test_scores_are_means_over_the_maps(family):
    subject = families.subject(family, torch.float64)
    found, texts = scored(subject), repeated_texts(subject, 4)
    model = families.build(family, torch.float64)
    model.set_attn_implementation("eager")
    for number, pair in enumerate(texts):
        half = len(pair.clean) // 2
        maps = [
            torch.stack(model(torch.tensor([ids]), output_attentions=True).attentions)[:, 0].double() for ids in (pair.clean, pair.corrupt)
        ]
        clean, control = (by_hand(each, half) for each in maps)
        expected = {
            "previous-token": control["previous"],
            "duplicate-token": clean["again"],
            "induction": clean["behind"],
            "induction-offset": control["behind"],
            "attention-sink": control["sink"],
            "broad": control["broad"],
        }
        assert expected.keys() == found.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found[name].score[number], values, rtol=0, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(found["duplicate-token"].null[number], control["again"], rtol=0, atol=2e-5)
        np.testing.assert_allclose(found["induction"].null[number], control["behind"], rtol=0, atol=2e-5)
        length = 2 * half
        chance: dict[str, Any] = {
            "previous-token": np.mean([1 / (row + 1) for row in range(2, length)]),
            "induction-offset": np.mean([1 / (row + 1) for row in range(half, length)]),
            "attention-sink": np.mean([1 / (row + 1) for row in range(1, length)]),
            "broad": 1.0,
        }
        for name, value in chance.items():
            np.testing.assert_allclose(found[name].null[number], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2", "mistral"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(family):
    subject = families.subject(family, torch.float64)
    texts = repeated_texts(subject, 3)
    for reduce in (_control, _looks):

        def numbers(pairs: Pairs, side: Any, reduce: Any = reduce) -> torch.Tensor:
            batch, found = collate_pairs(pairs.pairs, padding=side), []
            with observed(subject, lambda call: found.append(reduce(call, batch))):
                Walk(subject, batch.clean, None if bool(batch.real.all()) else batch.real).run()
            return torch.stack(found, 1)

        alone = torch.cat([numbers(Pairs((pair,), "one"), "right") for pair in texts])
        for side in ("left", "right"):
            torch.testing.assert_close(numbers(texts, side), alone, rtol=0, atol=2e-6)


def test_a_window_hides_what_lies_behind_it():
    found = scored(families.subject("mistral", torch.float64))
    # the repetition lies at least 12 tokens back, the window holds 5
    assert (found["duplicate-token"].score == 0).all()
    # chance knows of the window: rows see at most 5 keys, so the token before is never one of many
    assert (found["previous-token"].null > 1 / 5.5).all()


def test_the_planted_induction_model_has_its_two_heads():
    table = roles_table(pattern_roles(planted.induction().subject, n=8))
    has = set(zip(table.loc[table["has_role"], "role"], table.loc[table["has_role"], "component"], strict=True))
    truth = planted.induction().truth
    previous = next(edge.split("->")[0] for edge in truth if edge.startswith("a0.") and "<k>" in edge)
    inducing = next(edge.split("->")[0] for edge in truth if edge.startswith("a1.") and edge.endswith("->logits"))
    assert ("previous-token", previous) in has
    assert ("induction", inducing) in has
    assert table.loc[(table["role"] == "previous-token") & (table["component"] == previous), "score"].item() > 0.95
    assert {component for role, component in has if role == "induction"} == {inducing}


def test_a_model_trained_to_do_induction_gets_the_roles_that_its_maps_and_ablations_give():
    previous, inducing, _ = heads_by_role()
    table = roles_table(pattern_roles(inductive(), n=16))
    has = {role: set(group["component"]) for role, group in table[table["has_role"]].groupby("role")}
    assert has["previous-token"] == previous
    assert has["induction"] == inducing
    # they look at content: without a repetition the same distance holds nothing
    assert table.loc[table["role"] == "induction-offset", "score"].max() < 0.15


@pytest.mark.parametrize("seed", range(3))
def test_untrained_models_score_at_the_null(seed):
    torch.manual_seed(seed)
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 64, "vocab_size": 300}
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
    )
    for model in (gpt2, llama):
        table = roles_table(pattern_roles(load(model.eval()), n=16, execution=Execution(seed=seed)))
        assert not table["has_role"].any()
        assert table["excess"].abs().max() < 0.01


def test_a_head_that_looks_at_all_alike_scores_one_for_breadth_and_chance_elsewhere():
    model = families.build("gpt2", torch.float64)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[:, : 2 * families.WIDTH] = 0
        model.transformer.h[1].attn.c_attn.bias[: 2 * families.WIDTH] = 0
    for name, one in scored(load(model)).items():
        np.testing.assert_allclose(one.score[:, 1], one.null[:, 1], rtol=0, atol=1e-9, err_msg=name)
    assert scored(load(model))["broad"].score[:, 1].min() == pytest.approx(1, abs=1e-9)


def test_texts_repeat_or_do_not_and_differ_in_length():
    subject = families.subject("gpt2")
    texts = repeated_texts(subject, 20, seed=3)
    lengths = set()
    for pair in texts:
        begin, end = pair.segments["second"][0]
        half = end - begin
        assert pair.clean[begin:end] == pair.clean[begin - half : begin] == pair.corrupt[begin - half : begin]
        assert len(set(pair.corrupt)) == len(pair.corrupt)
        lengths.add(half)
    assert len(lengths) > 4
    assert repeated_texts(subject, 20, seed=3).hash == texts.hash != repeated_texts(subject, 20, seed=4).hash
    assert repeated_texts(subject, 5, seed=3).pairs == texts.pairs[:5]


def test_a_model_without_room_for_repetition_is_refused():
    with pytest.raises(DataError, match="ordinary tokens"):
        pattern_roles(load(families.build("gpt2", n_positions=3)))
    assert [one.name for one in ROLES] == list(scored(families.subject("gpt2"), 1))
