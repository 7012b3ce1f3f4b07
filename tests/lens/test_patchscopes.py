"""A state patched into a prompt is what the model reads there: nothing more, and only once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig

from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.lens.patchscopes import IDENTITY, identity_prompt, patchscope
from mechscope.subject.load import Subject, load
from tests import families

SOURCE, PROMPT, _ = (tuple(text.tolist()) for text in families.documents())
FAMILIES = ("gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma2", "gemma3")


def subject_of(family: str, seed: int = 0, **changes: Any) -> Subject:
    """Return a tiny subject that never ends a text by itself."""
    model = families.build(family, torch.float64, seed, **changes)
    model.generation_config.eos_token_id = None
    return load(model)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def states_by_hand(subject: Subject, ids: tuple[int, ...]) -> list[Tensor]:
    """Return what every block gives out, caught by plain hooks."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [block.module.register_forward_hook(hook) for block in subject.anatomy.blocks]
    subject.plain(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def patched_by_hand(subject: Subject, ids: tuple[int, ...], layer: int, at: int, state: Tensor) -> Tensor:
    """Return the last token's logits when a token's state behind a block is replaced, without a cache."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, at] = state
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = subject.anatomy.blocks[layer].module.register_forward_hook(hook)
    logits = subject.plain(torch.tensor([ids]), use_cache=False).logits[0, -1]
    handle.remove()
    return logits


def same_distribution(row: Any, logits: Tensor) -> None:
    expected = logits.softmax(-1).topk(len(row.top_ids))
    assert row.top_ids == tuple(expected.indices.tolist())
    # attention of Gemma 2, and RMS norms, are float32 inside transformers
    assert row.probabilities == pytest.approx(expected.values.tolist(), rel=1e-4)


def test_a_state_put_where_it_stood_changes_nothing(family: str) -> None:
    subject = subject_of(family)
    plain = subject.plain(torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
    for position in (-1, 2):
        found = patchscope(subject, PROMPT, subject, PROMPT, position=position, target_position=position, k=8)
        assert list(found["source_layer"]) == list(found["target_layer"]) == [0, 1, 2]
        for row in found.itertuples():
            same_distribution(row, plain)


@pytest.mark.parametrize(("position", "target_position"), [(-1, -1), (4, 2), (-3, 0)])
def test_a_patch_is_what_a_hook_by_hand_makes_of_it(family: str, position: int, target_position: int) -> None:
    subject = subject_of(family)
    states = states_by_hand(subject, SOURCE)
    found = patchscope(subject, SOURCE, subject, PROMPT, position=position, target_position=target_position, k=8)
    plain = subject.plain(torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
    for layer, row in zip(map(int, found["source_layer"]), found.itertuples(), strict=True):
        expected = patched_by_hand(subject, PROMPT, layer, target_position % len(PROMPT), states[layer][position])
        same_distribution(row, expected)
        # behind the last block only the last token's own state reaches its logits; a window may hide other tokens earlier
        if family not in families.WINDOWED or target_position == -1:
            assert ((expected - plain).abs().max() > 1e-3) == (layer < 2 or target_position == -1)


def test_source_and_target_layers_may_differ_and_come_in_any_order(family: str) -> None:
    subject = subject_of(family)
    states = states_by_hand(subject, SOURCE)
    found = patchscope(subject, SOURCE, subject, PROMPT, layers=(2, 0), target_layer=1, target_position=3, k=8)
    assert list(found["source_layer"]) == [2, 0]
    assert list(found["target_layer"]) == [1, 1]
    for layer, row in zip(map(int, found["source_layer"]), found.itertuples(), strict=True):
        same_distribution(row, patched_by_hand(subject, PROMPT, 1, 3, states[layer][-1]))


@pytest.mark.parametrize("target_position", [-1, 3])
def test_generation_goes_on_as_a_loop_without_a_cache_does(family: str, target_position: int) -> None:
    subject = subject_of(family)
    states = states_by_hand(subject, SOURCE)
    found = patchscope(subject, SOURCE, subject, PROMPT, target_position=target_position, generate=6)
    plain = list(PROMPT)
    for layer, row in zip(map(int, found["source_layer"]), found.itertuples(), strict=True):
        ids = list(PROMPT)
        for _ in range(6):
            logits = patched_by_hand(subject, tuple(ids), layer, target_position % len(PROMPT), states[layer][-1])
            ids.append(int(logits.argmax()))
        assert row.generated_ids == tuple(ids[len(PROMPT) :])
        assert row.generated == " ".join(f"#{token}" for token in ids[len(PROMPT) :])
    for _ in range(6):
        plain.append(int(subject.plain(torch.tensor([plain]), use_cache=False).logits[0, -1].argmax()))
    if target_position == -1:  # elsewhere a patch changes the logits, but not always which is largest
        assert any(row.generated_ids != tuple(plain[len(PROMPT) :]) for row in found.itertuples())


def test_a_prompt_of_one_token_is_patched_once() -> None:
    subject = subject_of("gpt2")
    states = states_by_hand(subject, SOURCE)
    found = patchscope(subject, SOURCE, subject, (5,), layers=(0,), generate=4)
    ids = [5]
    for _ in range(4):
        ids.append(int(patched_by_hand(subject, tuple(ids), 0, 0, states[0][-1]).argmax()))
    assert found["generated_ids"][0] == tuple(ids[1:])


def test_a_text_that_ends_is_cut_behind_its_end_token() -> None:
    subject = subject_of("gpt2")
    (free,) = patchscope(subject, SOURCE, subject, PROMPT, layers=(1,), generate=8)["generated_ids"]
    subject.plain.generation_config.eos_token_id = free[2]
    found = patchscope(subject, SOURCE, subject, PROMPT, layers=(0, 1), generate=8)
    assert found["generated_ids"][1] == free[: free.index(free[2]) + 1]


def test_the_models_own_decoding_habits_do_not_act() -> None:
    subject = subject_of("llama")
    plain = patchscope(subject, SOURCE, subject, PROMPT, generate=8)
    subject.plain.generation_config = GenerationConfig(
        do_sample=True, temperature=9.0, num_beams=3, repetition_penalty=5.0, eos_token_id=None
    )
    assert patchscope(subject, SOURCE, subject, PROMPT, generate=8).equals(plain)


# another model


def test_another_model_reads_the_states(family: str) -> None:
    base, tuned = subject_of(family), subject_of(family, seed=1)
    states = states_by_hand(base, SOURCE)
    found = patchscope(base, SOURCE, tuned, PROMPT, k=8)
    for layer, row in zip(map(int, found["source_layer"]), found.itertuples(), strict=True):
        same_distribution(row, patched_by_hand(tuned, PROMPT, layer, len(PROMPT) - 1, states[layer][-1]))


def test_a_mapping_takes_states_of_one_width_to_another() -> None:
    base, wide = subject_of("gpt2"), subject_of("gpt2", n_embd=48)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 48, 32, generator=generator, dtype=torch.float64)
    bias = torch.randn(48, generator=generator, dtype=torch.float64)
    states = states_by_hand(base, SOURCE)
    found = patchscope(base, SOURCE, wide, PROMPT, mapping=lambda layer, x: weights[layer] @ x + bias, k=8)
    for layer, row in zip(map(int, found["source_layer"]), found.itertuples(), strict=True):
        same_distribution(row, patched_by_hand(wide, PROMPT, layer, len(PROMPT) - 1, weights[layer] @ states[layer][-1] + bias))


def test_an_adapter_is_on_in_one_model_and_off_in_the_other() -> None:
    model = families.build("llama", torch.float64)
    config = LoraConfig(r=3, lora_alpha=30, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    tuned = load(get_peft_model(model, config, autocast_adapter_dtype=False).eval())
    tuned.plain.generation_config.eos_token_id = None
    base = tuned.without_adapter()
    with base.active():
        states = states_by_hand(base, SOURCE)
    found = patchscope(base, SOURCE, tuned, PROMPT, k=8, generate=3)
    for layer, row in zip(map(int, found["source_layer"]), found.itertuples(), strict=True):
        ids = list(PROMPT)
        by_hand = partial(patched_by_hand, layer=layer, at=len(PROMPT) - 1, state=states[layer][-1])
        with tuned.active():
            same_distribution(row, by_hand(tuned, PROMPT))
            for _ in range(3):
                ids.append(int(by_hand(tuned, tuple(ids)).argmax()))
        assert row.generated_ids == tuple(ids[len(PROMPT) :])


# prompts


def test_the_identity_prompt_is_asked_by_default() -> None:
    subject = replace(subject_of("gpt2"), tokenizer=families.tokenizer())
    prompt = identity_prompt(subject)
    assert prompt == tuple(subject.tokenizer(IDENTITY)["input_ids"])
    by_default = patchscope(subject, SOURCE, layers=(1,), generate=2)
    given = patchscope(subject, SOURCE, subject, prompt, layers=(1,), generate=2)
    assert by_default.equals(given)
    assert by_default["top_tokens"][0] == tuple(subject.tokenizer.decode([token]) for token in by_default["top_ids"][0])
    assert by_default["generated"][0] == subject.tokenizer.decode(list(by_default["generated_ids"][0]))


def test_real_words_come_back_from_the_first_layers(shared: Any) -> None:
    subject = load(shared / "models" / "gpt2-news-7m")
    ids = identity_prompt(subject)
    assert subject.tokenizer.decode(list(ids)) == IDENTITY
    found = patchscope(subject, ids, k=3, generate=3)
    assert found["generated"].str.len().min() > 0


def test_no_text_is_generated_unless_asked() -> None:
    found = patchscope(subject_of("gpt2"), SOURCE, None, PROMPT)
    assert set(found["generated_ids"]) == {()}
    assert set(found["generated"]) == {""}


# errors


def test_what_does_not_exist_is_refused_by_name() -> None:
    subject, deep = subject_of("gpt2"), subject_of("gpt2", n_layer=5)
    with pytest.raises(SettingsError, match=r"layer 3 .* 0-2"):
        patchscope(subject, SOURCE, subject, PROMPT, layers=(0, 3))
    with pytest.raises(SettingsError, match="layer 7"):
        patchscope(subject, SOURCE, subject, PROMPT, target_layer=7)
    with pytest.raises(SettingsError, match="layer 3"):  # the inspecting model has no block of the same number
        patchscope(deep, SOURCE, subject, PROMPT)
    with pytest.raises(SettingsError, match="no layer"):
        patchscope(subject, SOURCE, subject, PROMPT, layers=())
    with pytest.raises(SettingsError, match=r"position 14 .* source text"):
        patchscope(subject, SOURCE, subject, PROMPT, position=14)
    with pytest.raises(SettingsError, match=r"position -10 .* inspection prompt"):
        patchscope(subject, SOURCE, subject, PROMPT, target_position=-10)
    with pytest.raises(SettingsError, match="room for 0 to 55"):
        patchscope(subject, SOURCE, subject, PROMPT, generate=56)
    with pytest.raises(SettingsError, match="k is 0"):
        patchscope(subject, SOURCE, subject, PROMPT, k=0)
    with pytest.raises(SettingsError, match="no tokenizer"):
        patchscope(subject, SOURCE)


def test_texts_that_cannot_be_read_are_refused() -> None:
    subject = subject_of("gpt2")
    with pytest.raises(DataError, match="at least one"):
        patchscope(subject, (), subject, PROMPT)
    with pytest.raises(DataError, match="vocabulary"):
        patchscope(subject, SOURCE, subject, (5, 97))
    with pytest.raises(DataError, match="65 tokens"):
        patchscope(subject, (5,) * 65, subject, PROMPT)


def test_models_of_different_width_need_a_mapping() -> None:
    base, wide = subject_of("gpt2"), subject_of("gpt2", n_embd=48)
    with pytest.raises(ModelError, match="width 48"):
        patchscope(base, SOURCE, wide, PROMPT)
    with pytest.raises(ModelError, match="width 48"):
        patchscope(base, SOURCE, wide, PROMPT, mapping=lambda layer, x: x[:16])
