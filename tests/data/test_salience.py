"""Salience pairs: the sentence that the summary repeats is gone, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mechscope.data.documents import Corpus, Document, load_documents
from mechscope.data.newsroom import newsroom_tokenizer
from mechscope.data.pairs import Pairs
from mechscope.data.prompt import encode
from mechscope.data.salience import salience_pairs, sentence_spans
from mechscope.data.template import Template
from mechscope.errors import DataError

RAIN = ("The zoo was closed. Heavy rain fell on Oakham on Sunday. Nobody came to the zoo after all.", "Heavy rain fell on Oakham.")
FIRE = ("A fire burned down the old mill. The choir sang all evening. Guests stayed until the end.", "The mill burned down in a fire.")
VOTE = ("Voters chose a new mayor of Marlow. It was a long day. The weather stayed calm.", "Marlow voters chose a mayor.")


def corpus(*texts: tuple[str, str]) -> Corpus:
    return Corpus(tuple(Document(f"d{at}", document, summary) for at, (document, summary) in enumerate(texts)), "made here")


def read(tokenizer: PreTrainedTokenizerBase, pairs: Pairs, name: str) -> list[str]:
    return [" ".join(tokenizer.decode(pair.clean[slice(*span)]).strip() for span in pair.segments[name]) for pair in pairs]


@pytest.mark.parametrize("name", ["newsroom", "gpt2"])
def test_the_salient_sentence_is_the_one_that_the_summary_repeats(request: pytest.FixtureRequest, name: str) -> None:
    tokenizer = newsroom_tokenizer() if name == "newsroom" else request.getfixturevalue(name)
    pairs = salience_pairs(corpus(RAIN, FIRE, VOTE), tokenizer, max_tokens=200)
    assert read(tokenizer, pairs, "salient") == [
        "Heavy rain fell on Oakham on Sunday.",
        "A fire burned down the old mill.",
        "Voters chose a new mayor of Marlow.",
    ]
    assert read(tokenizer, pairs, "document") == [RAIN[0], FIRE[0], VOTE[0]]


@pytest.mark.parametrize("replace", ["other", "mask"])
@pytest.mark.parametrize("sentences", [1, 2])
def test_nothing_changes_but_salient_sentences(replace: Any, sentences: int) -> None:
    documents = load_documents("newsroom", limit=15)
    encoded = {example.id: example for example in encode(documents, newsroom_tokenizer(), max_tokens=300).examples}
    for pair in salience_pairs(documents, newsroom_tokenizer(), max_tokens=300, sentences=sentences, replace=replace):
        example = encoded[pair.id]
        assert pair.clean == example.input_ids
        assert (pair.target, pair.segments["summary"], pair.segments["document"]) == (
            example.summary,
            (example.summary,),
            (example.document,),
        )
        assert len(pair.segments["salient"]) == sentences
        salient = {at for span in pair.segments["salient"] for at in range(*span)}
        assert set(pair.changed) <= salient
        assert len(pair.changed) > len(salient) / 2
        assert all(example.document[0] <= at < example.document[1] for at in salient)


def test_other_sentences_begin_as_sentences_of_other_documents_do() -> None:
    tokenizer = newsroom_tokenizer()
    first, *_ = salience_pairs(corpus(RAIN, VOTE), tokenizer, max_tokens=200)
    put = tokenizer.decode(first.corrupt[slice(*first.segments["salient"][0])]).strip()
    assert any(put.startswith(opening) for opening in ("Voters chose", "It was a long", "The weather"))


def test_replacements_depend_on_the_seed_and_the_document_alone() -> None:
    documents = load_documents("newsroom", limit=8)
    made = salience_pairs(documents, newsroom_tokenizer(), max_tokens=300, seed=1)
    assert made.hash == salience_pairs(documents, newsroom_tokenizer(), max_tokens=300, seed=1).hash
    assert made.hash != salience_pairs(documents, newsroom_tokenizer(), max_tokens=300, seed=2).hash


def test_the_mask_is_the_first_special_token_there_is() -> None:
    # no mask, unknown or padding token in the shipped tokenizer
    tokens = PreTrainedTokenizerFast(tokenizer_object=newsroom_tokenizer().backend_tokenizer, eos_token="<|endoftext|>")
    for change, expected in (
        ({}, "<|endoftext|>"),
        ({"pad_token": "Ġthe"}, "Ġthe"),
        ({"unk_token": "Ġand"}, "Ġand"),
        ({"mask_token": "Ġof"}, "Ġof"),
    ):
        for name, token in change.items():
            setattr(tokens, name, token)
        (pair,) = salience_pairs(corpus(RAIN), tokens, max_tokens=200, replace="mask")
        assert {pair.corrupt[at] for at in pair.changed} == {tokens.convert_tokens_to_ids(expected)}


def test_a_start_token_and_another_template_shift_the_sentences(tinystories: PreTrainedTokenizerBase) -> None:
    template = Template("Text:\n{document}\nTL;DR:{summary}")
    pairs = salience_pairs(corpus(RAIN, FIRE), tinystories, max_tokens=400, template=template)
    assert "Heavy rain fell on Oakham on Sunday." in read(tinystories, pairs, "salient")[0]


def test_documents_without_a_salient_sentence_are_counted() -> None:
    late = ("Nobody came today. " * 12 + "Heavy rain fell on Oakham.", "Heavy rain fell on Oakham.")
    other = ("Nobody came today. It was a long evening in town.", "Heavy rain!")
    one = ("There is but one sentence in this text about rain.", "One sentence about rain.")
    pairs = salience_pairs(corpus(RAIN, FIRE, late, other, one), newsroom_tokenizer(), max_tokens=60)
    assert [pair.id for pair in pairs] == ["d0", "d1"]
    assert pairs.problems == {"truncated": 1, "salient_truncated": 1, "nothing_salient": 1, "too_few_sentences": 1}


def test_sentences_end_at_full_stops_with_their_quotation_marks_and_at_line_ends() -> None:
    text = "  He said “No.” Then (he left.) It cost 3.5 crowns!  北京很大。你好！\nA headline\n\nthe end"
    assert [text[begin:end] for begin, end in sentence_spans(text)] == [
        "He said “No.”",
        "Then (he left.)",
        "It cost 3.5 crowns!",
        "北京很大。",
        "你好！",
        "A headline",
        "the end",
    ]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ((RAIN,), {}, "made here: 1 usable document: sentences of other documents need at least 2"),
        ((RAIN, FIRE), {"sentences": 0}, "0 sentences are to be replaced: ask for at least 1"),
        ((RAIN, FIRE), {"sentences": 3}, "no document has 3 salient sentences to replace .2 rows left out: 2 too few sentences."),
        ((RAIN, FIRE), {"replace": "noise"}, 'replace \'noise\': choose "other" or "mask"'),
        ((("… ! ? … ! ? … ! ?", "!"), ("! ! ! ! ! ! ! !", "?")), {}, "made here: its documents hold no words"),
    ],
)
def test_what_cannot_be_made_is_said(texts: tuple[tuple[str, str], ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        salience_pairs(corpus(*texts), newsroom_tokenizer(), max_tokens=200, **options)


def test_a_tokenizer_without_offsets_or_special_tokens_is_an_error(slow: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="CharacterTokenizer gives no character offsets"):
        salience_pairs(corpus(RAIN, FIRE), slow, max_tokens=400)
    bare = PreTrainedTokenizerFast(tokenizer_object=newsroom_tokenizer().backend_tokenizer)
    with pytest.raises(DataError, match='has no mask, unknown, padding or end token: pass replace="other"'):
        salience_pairs(corpus(RAIN, FIRE), bare, max_tokens=200, replace="mask")
