"""What a model writes depends on the prompt alone, not on its neighbours, its padding or the model's habits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import GenerationConfig

from mechscope.adapt.generate import PAPER, encode_prompts, summarize
from mechscope.adapt.lora import attach
from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.settings.decoding import Decoding
from mechscope.subject.components import Components
from tests import families

PROMPTS = [[3, *range(4, 4 + n), 2] for n in (9, 2, 5, 13, 3, 7)]


def slow_greedy(model, prompt, steps, end=1):
    """Take the most likely token again and again, without cache, padding or batch."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


def lively(make_subject, family):
    """Return a random model whose words depend on the context: large weights, and an output that is not the input embedding."""
    subject = make_subject(family, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in subject.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return subject


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2"])
@pytest.mark.parametrize("tokens_per_batch", [1, 30, 10_000])
def test_padded_batches_write_what_single_prompts_write(make_subject, tokenizer, family, tokens_per_batch):
    model = lively(make_subject, family).model
    written = summarize(
        model, tokenizer, PROMPTS, decoding=Decoding(max_new_tokens=12), execution=Execution(tokens_per_batch=tokens_per_batch)
    )
    expected = [tokenizer.decode(slow_greedy(model, prompt, 12), skip_special_tokens=True) for prompt in PROMPTS]
    assert written == expected
    assert len(set(written)) > 1


ROPE = {"rope_theta": 1e4, "factor": 6.0}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic"}, "max_position_embeddings": 10}),
        (
            "phi3",
            {
                "rope_parameters": {**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [64.0, 32.0, 16.0, 8.0]},
                "original_max_position_embeddings": 10,
                "sliding_window": None,
            },
        ),
    ],
)
def test_frequencies_by_length_are_each_prompts_own(tokenizer, family, changes):
    def fresh():
        model = families.build(family, vocab_size=len(tokenizer), tie_word_embeddings=False, **changes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8 if parameter.ndim == 2 else 1)
        return model

    decoding, model = Decoding(max_new_tokens=12), fresh()
    before = {name: value.clone() for name, value in model.named_buffers()}
    together = summarize(model, tokenizer, PROMPTS, decoding=decoding)
    assert together == [summarize(fresh(), tokenizer, [prompt], decoding=decoding)[0] for prompt in PROMPTS]
    assert together == summarize(model, tokenizer, PROMPTS[::-1], decoding=decoding)[::-1]
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers()), "the model keeps its own state"


def test_beams_do_not_depend_on_the_batch(make_subject, tokenizer):
    model = lively(make_subject, "gpt2").model
    decoding = replace(PAPER, max_new_tokens=30)  # the tiny model has 64 positions
    together = summarize(model, tokenizer, PROMPTS, decoding=decoding, execution=Execution(tokens_per_batch=10_000))
    alone = [summarize(model, tokenizer, [prompt], decoding=decoding)[0] for prompt in PROMPTS]
    assert together == alone


def test_no_bigram_is_repeated_when_repeats_are_forbidden(make_subject, tokenizer):
    model = lively(make_subject, "gpt2").model
    free, strict = (summarize(model, tokenizer, PROMPTS, decoding=Decoding(max_new_tokens=25, no_repeat_ngram=n)) for n in (0, 2))

    def repeats(text):
        words = text.split()
        pairs = list(pairwise(words))
        return len(pairs) - len(set(pairs))

    assert max(map(repeats, free)) > 0
    assert max(map(repeats, strict)) == 0


def test_padding_is_not_taken_for_a_repeat_where_memory_runs_out(make_subject, tokenizer, monkeypatch):
    model = make_subject("gpt2", tie_word_embeddings=False).model
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[0], model.lm_head.weight[9] = 1.0, 0.5  # twice 0, which is no padding, then another token
    decoding = Decoding(max_new_tokens=5, no_repeat_ngram=2)
    expected = summarize(model, tokenizer, PROMPTS, decoding=decoding)
    assert all(text.startswith("<s> <s> w5") for text in expected)
    generate, sizes = model.generate, []

    def narrow(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", narrow)
    assert summarize(model, tokenizer, PROMPTS, decoding=decoding) == expected
    assert sizes == [6, 3, 3]


def test_writing_stops_at_the_end_token(make_subject, tokenizer):
    model = make_subject("gpt2").model
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[1] = 1.0  # the end token always wins
    assert summarize(model, tokenizer, PROMPTS, decoding=Decoding()) == [""] * len(PROMPTS)


def test_writing_stops_after_the_allowed_tokens(make_subject, tokenizer):
    model = make_subject("gpt2").model
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[9] = 1.0
    assert summarize(model, tokenizer, PROMPTS, decoding=Decoding(max_new_tokens=4)) == ["w5 w5 w5 w5"] * len(PROMPTS)


def test_a_models_own_sampling_habits_are_ignored_and_kept(make_subject, tokenizer):
    model = lively(make_subject, "llama").model
    plain = summarize(model, tokenizer, PROMPTS, decoding=Decoding(max_new_tokens=10))
    habits = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=3, eos_token_id=1)
    model.generation_config = habits
    assert summarize(model, tokenizer, PROMPTS, decoding=Decoding(max_new_tokens=10)) == plain
    assert model.generation_config is habits


def test_an_adapter_writes_differently_from_its_base(make_subject, tokenizer):
    subject = lively(make_subject, "gpt2")
    model = attach(subject, Components.parse("layers:0,1,2"))
    before = summarize(model, tokenizer, PROMPTS, decoding=Decoding(max_new_tokens=10))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    after = summarize(model, tokenizer, PROMPTS, decoding=Decoding(max_new_tokens=10))
    assert before == summarize(subject.model, tokenizer, PROMPTS, decoding=Decoding(max_new_tokens=10))
    assert after != before


def test_prompts_leave_room_for_the_answer(tokenizer):
    long = " ".join(f"w{n % 30}" for n in range(200))
    (prompt,) = encode_prompts([long], tokenizer, decoding=Decoding(max_new_tokens=20), max_tokens=64)
    assert len(prompt) == 64 - 20
    assert tokenizer.decode(prompt).startswith("Article: w0 w1")
    assert tokenizer.decode(prompt).endswith("Summary:")


def test_impossible_decoding_is_refused():
    with pytest.raises(SettingsError, match="beams"):
        Decoding(beams=0)
