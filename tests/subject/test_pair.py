"""Two models are compared only if the same text is the same input to the same architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mechscope.errors import ModelError
from mechscope.subject.load import Subject, load
from mechscope.subject.pair import pair
from tests import families
from tests.matrix import plain


def subject(family: str = "llama", seed: int = 0, words: int = families.VOCABULARY, **changes: Any) -> Subject:
    return load(families.build(family, seed=seed, **changes), tokenizer=families.tokenizer(words))


def test_a_model_and_its_tuned_version_share_tokenizer_vocabulary_and_the_shorter_context() -> None:
    base, tuned = subject(), subject(seed=1, max_position_embeddings=32)
    found = pair(base, tuned)
    assert (found.base, found.tuned) == (base, tuned)
    assert found.vocab_size == families.VOCABULARY
    assert found.tokenizer is base.tokenizer
    assert found.max_positions == 32


def test_the_tokenizer_of_either_model_serves_both() -> None:
    bare = load(families.build("llama"))
    tuned = subject(seed=1)
    assert pair(bare, tuned).tokenizer is tuned.tokenizer


def test_models_of_different_families_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"tuned model .* is llama, base .* is gpt2: compare a model with its own fine-tuned version"):
        pair(subject("gpt2"), subject("llama"))


@pytest.mark.parametrize(
    ("changes", "name", "found"),
    [
        ({"num_hidden_layers": 2}, "n_layers", 2),
        ({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}, "n_heads", 2),
        ({"num_key_value_heads": 4}, "n_kv_heads", 4),
        ({"hidden_size": 64, "head_dim": 8}, "d_model", 64),
        ({"head_dim": 16}, "d_head", 16),
    ],
)
def test_sizes_that_differ_are_refused_with_both_values(changes: dict[str, Any], name: str, found: int) -> None:
    with pytest.raises(ModelError, match=rf"has {name} = {found}, base .* has \d+: they are not the same architecture"):
        pair(subject(), subject(**changes))


def test_other_numbers_of_experts_are_refused_with_the_layer() -> None:
    four, three = (load(plain.build("qwen2_moe", 0, torch.float32)) for _ in range(2))
    blocks = list(three.anatomy.blocks)
    experts = blocks[1].experts
    assert experts is not None
    blocks[1] = replace(blocks[1], experts=replace(experts, number=3))
    fewer = replace(three, anatomy=replace(three.anatomy, blocks=tuple(blocks)))
    with pytest.raises(ModelError, match=r"layer 1 of tuned model .* has 3 experts, of base .* 4: they are not the same architecture"):
        pair(four, fewer)


def test_a_resized_vocabulary_is_refused_with_the_option_that_compares_the_shared_tokens() -> None:
    base, tuned = subject(), subject(seed=1, words=100, vocab_size=100)
    with pytest.raises(
        ModelError, match=r'tuned model has vocabulary 100, base has 97: pass resize="truncate" to compare the shared 97 tokens'
    ):
        pair(base, tuned)
    assert pair(base, tuned, resize="truncate").vocab_size == 97
    assert pair(tuned, base, resize="truncate").vocab_size == 97


def test_tokenizers_that_number_a_word_differently_are_refused_with_an_example() -> None:
    base, tuned = subject(), subject(seed=1)
    vocabulary = families.tokenizer().get_vocab()
    vocabulary["w5"], vocabulary["w6"] = vocabulary["w6"], vocabulary["w5"]
    tuned.tokenizer.get_vocab = lambda: vocabulary
    with pytest.raises(
        ModelError, match=r"have different tokenizers .*token 'w[56]' is [56] in one and [56] in the other.*same text would not"
    ):
        pair(base, tuned)


def test_tokenizers_of_other_words_are_refused_with_the_number_shared() -> None:
    base, tuned = subject(), subject(seed=1)
    words = {word.replace("w", "v"): index for word, index in families.tokenizer().get_vocab().items()}
    tuned.tokenizer.get_vocab = lambda: words
    with pytest.raises(ModelError, match=r"different tokenizers \(97 and 97 tokens; 3 tokens are shared\)"):
        pair(base, tuned)


def adapter() -> Subject:
    model = get_peft_model(families.build("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return load(model, tokenizer=families.tokenizer())


def test_an_adapter_is_compared_with_the_same_weights_without_it() -> None:
    tuned = adapter()
    found = pair(tuned.without_adapter(), tuned)
    assert found.base.model is found.tuned.model
    assert not found.base.adapted
    assert found.tuned.adapted


def test_an_adapter_compared_with_itself_in_the_same_state_is_refused_with_the_way_out() -> None:
    tuned = adapter()
    with pytest.raises(ModelError, match=r"same model in the same state .* take base = tuned.without_adapter\(\)"):
        pair(tuned, tuned)


def test_the_plain_model_inside_an_adapter_is_not_its_base() -> None:
    """Comparing with `get_base_model()` is the trap: the LoRA layers are still inside, so both would be the adapted model."""
    tuned = adapter()
    with pytest.raises(ModelError, match=r"without_adapter\(\)"):
        pair(load(tuned.model.get_base_model(), tokenizer=tuned.tokenizer), tuned)
