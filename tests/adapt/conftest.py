"""Tiny random models, a word tokenizer and a corpus whose summaries can be learned: the first two words of the article, again."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from mechscope.adapt.training import tune
from mechscope.data.prompt import Example
from mechscope.instrument.execution import Execution
from mechscope.subject.load import Subject, load
from tests.adapt.trainings import SETTINGS, placed_on

WORDS = 40
START, END, JOINT = 0, 1, 2
SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "llama": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48},
    "qwen3": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "head_dim": 16,
    },
    "gemma2": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "head_dim": 8,
    },
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word: `w0` … `w36`, and the prompt's own words."""
    names = ["<s>", "</s>", "Summary:", "Article:", *(f"w{number}" for number in range(WORDS - 4))]
    inner = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="w0")


@pytest.fixture
def make_subject(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Subject]:
    """Return a maker of tiny random subjects by family; the same call gives the same weights."""

    def make(family: str = "gpt2", **changes: object) -> Subject:
        settings = {"vocab_size": WORDS, "bos_token_id": START, "eos_token_id": END, "pad_token_id": None, **SIZES[family], **changes}
        config = CONFIG_MAPPING[family](**settings)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return load(AutoModelForCausalLM.from_config(config).eval(), tokenizer=tokenizer, device="cpu")

    return make


@pytest.fixture
def examples() -> Callable[..., list[Example]]:
    """Return a maker of examples: an article of random words, then its first two words and the end token as the summary."""

    def make(count: int, seed: int = 0) -> list[Example]:
        words = random.Random(seed)
        made = []
        for number in range(count):
            article = [words.randrange(4, WORDS) for _ in range(words.randint(4, 14))]
            ids = (3, *article, JOINT, *article[:2], END)
            made.append(Example(f"{seed}-{number}", ids, (1, 1 + len(article)), (len(ids) - 3, len(ids)), truncated=False))
        return made

    return make


@pytest.fixture
def run(make_subject, examples, tmp_path):
    """Train into a folder of this name; the subject is made anew each time, as in another process."""

    def run(name, method="lora", *, family="gpt2", settings=SETTINGS, execution=Execution(seed=4), **options):
        subject = make_subject(family)
        placed = placed_on(subject) if method == "lora" else None
        return tune(
            subject,
            examples(20),
            examples(9, seed=1),
            tmp_path / name,
            method=method,
            placed=placed,
            settings=settings,
            execution=execution,
            **options,
        )

    return run
