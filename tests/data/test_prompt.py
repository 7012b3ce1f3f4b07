"""Examples, prompts and batches: what is cut, what is never cut, and where everything stands."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mechscope.data import pieces
from mechscope.data.documents import Corpus, Document
from mechscope.data.newsroom import newsroom_tokenizer
from mechscope.data.prompt import Batch, Encoded, Example, Padding, batches, collate, encode, encode_prompt, pad_id
from mechscope.data.spans import locate
from mechscope.data.template import Template
from mechscope.errors import DataError
from tests.slips import slip

TEXTS = (
    ("Maria Lopez opened a new library in Marlow on Monday. “It was time,” said Lopez.", "Lopez opened a library in Marlow."),
    ("Zürich: 北京 says naïve café 🙂 crowds  had\n\nthree lines\tand tabs.", "Crowds 🙂 in 北京."),
    ("The end token <|endoftext|> written out is text, and <|end_story|> too.", "It is <|endoftext|> text."),
    ("word " * 400, "One word, many times."),
)
TEMPLATES = (
    Template(),
    Template("{document}\nTL;DR:{summary}"),
    Template("Summarize {this} text.\n\n{document}\n\nIn short:\n{summary}\nEnd of summary."),
)


def corpus(*texts: tuple[str, str]) -> Corpus:
    return Corpus(tuple(Document(f"d{number}", document, summary) for number, (document, summary) in enumerate(texts)), "made here")


def decoded(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("template", TEMPLATES)
def test_spans_decode_to_the_texts_and_the_rest_to_the_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    # TinyStories' tokenizer has no tokens for characters beyond ASCII or for braces: no encoding could hold them
    texts = [text for text in TEXTS if "".join(text).isascii() or tokenizer.bos_token != "<|start_story|>"]
    template = Template(template.text.replace("{this}", "this")) if tokenizer.bos_token == "<|start_story|>" else template
    encoded = encode(corpus(*texts), tokenizer, template=template, max_tokens=5000)
    end = tokenizer.eos_token
    for example, (document, summary) in zip(encoded.examples, texts, strict=True):
        assert not example.truncated
        assert decoded(tokenizer, example.input_ids[slice(*example.document)]).strip() == document.strip()
        assert decoded(tokenizer, example.input_ids[slice(*example.summary)]).strip() == summary + template.closing + end
        whole = template.text.replace("{document}", document.strip()).replace("{summary}", summary) + end
        start = tokenizer.bos_token if example.input_ids[0] == tokenizer.bos_token_id else ""
        assert decoded(tokenizer, example.input_ids).replace(" ", "") == (start + whole).replace(" ", "")


def test_an_ordinary_prompt_has_the_tokens_of_the_whole_text(tokenizer: PreTrainedTokenizerBase) -> None:
    document, summary = TEXTS[0]
    example = encode(corpus(TEXTS[0]), tokenizer, max_tokens=1000).examples[0]
    whole = tokenizer(f"Article: {document}\nSummary: {summary}")["input_ids"]
    if tokenizer.bos_token == "<|start_story|>":
        pytest.skip("TinyStories' tokenizer joins a space to the word before it: no cut before the summary has the whole text's tokens")
    assert list(example.input_ids) == [*whole, tokenizer.eos_token_id]


def test_a_start_token_is_set_where_the_tokenizer_sets_one_and_no_invisible_space_enters(tinystories: PreTrainedTokenizerBase) -> None:
    example = encode(corpus(("A dog ran home and slept there all day.", "A dog slept.")), tinystories, max_tokens=100).examples[0]
    tokens = tinystories.convert_ids_to_tokens(list(example.input_ids))
    assert tokens.count("<|start_story|>") == 1
    assert tokens[0] == "<|start_story|>"
    assert tokens[-1] == "<|end_story|>"
    assert decoded(tinystories, example.input_ids[1:-1]) == "Article: A dog ran home and slept there all day.\nSummary: A dog slept."


def test_special_tokens_written_in_a_text_are_text() -> None:
    tokenizer = newsroom_tokenizer()
    example = encode(corpus(TEXTS[2]), tokenizer, max_tokens=500).examples[0]
    assert example.input_ids.count(tokenizer.eos_token_id) == 1
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_control_tokens_of_a_template_are_one_token_each_and_those_of_an_article_are_letters() -> None:
    tokenizer = copy.deepcopy(newsroom_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|model|>"]})
    user, model = tokenizer.convert_tokens_to_ids(["<|user|>", "<|model|>"])
    template = Template("<|user|>{document}\n<|model|>{summary}<|user|>")
    article = TEXTS[0][0] + " <|user|> said so."
    example = encode(corpus((article, TEXTS[0][1])), tokenizer, template=template, max_tokens=500).examples[0]
    places = {token: [at for at, one in enumerate(example.input_ids) if one == token] for token in (user, model)}
    assert places[user] == [example.document[0] - 1, len(example) - 2]  # an end token follows the closing
    assert places[model] == [example.summary[0] - 1]


def test_a_start_token_written_in_a_template_is_not_set_twice(tinystories: PreTrainedTokenizerBase) -> None:
    made = corpus(("A dog ran home and slept there all day.", "A dog slept."))
    plain, written = (
        encode(made, tinystories, template=Template(f"{start}Article: {{document}}\nSummary: {{summary}}"), max_tokens=100).examples[0]
        for start in ("", "<|start_story|>")
    )
    assert written.input_ids.count(written.input_ids[0]) == 1
    assert written.input_ids[0] == plain.input_ids[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=st.text(min_size=1, max_size=200), summary=st.text(min_size=1, max_size=40), max_tokens=st.integers(10, 150))
def test_the_summary_is_whole_and_training_and_generation_prompts_agree(
    tokenizer: PreTrainedTokenizerBase, document: str, summary: str, max_tokens: int
) -> None:
    if not document.strip() or not summary.strip():
        return
    made = corpus((document, summary))
    complete = encode(made, tokenizer, max_tokens=10_000, min_document_tokens=1).examples[0]
    written = complete.input_ids[slice(*complete.summary)]
    try:
        example = encode(made, tokenizer, max_tokens=max_tokens, min_document_tokens=1).examples[0]
    except DataError:
        assert max_tokens - (len(complete) - (complete.document[1] - complete.document[0])) < 1  # no room for one token of article
        return
    assert example.input_ids[slice(*example.summary)] == written
    assert len(example) <= max_tokens
    assert example.truncated == (len(example) < len(complete))
    assert len(example) == min(max_tokens, len(complete))
    article = example.input_ids[slice(*example.document)]
    assert article == complete.input_ids[complete.document[0] :][: len(article)]
    prompt = encode_prompt(document, tokenizer, max_tokens=max_tokens, max_new_tokens=len(written))
    assert prompt == example.input_ids[: example.summary[0]]


def test_a_generation_prompt_ends_in_summary_colon_and_leaves_room(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = encode_prompt("word " * 500, tokenizer, max_tokens=100, max_new_tokens=30)
    assert len(prompt) == 70
    assert decoded(tokenizer, prompt).endswith("\nSummary:")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"document": "A text."}, "max_new_tokens=95 leaves no room for the article in max_tokens=100"),
        ({"document": " \n"}, "a document to summarize is empty"),
    ],
)
def test_a_prompt_that_cannot_be_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_prompt(**arguments, tokenizer=newsroom_tokenizer(), max_tokens=100, max_new_tokens=95)


def test_what_cannot_be_encoded_is_counted_and_truncated_articles_too() -> None:
    made = corpus(("too short", "s"), ("long " * 300, "fine"), ("just about long enough to be used here", "word " * 60), TEXTS[0])
    encoded = encode(made, newsroom_tokenizer(), max_tokens=60, max_summary_tokens=40)
    assert [example.id for example in encoded.examples] == ["d1", "d3"]
    assert encoded.problems == {"too_short": 1, "summary_too_long": 1, "truncated": 1}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (("too short", "s"), {"max_tokens": 60}, "document 'd0': its article has . tokens, fewer than 8"),
        (
            ("word " * 20, "word " * 50),
            {"max_tokens": 60},
            "document 'd0': its summary has .* which leaves . of max_tokens=60 for the article",
        ),
        (("word " * 20, "word " * 50), {"max_tokens": 600, "max_summary_tokens": 9}, "its summary has .* more than max_summary_tokens=9"),
    ],
)
def test_what_cannot_be_encoded_is_an_error_where_asked(text: tuple[str, str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(corpus(text), newsroom_tokenizer(), **options, on_problem="error")


def test_nothing_left_to_encode_says_why() -> None:
    tokenizer = newsroom_tokenizer()
    with pytest.raises(DataError, match=r"made here: all 2 documents are too short: the longest has . tokens, at least 8 are needed"):
        encode(corpus(("too short", "s"), ("short", "s")), tokenizer, max_tokens=60)
    with pytest.raises(DataError, match=r"none of 1 documents fits into max_tokens=20 .*the shortest summary has .* raise max_tokens"):
        encode(corpus(("word " * 20, "word " * 20)), tokenizer, max_tokens=20)
    with pytest.raises(DataError, match="made here holds no documents"):
        encode(corpus(), tokenizer, max_tokens=20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Article: {document}", r"must hold \{document\} once and then \{summary\} once; found: \{document\}"),
        ("{summary} {document}", r"found: \{summary\}, \{document\}"),
        ("{document} a {document} b {summary}", r"found: \{document\}, \{document\}, \{summary\}"),
        ("nothing", "found: neither"),
        ("{document} \n {summary}", "no words between"),
    ],
)
def test_a_template_without_its_fields_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Template(text)


def test_texts_are_tokenized_a_part_at_a_time_and_share_the_tokens_they_have_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = newsroom_tokenizer()
    texts = corpus(*[TEXTS[0]] * 3, TEXTS[3], TEXTS[0])
    whole = encode(texts, tokenizer, max_tokens=1000)
    monkeypatch.setattr(pieces, "AT_ONCE", 2)
    found = encode(texts, tokenizer, max_tokens=1000)
    assert found.hash == whole.hash
    # Python makes a new object for every number above 256, even an equal one
    first, last = (found.examples[at].input_ids for at in (0, -1))
    assert max(first) > 256
    assert all(one is other for one, other in zip(first, last, strict=True))


def test_equal_hashes_mean_equal_tokens() -> None:
    tokenizer = newsroom_tokenizer()
    first = encode(corpus(TEXTS[0]), tokenizer, max_tokens=500)
    assert encode(corpus(TEXTS[0]), tokenizer, max_tokens=500).hash == first.hash
    assert encode(corpus(TEXTS[0]), tokenizer, max_tokens=40).hash != first.hash
    assert Encoded((), {}).hash != first.hash


@pytest.mark.parametrize("name", ["newsroom", "gpt2", "tinystories"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_characters_are_located_in_the_tokens(request: pytest.FixtureRequest, name: str, template: Template) -> None:
    tokenizer = newsroom_tokenizer() if name == "newsroom" else request.getfixturevalue(name)
    document = Document("d0", "Maria Lopez opened a new library\n in Marlow on Monday. So said  Lopez.", TEXTS[0][1])
    example = encode(Corpus((document,), "made"), tokenizer, template=template, max_tokens=500).examples[0]
    words = ("Maria", "Marlow", "Lopez.", "Monday")
    found = locate(
        example,
        document,
        tokenizer,
        document_spans=[(document.document.index(word), document.document.index(word) + len(word)) for word in words],
        summary_spans=[(document.summary.index("library"), document.summary.index("library") + 7)],
        template=template,
    )
    assert [decoded(tokenizer, example.input_ids[begin:end]).strip() for begin, end in found] == [*words, "library"]
    assert all(example.document[0] <= begin < end <= example.document[1] for begin, end in found[:4])
    assert example.summary[0] <= found[4][0] < found[4][1] <= example.summary[1]


def test_characters_lost_to_truncation_have_no_tokens() -> None:
    document = Document("d0", "first " + "word " * 100 + "last", "A summary.")
    example = encode(Corpus((document,), "made"), newsroom_tokenizer(), max_tokens=60).examples[0]
    end = len(document.document)
    assert len(locate(example, document, newsroom_tokenizer(), document_spans=[(0, 5), (end - 4, end)])) == 1


def test_offsets_that_a_tokenizer_gets_wrong_are_noticed(tinystories: PreTrainedTokenizerBase) -> None:
    document = Document("d0", *TEXTS[0])  # its quotation marks have no token, and what comes after them is misplaced
    example = encode(Corpus((document,), "made"), tinystories, max_tokens=500).examples[0]
    end = len(document.document)
    with pytest.raises(DataError, match=r"places 'Lopez.' at tokens that read .*: its offsets do not fit this text"):
        locate(example, document, tinystories, document_spans=[(end - 6, end)])


def test_a_tokenizer_without_offsets_cannot_locate(slow: PreTrainedTokenizerBase) -> None:
    document = Document("d0", *TEXTS[0])
    example = encode(Corpus((document,), "made"), slow, max_tokens=500).examples[0]
    with pytest.raises(DataError, match="CharacterTokenizer gives no character offsets: use the fast version"):
        locate(example, document, slow, document_spans=[(0, 4)])


def example(length: int, name: str = "e", document: tuple[int, int] = (1, 2), summary: tuple[int, int] = (2, 3)) -> Example:
    return Example(name, tuple(range(100, 100 + length)), document, summary, False)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(3, 60), min_size=1, max_size=40), budget=st.integers(1, 200))
def test_every_example_is_in_one_batch_and_no_batch_costs_more_than_the_budget(lengths: list[int], budget: int) -> None:
    examples = [example(length, str(number)) for number, length in enumerate(lengths)]
    made = list(batches(examples, tokens_per_batch=budget, pad_id=0))
    assert sorted(one.id for batch in made for one in batch.examples) == sorted(one.id for one in examples)
    for batch in made:
        assert batch.input_ids.numel() <= budget or len(batch.examples) == 1
        assert batch.input_ids.numel() == max(map(len, batch.examples)) * len(batch.examples)
    again = batches(examples, tokens_per_batch=budget, pad_id=0)
    assert [[one.id for one in batch.examples] for batch in again] == [[one.id for one in batch.examples] for batch in made]


def test_like_lengths_go_together_longest_first() -> None:
    made = batches([example(length, str(length)) for length in (5, 20, 6, 19)], tokens_per_batch=40, pad_id=0)
    assert [[one.id for one in batch.examples] for batch in made] == [["20", "19"], ["6", "5"]]


def unpadded(batch: Batch, values: torch.Tensor) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(values, batch.attention_mask, strict=True)]


@pytest.mark.parametrize("which", ["all", "document", "summary"])
def test_padding_left_and_right_mark_the_same_rows(which: Any) -> None:
    examples = [example(9, "long", (2, 5), (6, 9)), example(5, "short", (1, 2), (3, 5))]
    expected = {"all": [list(range(9)), list(range(5))], "document": [[2, 3, 4], [1]], "summary": [[6, 7, 8], [3, 4]]}[which]
    for padding in ("left", "right"):
        batch = collate(examples, pad_id=0, padding=padding)
        rows = batch.rows(which)
        assert [batch.position_ids[row][rows[row]].tolist() for row in range(2)] == expected
        assert [(batch.input_ids[row][rows[row]] - 100).tolist() for row in range(2)] == expected


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_holds_the_pad_id_at_position_zero_and_is_masked(padding: Padding) -> None:
    batch = collate([example(7), example(4)], pad_id=55, padding=padding)
    assert unpadded(batch, batch.input_ids) == [list(range(100, 107)), list(range(100, 104))]
    assert unpadded(batch, batch.position_ids) == [list(range(7)), list(range(4))]
    assert batch.input_ids[~batch.attention_mask].tolist() == [55, 55, 55]
    assert batch.position_ids[~batch.attention_mask].tolist() == [0, 0, 0]
    assert batch.attention_mask[1].tolist() == ([False] * 3 + [True] * 4 if padding == "left" else [True] * 4 + [False] * 3)


def test_rows_marked_all_can_be_changed_without_changing_the_batch() -> None:
    batch = collate([example(7)], pad_id=0)
    batch.rows("all")[:] = False
    assert batch.attention_mask.all()


def test_the_pad_id_is_the_pad_token_or_the_end_token_or_zero() -> None:
    class Tokens:
        pad_token_id: int | None = 7
        eos_token_id: int | None = 3

    tokens = Tokens()
    assert pad_id(tokens) == 7
    tokens.pad_token_id = None
    assert pad_id(tokens) == 3
    tokens.eos_token_id = None
    assert pad_id(tokens) == 0


def test_batches_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="tokens_per_batch is 0"):
        list(batches([example(3)], tokens_per_batch=0, pad_id=0))
    with pytest.raises(DataError, match="padding 'middle'"):
        collate([example(3)], pad_id=0, padding=slip("middle"))
    with pytest.raises(DataError, match="at least one example"):
        collate([], pad_id=0)
    with pytest.raises(DataError, match="rows 'title'"):
        collate([example(3)], pad_id=0).rows(slip("title"))
