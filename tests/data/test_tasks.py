"""Generated tasks: the answer follows from the clean text, not from the corrupt one, under any tokenizer that has the words."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from mechscope.choices import PAIR_TASKS
from mechscope.data.newsroom import newsroom_tokenizer
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.data.tasks import TASKS, docstring, generate_pairs, greater_than, induction, ioi, repeated
from mechscope.errors import DataError


def read(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def at(pair: PromptPair, name: str, *, corrupt: bool = False) -> list[int]:
    ids = pair.corrupt if corrupt else pair.clean
    return [one for span in pair.segments[name] for one in ids[slice(*span)]]


@pytest.mark.parametrize("task", TASKS)
def test_pairs_depend_on_seed_and_number_alone(gpt2: PreTrainedTokenizerBase, task: str) -> None:
    pairs = generate_pairs(task, gpt2, 40, seed=3)
    assert len(pairs) == 40
    assert pairs.hash == generate_pairs(task, gpt2, 40, seed=3).hash
    assert pairs.first(10).hash == generate_pairs(task, gpt2, 10, seed=3).hash
    assert pairs.hash != generate_pairs(task, gpt2, 40, seed=4).hash
    assert len({pair.clean for pair in pairs}) == len({pair.id for pair in pairs}) == 40


@pytest.mark.parametrize("task", ["ioi", "greater_than", "docstring"])
def test_texts_are_cut_as_the_tokenizer_itself_would(gpt2: PreTrainedTokenizerBase, task: str) -> None:
    for pair in generate_pairs(task, gpt2, 100):
        for ids in (pair.clean, pair.corrupt):
            assert gpt2(read(gpt2, ids))["input_ids"] == list(ids)


@pytest.mark.parametrize("name", ["gpt2", "newsroom"])
def test_the_indirect_object_is_the_name_that_is_said_once(request: pytest.FixtureRequest, name: str) -> None:
    tokenizer = newsroom_tokenizer() if name == "newsroom" else request.getfixturevalue(name)
    orders = []
    for pair in ioi(tokenizer, 50):
        (answer,), (wrong,) = pair.answers, pair.wrong_answers
        assert (pair.clean.count(answer), pair.clean.count(wrong)) == (1, 2)
        assert at(pair, "io") == [answer]
        assert at(pair, "s1") == at(pair, "s2") == [wrong]
        orders.append(pair.segments["io"] < pair.segments["s1"])
    assert orders == [True, False] * 25


def test_the_corrupt_story_names_three_other_people(gpt2: PreTrainedTokenizerBase) -> None:
    for pair in ioi(gpt2, 50):
        names = [at(pair, name, corrupt=True)[0] for name in ("io", "s1", "s2")]
        assert len({*names, *pair.answers, *pair.wrong_answers}) == 5
        assert sorted(pair.changed) == sorted(span[0] for name in ("io", "s1", "s2") for span in pair.segments[name])


def test_a_year_is_answered_by_every_later_one(gpt2: PreTrainedTokenizerBase) -> None:
    for pair in greater_than(gpt2, 50):
        found = re.fullmatch(r"The \w+ lasted from the year (\d\d)(\d\d) to the year \1", read(gpt2, pair.clean))
        assert found is not None
        year = int(found[2])
        assert [int(gpt2.decode([answer])) for answer in pair.answers] == list(range(year + 1, 100))
        assert [int(gpt2.decode([answer])) for answer in pair.wrong_answers] == list(range(year + 1))
        assert read(gpt2, tuple(at(pair, "year"))) == found[2]
        assert read(gpt2, tuple(at(pair, "year", corrupt=True))) == "01"
        assert len(pair.changed) == 1


def test_the_next_argument_is_known_from_the_clean_signature_alone(gpt2: PreTrainedTokenizerBase) -> None:
    for pair in docstring(gpt2, 50):
        text, other = read(gpt2, pair.clean), read(gpt2, pair.corrupt)
        arguments = re.findall(r"\w+", text[text.index("(") : text.index(")")])
        described = re.findall(r":param (\w+):", text)
        (answer,) = pair.answers
        assert read(gpt2, (answer,)) == f" {arguments[5]}"
        assert described == arguments[3:5]
        assert pair.clean.count(answer) == 1
        assert answer not in pair.corrupt
        assert not set(re.findall(r":param (\w+):", other)) & set(re.findall(r"\w+", other[: other.index(")")]))
        assert at(pair, "answer") == [answer]
        assert at(pair, "signature")[:2] == at(pair, "described")
        names = {read(gpt2, (wrong,)).strip() for wrong in pair.wrong_answers}
        assert {*arguments[1:5], arguments[6]} <= names
        assert len(pair.wrong_answers) == 10


def repeats(pair: PromptPair, start: int, length: int) -> None:
    text, again = pair.clean[start : start + length], pair.clean[start + length :]
    (answer,), (wrong,) = pair.answers, pair.wrong_answers
    k = len(again)
    assert length // 2 <= k < length
    assert len(set(text)) == length
    assert again == text[:k]
    assert answer == text[k]
    assert pair.changed == (start + k,)
    assert pair.corrupt[start + k] == wrong
    assert wrong not in pair.clean
    assert pair.segments == {"first": ((start + k - 1, start + k),), "next": ((start + k, start + k + 1),)}


def test_repeated_tokens_say_what_comes_next() -> None:
    pairs = induction(50, 40, seed=1, length=9)
    for pair in pairs:
        repeats(pair, 0, 9)
    assert {len(pair.clean) for pair in pairs} == {13, 14, 15, 16, 17}
    assert max(max(pair.clean) for pair in pairs) < 50


def test_repeated_tokens_of_a_tokenizer_are_ordinary_ones_behind_its_start_token(tinystories: PreTrainedTokenizerBase) -> None:
    special = set(tinystories.all_special_ids)
    for pair in induction(tinystories, 40):
        assert pair.clean[0] == pair.corrupt[0] == tinystories.bos_token_id
        assert not special & {*pair.clean[1:], *pair.corrupt[1:]}
        repeats(pair, 1, 16)


def test_a_repeated_text_is_scored_where_the_first_half_foretells_it(tinystories: PreTrainedTokenizerBase) -> None:
    lengths = set()
    for pair in repeated(tinystories, 40):
        ((begin, end),) = pair.segments["second"]
        half = end - begin
        lengths.add(half)
        assert (begin, end) == (1 + half, len(pair.clean))
        assert pair.clean[0] == pair.corrupt[0] == tinystories.bos_token_id
        first, again, other = pair.clean[1:begin], pair.clean[begin:], pair.corrupt[begin:]
        assert pair.corrupt[:begin] == pair.clean[:begin]
        assert first == again
        assert len({*first, *other}) == 2 * half
        assert not {*tinystories.all_special_ids} & {*first, *other}
        # nothing foretells the first token of the second half
        assert pair.target == (begin + 1, end)
    assert (min(lengths), max(lengths)) == (12, 24)


def test_repeated_texts_draw_only_what_there_is_a_row_for(tinystories: PreTrainedTokenizerBase) -> None:
    assert max(max(pair.clean + pair.corrupt) for pair in repeated(tinystories, 10, below=300)) < 300
    texts = repeated(30, 20, longest=7)
    assert {len(pair.clean) for pair in texts} == {14}
    assert max(max(pair.clean) for pair in texts) < 30


def test_the_shortest_induction_is_two_tokens_and_the_first_again() -> None:
    (pair,) = induction(3, 1, length=2)
    assert (len(pair.clean), pair.clean[0]) == (3, pair.clean[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: generate_pairs("ravens", newsroom_tokenizer(), 1),
            "task 'ravens' is not known: choose ioi, greater_than, docstring, induction, repeated",
        ),
        (lambda: generate_pairs("ioi", newsroom_tokenizer(), 0), "ioi was asked for 0 pairs: ask for at least 1"),
        (lambda: greater_than(newsroom_tokenizer(), 1), "does not make two-digit tokens: ' 1363' becomes ' 13', '6', '3', not ' 13', '63'"),
        (
            lambda: docstring(newsroom_tokenizer(), 1),
            "has 8 of 64 argument names as single tokens, at least 12 are needed .not single: page, names",
        ),
        (lambda: induction(16, 1), "16 tokens to draw from, 17 are needed: choose a length below 16"),
        (lambda: induction(50, 1, length=1), "length is 1: at least 2 tokens are needed"),
        (lambda: repeated(3, 1), "A has 1 of 3 ordinary tokens: at least 2 are needed"),
        (lambda: induction(3, 100, length=2), "only 6 different pairs turned up, 100 were asked for: ask for fewer"),
    ],
)
def test_what_cannot_be_made_is_said(make: Callable[[], Pairs], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_a_tokenizer_without_whole_words_names_them(slow: PreTrainedTokenizerBase, tinystories: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        DataError, match=r"CharacterTokenizer has 0 of \d+ names as single tokens, at least 5 are needed .not single: Mary, John"
    ):
        ioi(slow, 1)
    with pytest.raises(DataError, match="does not make two-digit tokens"):
        greater_than(tinystories, 1)


def test_the_command_line_knows_every_task_without_loading_them() -> None:
    assert tuple(TASKS) == PAIR_TASKS
