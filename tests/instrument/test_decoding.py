"""What a model writes is its likeliest next token again and again, whatever habits its generation file gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StaticCache

from mechscope.instrument import Edit, intervene, load, record
from mechscope.instrument.decoding import continuations
from mechscope.settings.decoding import Decoding
from tests import families

HABITS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 9.0, "top_p": 0.5},
    "beams": {"num_beams": 4, "length_penalty": -5.0},
    "penalties": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
    "lengths": {"max_length": 3, "min_new_tokens": 9, "eos_token_id": [41, 42]},
    "suppression": {"suppress_tokens": list(range(10, 90))},
    "a static cache": {"cache_implementation": "static"},
    "a quantized cache": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
    "a cache kept elsewhere": {"cache_implementation": "offloaded"},
    "no cache": {"use_cache": False},
}
TEXT = families.documents()[0].tolist()


def slow(model: Any, ids: list[int], steps: int, ends: set[int]) -> tuple[int, ...]:
    """Take the likeliest token again and again, without a cache."""
    new: list[int] = []
    while len(new) < steps and not ends.intersection(new):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return tuple(new)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2"])
@pytest.mark.parametrize("habit", HABITS)
def test_habits_of_the_generation_file_do_not_act_and_stay(family: str, habit: str) -> None:
    model = families.build(family, torch.float64)
    habits = GenerationConfig(**{"eos_token_id": None, **HABITS[habit]})
    model.generation_config = habits
    # in training mode a model would draw its dropout
    model.train()
    (found,) = continuations(model, torch.tensor([TEXT]), decoding=Decoding(max_new_tokens=8), pad=0)
    assert model.training
    assert found == slow(model.eval(), TEXT, 8, {41, 42} if habit == "lengths" else set())
    assert model.generation_config is habits


def test_a_text_ends_with_the_first_end_token_of_model_or_tokenizer() -> None:
    model = families.build("llama", torch.float64)
    model.generation_config.eos_token_id = None
    (free,) = continuations(model, torch.tensor([TEXT]), decoding=Decoding(max_new_tokens=8), pad=0)
    early, late = free[2], free[5]
    cut = free[: free.index(early) + 1]
    for own, end in ((early, None), (None, early), (late, early), ([early, late], None)):
        model.generation_config.eos_token_id = own
        assert continuations(model, torch.tensor([TEXT]), decoding=Decoding(max_new_tokens=8), pad=0, ends=[end]) == [cut]


def test_rows_of_a_batch_are_cut_each_behind_its_own_end() -> None:
    model = families.build("gpt2", torch.float64)
    model.generation_config.eos_token_id = None
    rows = torch.tensor([TEXT, TEXT[::-1], [7, *TEXT[1:]]])
    free = continuations(model, rows, decoding=Decoding(max_new_tokens=8), pad=0)
    assert free == [slow(model, row.tolist(), 8, set()) for row in rows]
    found = continuations(model, rows, decoding=Decoding(max_new_tokens=8), pad=0, ends=[free[0][1]])
    assert found == [slow(model, row.tolist(), 8, {free[0][1]}) for row in rows]
    assert len(set(map(len, found))) > 1


@torch.no_grad()
def test_as_many_beams_as_tokens_find_the_likeliest_two() -> None:
    model = families.build("gpt2", torch.float64)
    model.generation_config.eos_token_id = None
    greedy = []
    for text in (TEXT, TEXT[::-1], TEXT[4:]):
        first = model(torch.tensor([text])).logits[0, -1].log_softmax(-1)
        after = model(torch.tensor([[*text, token] for token in range(families.VOCABULARY)])).logits[:, -1].log_softmax(-1)
        best = divmod(int((first[:, None] + after).argmax()), families.VOCABULARY)
        decoding = Decoding(max_new_tokens=2, beams=families.VOCABULARY)
        assert continuations(model, torch.tensor([text]), decoding=decoding, pad=0) == [best]
        greedy.append(slow(model, text, 2, set()) == best)
    assert not all(greedy), "one beam would do"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_padded_text_is_continued_as_it_is_alone_with_attention_by_maps(family: str, dtype: torch.dtype) -> None:
    model = families.build(family, dtype)
    model.set_attn_implementation("eager")  # in float64 it gives NaN at padding, and so everywhere
    texts = [TEXT, TEXT[3:]]
    rows, decoding = torch.tensor([TEXT, [0, 0, 0, *TEXT[3:]]]), Decoding(max_new_tokens=8)
    found = continuations(model, rows, decoding=decoding, pad=0, real=rows != 0)
    assert found == [slow(model, text, 8, {model.generation_config.eos_token_id}) for text in texts]
    assert model.config._attn_implementation == "eager"


EDITS = [
    Edit("z", 1, 0.0, heads=(2,)),
    Edit("pattern", 0, lambda pattern: pattern.flip(1), heads=(0, 1)),
    Edit("query", 2, lambda query: 1.5 * query),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.site)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2", "gemma3", "mistral"])
def test_a_users_own_generate_with_a_static_cache_is_changed_as_one_without_a_cache(family: str, edit: Edit) -> None:
    model = families.build(family, torch.float64)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    model.generation_config = GenerationConfig(cache_implementation="static", **options)
    subject = load(model)
    plain = model.generate(torch.tensor([TEXT]))
    with intervene(subject, edit):
        found = model.generate(torch.tensor([TEXT]))
        for step, logits in enumerate(found.logits):
            ids = found.sequences[:, : len(TEXT) + step]
            torch.testing.assert_close(logits, model(input_ids=ids, use_cache=False).logits[:, -1].float(), rtol=1e-5, atol=1e-5)
    assert (found.logits[0] - plain.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_patterns_while_a_static_cache_is_filled_are_those_of_the_text(family: str) -> None:
    model = families.build(family, torch.float64)
    subject, ids = load(model), torch.tensor([TEXT])
    cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        with record(subject, "pattern") as filled:
            model(ids, past_key_values=cache)
        with record(subject, "pattern") as alone:
            model(ids, use_cache=False)
    for layer in range(families.LAYERS):
        torch.testing.assert_close(filled["pattern", layer][..., : len(TEXT)], alone["pattern", layer])
