"""Contexts as text, agreement of keys and values, and what fine-tuning changed in neurons."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.instrument import load as checked_load
from mechscope.instrument import record
from mechscope.instrument.execution import Execution
from mechscope.subject.load import Subject, load
from mechscope.subject.pair import pair as paired
from mechscope.weights.activity import neuron_activity
from mechscope.weights.activity_change import activity_change
from mechscope.weights.memories import agreement, memories
from mechscope.weights.neurons import neuron_tokens
from tests import families
from tests.stats.skewed import mean_test

LENGTHS = (23, 9, 31, 14, 9, 12)


def texts_of(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Pairs:
    rows = [tuple(text.tolist()) for text in families.documents(lengths=lengths, seed=seed)]
    return Pairs(tuple(PromptPair(f"t{at}", row, row) for at, row in enumerate(rows)), "random")


def with_words(family: str, dtype: torch.dtype = torch.float64) -> Subject:
    return load(families.build(family, dtype), tokenizer=families.tokenizer())


@torch.no_grad()
def memory_model(read: int, write: int, neuron: int) -> Subject:
    """A GPT-2 of which one neuron of the first layer reads one token, whatever stands around it, and promotes another."""
    model = families.build("gpt2", torch.float64)
    transformer = model.transformer
    transformer.wpe.weight.zero_()
    block = transformer.h[0]
    block.attn.c_proj.weight.zero_()
    block.attn.c_proj.bias.zero_()
    block.mlp.c_fc.weight[:, neuron] = 10 * (block.ln_2(transformer.wte.weight[read]) - block.ln_2.bias)
    value = model.lm_head.weight[write] * transformer.ln_f.weight
    block.mlp.c_proj.weight[neuron] = value - value.mean()
    return load(model, tokenizer=families.tokenizer())


# --- memories ------------------------------------------------------------------------------------------------------------------------------------


def test_a_memory_is_written_as_its_context_its_token_and_what_it_promotes() -> None:
    subject = memory_model(40, 60, 9)
    rows = {"first": (5, 6, 7, 8, 40, 60), "second": (9, 40, 11, 12), "third": (13, 14, 40)}
    texts = Pairs(tuple(PromptPair(name, row, row) for name, row in rows.items()), "by hand")
    activity = neuron_activity(subject, texts, contexts=3)
    table = memories(subject, activity, texts, neurons=[(0, 9)], before=3, k=2)
    assert set(table["component"]) == {"m0.n9"}
    assert table["place"].tolist() == [1, 2, 3]
    # equal but for rounding, so in any order
    by_text = table.set_index("text")
    assert by_text["context"].to_dict() == {"first": "w6 w7 w8⟦w40⟧", "second": "w9⟦w40⟧", "third": "w13 w14⟦w40⟧"}
    assert by_text["position"].to_dict() == {"first": 4, "second": 1, "third": 2}
    assert by_text["next"].to_dict() == {"first": "w60", "second": "w11", "third": None}
    assert by_text["next_id"].to_dict() == {"first": 60, "second": 11, "third": -1}
    assert by_text["agrees"].to_dict() == {"first": True, "second": False, "third": None}
    assert set(table["token"]) == {"w40"}
    assert set(table["token_id"]) == {40}
    assert [found[0] for found in table["promoted"]] == ["w60"] * 3
    assert {len(found) for found in table["promoted"]} == {2}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma2", "gemma3", "phi3"])
def test_what_an_activation_promotes_goes_by_its_sign(family: str) -> None:
    subject, texts = with_words(family), texts_of()
    activity = neuron_activity(subject, texts, contexts=3)
    table = memories(subject, activity, texts, layers=[1], k=4)
    tokens = neuron_tokens(subject, layers=[1], k=4)
    gated = (tokens["side"] == "gate").any()
    assert (table["activation"] < 0).any() == gated
    sides = tokens.groupby(["side", "neuron"])["token"].apply(list)
    for row in table.to_dict("records"):
        assert row["promoted"] == sides["promoted" if row["activation"] > 0 else "suppressed", row["neuron"]]
        following = texts.pairs[int(row["text"][1:])].clean[row["position"] + 1 :]
        assert row["agrees"] == ((row["promoted"][0] == f"w{following[0]}") if following else None)
    assert table["activation"].abs().groupby(table["neuron"]).is_monotonic_decreasing.all()


def test_some_memories_are_those_among_all_and_undriven_neurons_have_none() -> None:
    subject, texts = with_words("opt"), texts_of()
    block: Any = subject.anatomy.blocks[0].module
    with torch.no_grad():
        block.fc1.bias[3] = -1000.0
    activity = neuron_activity(subject, texts)
    whole = memories(subject, activity, texts)
    assert not (whole["component"] == "m0.n3").any()
    few = memories(subject, activity, texts, neurons=[(2, 7), (0, 3), (0, 8)])
    expected = whole[whole["component"].isin(["m2.n7", "m0.n3", "m0.n8"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(few, expected)
    filled = sum(int(layer.contexts.filled.sum()) for layer in activity.layers)
    assert len(whole) == filled


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_agreement_is_that_of_a_loop(family: str) -> None:
    subject, texts = with_words(family), texts_of((60, 50, 40), seed=3)
    activity = neuron_activity(subject, texts, contexts=4)
    table, rows = agreement(subject, activity, texts), memories(subject, activity, texts, k=1)
    assert table["layer"].tolist() == [0, 1, 2]
    for layer in range(3):
        row, found = table.iloc[layer], rows[rows["layer"] == layer]
        known = found[found["next_id"] >= 0]
        first = known[known["place"] == 1]
        hits = [promoted[0] == following for promoted, following in zip(first["promoted"], first["next"], strict=True)]
        assert row["n"] == len(first)
        assert row["agreement"] == pytest.approx(np.mean(hits))
        assert row["agreement_contexts"] == pytest.approx(np.mean(known["agrees"].astype(bool)))
        dealt = [promoted[0] == following for promoted in first["promoted"] for following in first["next"]]
        assert row["agreement_chance"] == pytest.approx(np.mean(dealt))
        assert row["agreement_low"] <= row["agreement"] <= row["agreement_high"]


def test_other_texts_and_other_models_are_refused() -> None:
    subject, texts = with_words("gpt2"), texts_of()
    activity = neuron_activity(subject, texts)
    with pytest.raises(DataError, match="text 't2' of the activity is not among the texts"):
        memories(subject, activity, texts.first(2))
    with pytest.raises(ModelError, match="the activity is of another model"):
        memories(with_words("llama"), activity, texts)
    with pytest.raises(ModelError, match="came without a tokenizer"):
        memories(families.subject("gpt2"), activity, texts)
    with pytest.raises(SettingsError, match="k = 0"):
        memories(subject, activity, texts, k=0)


# --- change --------------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_text(subject: Subject, texts: Pairs, layer: int) -> np.ndarray:
    """Run every text by itself; return its neurons' mean activations and, for ungated MLPs, shares above zero: ``(text, 2, neuron)``."""
    found = []
    for one in texts:
        with record(subject, "neuron") as seen, subject.active():
            subject.plain(torch.tensor([one.clean]))
        values = seen["neuron", layer][0].numpy()
        found.append([values.mean(0), (values > 0).mean(0)])
    return np.array(found)


def nudged(family: str, size: float) -> Subject:
    """A model like that of the same family, its MLPs moved a little."""
    model = families.build(family, torch.float64)
    other = families.build(family, torch.float64, seed=7)
    with torch.no_grad():
        for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
            if any(part in name for part in ("mlp", "fc1", "fc2")):
                one += size * two
    return load(model)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma3"])
def test_changes_are_paired_tests_over_texts(family: str) -> None:
    base, tuned, texts = families.subject(family, torch.float64), nudged(family, 0.1), texts_of()
    found = activity_change(paired(base, tuned), texts, contexts=3, execution=Execution(tokens_per_batch=50))
    table = found.table()
    exact = family in ("gpt2", "opt")
    close: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-9} if exact else {"rtol": 1e-3, "atol": 1e-5}
    p = []
    for layer in range(3):
        rows = table[table["layer"] == layer]
        one, two = by_text(base, texts, layer), by_text(tuned, texts, layer)
        for index, name in enumerate(("mean", "active") if exact else ("mean",)):
            before, after = one[:, index], two[:, index]
            np.testing.assert_allclose(rows[f"{name}_base"], before.mean(0), **close)
            np.testing.assert_allclose(rows[f"{name}_tuned"], after.mean(0), **close)
            np.testing.assert_allclose(rows[f"{name}_change"], (after - before).mean(0), **close)
            changed = ~np.isclose(after - before, (after - before)[:1]).all(0)
            low, high, tested = mean_test((after - before)[:, changed])
            np.testing.assert_allclose(rows[f"{name}_change_p"].to_numpy()[changed], tested, **close)
            np.testing.assert_allclose(rows[f"{name}_change_low"].to_numpy()[changed], low, **close)
            np.testing.assert_allclose(rows[f"{name}_change_high"].to_numpy()[changed], high, **close)
        p.append(rows["mean_change_p"].to_numpy())
    np.testing.assert_allclose(table["mean_change_q"], scipy.stats.false_discovery_control(np.concatenate(p)), rtol=1e-12)


@torch.no_grad()
def test_ranks_go_by_the_change_in_units_of_the_spread_and_overlap_is_jaccards() -> None:
    base, tuned, texts = families.subject("gpt2", torch.float64), nudged("gpt2", 0.1), texts_of()
    found = activity_change(paired(base, tuned), texts, contexts=3)
    table = found.table()
    one, two = found.base.table(), found.tuned.table()
    expected = (two["mean"] - one["mean"]) / np.sqrt((one["sd"] ** 2 + two["sd"] ** 2) / 2)
    np.testing.assert_allclose(table["mean_change_sd"], expected, rtol=1e-9, atol=1e-12)
    assert sorted(table["rank"]) == list(range(1, len(table) + 1))
    assert table.sort_values("rank")["mean_change_sd"].abs().is_monotonic_decreasing
    seen = set()
    for row in table.to_dict("records"):
        places = []
        for side in (found.base, found.tuned):
            top = side.layers[row["layer"]].contexts
            filled = top.filled[:, row["neuron"]]
            places.append(set(zip(top.text[filled, row["neuron"]].tolist(), top.position[filled, row["neuron"]].tolist(), strict=True)))
        jaccard = len(places[0] & places[1]) / len(places[0] | places[1]) if places[0] | places[1] else np.nan
        np.testing.assert_allclose(row["contexts_overlap"], jaccard)
        seen.add(round(jaccard, 3))
    assert {0.2, 0.5, 1.0} <= seen


def test_a_model_does_not_differ_from_itself() -> None:
    texts = texts_of()
    found = activity_change(paired(families.subject("llama"), families.subject("llama")), texts).table()
    assert (found["mean_change"] == 0).all()
    assert (found["mean_change_p"] == 1).all()
    assert (found["contexts_overlap"] == 1).all()


@torch.no_grad()
def test_a_neuron_that_fine_tuning_killed_is_the_most_changed() -> None:
    model = families.build("gpt2", torch.float64)
    model.transformer.h[2].mlp.c_fc.bias[17] -= 1000.0
    found = activity_change(paired(families.subject("gpt2", torch.float64), load(model)), texts_of()).table()
    row = found[found["component"] == "m2.n17"].iloc[0]
    assert row["rank"] == 1
    assert row["dead_tuned"]
    assert not row["dead_base"]
    assert row["contexts_overlap"] == 0
    others = found[found["component"] != "m2.n17"]
    assert (others["mean_change"] == 0).all()
    assert (others["mean_change_q"] == 1).all()


def test_shards_of_a_change_merge_to_the_whole() -> None:
    models, texts = paired(families.subject("opt", torch.float64), nudged("opt", 0.1)), texts_of()
    whole = activity_change(models, texts)
    merged, more = (activity_change(models, Pairs(some, "shard")) for some in (texts.pairs[:2], texts.pairs[2:]))
    merged.merge(more)
    pd.testing.assert_frame_equal(merged.table(), whole.table(), rtol=1e-8)


def test_an_adapter_is_compared_with_its_own_base() -> None:
    from peft import LoraConfig, get_peft_model

    model, texts = families.build("qwen3", torch.float64), texts_of()
    expected = neuron_activity(load(model), texts).table()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False)).double().eval()
    adapted = load(wrapped)
    found = activity_change(paired(adapted.without_adapter(), adapted), texts)
    pd.testing.assert_frame_equal(found.base.table(), expected, rtol=1e-5)
    merged = neuron_activity(load(wrapped.merge_and_unload()), texts).table()
    pd.testing.assert_frame_equal(found.tuned.table(), merged, rtol=1e-5)
    assert (found.table()["mean_change"] != 0).all()


# --- a real model --------------------------------------------------------------------------------------------------------------------------------


def test_a_real_models_strongest_context_is_what_the_model_does_there(shared: Any) -> None:
    subject = checked_load(shared / "models" / "TinyStories-656K")
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big dog."
    other = "Tom and his mom went to the store. They wanted to buy a red ball. Tom was very happy."
    rows = [tuple(subject.tokenizer(text)["input_ids"]) for text in (story, other)]
    texts = Pairs(tuple(PromptPair(f"s{at}", row, row) for at, row in enumerate(rows)), "stories")
    table = memories(subject, neuron_activity(subject, texts), texts, neurons=[(0, 5), (1, 100)], before=2)
    for row in table.to_dict("records"):
        ids = rows[int(row["text"][1:])]
        with record(subject, "neuron") as seen, torch.no_grad():
            subject.plain(torch.tensor([ids]))
        assert row["activation"] == pytest.approx(
            float(seen["neuron", row["layer"]][0, row["position"], row["neuron"]]), rel=1e-4, abs=1e-5
        )
        assert row["token_id"] == ids[row["position"]]
        assert row["context"].endswith(f"⟦{subject.tokenizer.decode([row['token_id']])}⟧")
