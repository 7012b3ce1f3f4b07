"""Tokenizers as they come: without padding, start or end tokens, and with tokens that somebody added."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mechscope
from mechscope.adapt.generate import encode_prompts, summarize
from mechscope.data.documents import Corpus, Document
from mechscope.errors import DataError
from mechscope.settings.decoding import Decoding
from tests import families

TEMPLATE = "w3 {document} w4 {summary}"
DOCUMENTS = tuple(
    Document(f"d{at}", " ".join(f"w{5 + (at * 7 + step) % 60}" for step in range(9 + at % 4)), f"w{10 + at} w{20 + at}") for at in range(6)
)
CORPUS = Corpus(DOCUMENTS, "made here")
OPTIONS: dict[str, Any] = {"template": TEMPLATE, "documents": 6, "noise_draws": 0, "replicates": 20, "max_tokens": 60}


def bare(words: int = families.VOCABULARY, **special: Any) -> Any:
    """Return a tokenizer of single words with those special tokens alone."""
    inner = Tokenizer(models.WordLevel({f"w{at}": at for at in range(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@torch.no_grad()
def expected(model: Any, ids_of: Any, end: list[int]) -> float:
    """Return the mean over documents of the loss on summary and end token, each text alone."""
    found = []
    for document in DOCUMENTS:
        prompt, written = [3, *ids_of(document.document), 4], [*ids_of(document.summary), *end]
        ids = torch.tensor([prompt + written])
        logs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(-logs[torch.arange(len(written)), written].mean().item())
    return sum(found) / len(found)


def numbers(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def summary_loss(result: Any, model: str) -> float:
    return float(result.tables["outputs"].set_index("rows").loc["summary", f"loss_{model}"])


@pytest.mark.parametrize("special", [{}, {"eos_token": "w2"}, {"bos_token": "w1", "eos_token": "w2"}, {"pad_token": "w0"}], ids=str)
def test_a_tokenizer_lacks_tokens_for_padding_start_or_end(special: dict[str, Any]) -> None:
    tokenizer = bare(**special)
    assert [name for name in ("pad_token_id", "bos_token_id", "eos_token_id") if getattr(tokenizer, name) is not None] == [
        f"{name}_id" for name in ("pad_token", "bos_token", "eos_token") if name in special
    ]
    base, tuned = families.build("llama"), families.build("llama", seed=1)
    result = mechscope.diff(base, tuned, CORPUS, tokenizer=tokenizer, **OPTIONS)
    end = [2] if "eos_token" in special else []
    for name, model in (("base", base), ("tuned", tuned)):
        assert summary_loss(result, name) == pytest.approx(expected(model, numbers, end), rel=1e-5)
    # padding stands for nothing: each prompt alone is continued as all of them together
    model = families.build("llama", tie_word_embeddings=False)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    decoding = Decoding(max_new_tokens=5)
    prompts = encode_prompts([each.document for each in DOCUMENTS], tokenizer, decoding=decoding, max_tokens=60)
    together = summarize(model, tokenizer, prompts, decoding=decoding)
    assert together == [summarize(model, tokenizer, [prompt], decoding=decoding)[0] for prompt in prompts]
    if not special:
        assert {len(text.split()) for text in together} == {5}


def test_a_model_is_tuned_with_a_tokenizer_without_any_special_token(tmp_path: Any) -> None:
    families.build("llama").save_pretrained(tmp_path / "base")
    bare().save_pretrained(tmp_path / "base")
    path = tmp_path / "articles.jsonl"
    rows = [dataclasses.asdict(each) for each in DOCUMENTS]
    pd.DataFrame(rows).to_json(path, orient="records", lines=True)
    sizes: dict[str, Any] = {
        "train_documents": 3,
        "validation_documents": 2,
        "test_documents": 1,
        "max_steps": 2,
        "eval_every": 1,
        "batch_size": 2,
    }
    tuned = mechscope.tune(
        tmp_path / "base", path, out=tmp_path / "tuned", template=TEMPLATE, max_tokens=60, learning_rate_full=1e-2, **sizes
    )
    assert tuned.curve["validation_loss"].iloc[-1] < tuned.curve["validation_loss"].iloc[0]
    loaded = mechscope.load(tuned.path)
    assert (loaded.tokenizer.pad_token, loaded.tokenizer.bos_token, loaded.tokenizer.eos_token) == (None, None, None)


def test_added_tokens_are_one_token_each_where_the_embedding_has_them_and_refused_where_not() -> None:
    tokenizer = bare(90, eos_token="w2")
    tokenizer.add_tokens(["<quote>", "</quote>"])
    quoting = tuple(
        dataclasses.replace(each, document=f"{each.document} <quote> w7 </quote>", summary=f"<quote> {each.summary}") for each in DOCUMENTS
    )
    corpus = Corpus(quoting, "made here")

    def ids_of(text: str) -> list[int]:  # of an untouched document: the quoted words behind it, of a summary the sign before it
        return [*numbers(text), 90, 7, 91] if len(text.split()) > 2 else [90, *numbers(text)]

    base, tuned = families.build("gpt2"), families.build("gpt2", seed=1)
    result = mechscope.diff(base, tuned, corpus, tokenizer=tokenizer, **OPTIONS)
    assert summary_loss(result, "base") == pytest.approx(expected(base, ids_of, [2]), rel=1e-5)
    # the tuned model got rows for the tokens that were added, the base has none
    small, large = families.build("gpt2", vocab_size=90), families.build("gpt2", vocab_size=90)
    large.resize_token_embeddings(92)
    with pytest.raises(DataError, match=r"holds token 91 \('</quote>'\), the embedding of 'GPT2LMHeadModel' has 90 tokens"):
        mechscope.diff(small, large, corpus, tokenizer=tokenizer, resize="truncate", **OPTIONS)
    # on documents without them the shared tokens are compared
    plain = mechscope.diff(small, large, CORPUS, tokenizer=tokenizer, resize="truncate", **OPTIONS)
    assert summary_loss(plain, "tuned") == pytest.approx(expected(small, numbers, [2]), rel=1e-5)
    assert float(plain.tables["outputs"]["kl_base_tuned"].abs().max()) < 1e-9
