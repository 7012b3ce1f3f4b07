"""Pairs from files: what is read is what stands there, and what cannot be used is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mechscope.data.pair_files import read_facts, read_pairs
from mechscope.errors import DataError
from tests.slips import slip

Write = Callable[[Sequence[object]], Path]

GOOD = {"clean": "The girl", "corrupt": "The boys", "answers": [" is"], "wrong_answers": [" are"]}


@pytest.fixture
def words() -> PreTrainedTokenizerBase:
    """Return a tokenizer of whole words with an unknown token, offsets and no case."""
    vocabulary = {word: at for at, word in enumerate(["<unk>", "the", "girl", "boys", "is", "are", "on", "it"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("name", ["ioi", "docstring", "greater_than"])
def test_the_published_prompts_line_up_under_gpt2(shared: Path, gpt2: PreTrainedTokenizerBase, name: str) -> None:
    pairs = read_pairs(shared / "data" / "prompts" / f"{name}.jsonl", gpt2)
    assert (len(pairs), pairs.problems) == (500, {})
    assert all(pair.changed and pair.answers and pair.wrong_answers for pair in pairs)


def test_a_row_is_read_as_it_stands(shared: Path, gpt2: PreTrainedTokenizerBase) -> None:
    (pair,) = read_pairs(shared / "data" / "prompts" / "ioi.jsonl", gpt2, limit=1)
    assert gpt2.decode(pair.clean) == "Then, Jane and Victoria had a lot of fun at the store. Jane gave a snack to"
    assert gpt2.decode(pair.corrupt) == "Then, Roman and Ian had a lot of fun at the store. Crew gave a snack to"
    assert (gpt2.decode(pair.answers), gpt2.decode(pair.wrong_answers)) == (" Victoria", " Jane")
    assert [gpt2.decode([pair.clean[at]]) for at in pair.changed] == [" Jane", " Victoria", " Jane"]


def test_a_year_has_every_later_one_as_an_answer(shared: Path, gpt2: PreTrainedTokenizerBase) -> None:
    (pair,) = read_pairs(shared / "data" / "prompts" / "greater_than.jsonl", gpt2, limit=1)
    assert [gpt2.decode([answer]) for answer in pair.answers] == [str(year) for year in range(64, 100)]
    assert len(pair.wrong_answers) == 64


def test_rows_of_unequal_length_are_named_or_counted(shared: Path, gpt2: PreTrainedTokenizerBase) -> None:
    path = shared / "data" / "prompts" / "subject_verb_agreement.jsonl"
    with pytest.raises(DataError, match="line 18: clean has 5 tokens, corrupt has 6: patching compares them token by token"):
        read_pairs(path, gpt2)
    pairs = read_pairs(path, gpt2, on_problem="skip")
    assert len(pairs) + pairs.problems["lengths_differ"] == 500
    assert set(pairs.problems) == {"lengths_differ"}
    assert pairs.pairs[17].id == "subject_verb_agreement-19"


def test_a_fact_marks_its_subject_and_asks_for_the_first_token_after(shared: Path, gpt2: PreTrainedTokenizerBase) -> None:
    facts = read_facts(shared / "data" / "prompts" / "factual_recall.jsonl", gpt2)
    assert (len(facts), facts.problems) == (1209, {})
    first = facts.pairs[0]
    assert gpt2.decode(first.clean[slice(*first.segments["subject"][0])]) == "Vinson Massif"
    assert (first.clean, gpt2.decode(first.answers)) == (first.corrupt, " Antarctica")


def test_a_tokenizer_that_sets_a_start_token_shifts_segments(jsonl: Write, tinystories: PreTrainedTokenizerBase) -> None:
    (fact,) = read_facts(jsonl([{"prompt": "The dog saw Tim", "subject": "dog", "answer": " run"}]), tinystories)
    assert fact.clean[0] == tinystories.bos_token_id
    assert list(fact.clean) == tinystories("The dog saw Tim")["input_ids"]
    assert "dog" in tinystories.decode(fact.clean[slice(*fact.segments["subject"][0])])


def test_answers_and_ids_may_be_plain_and_repeated(jsonl: Write, gpt2: PreTrainedTokenizerBase) -> None:
    row = GOOD | {"answers": " is", "wrong_answers": [" are", " are"], "id": 7}
    (pair,) = read_pairs(jsonl([row]), gpt2)
    assert pair.id == "7"
    assert (gpt2.decode(pair.answers), gpt2.decode(pair.wrong_answers)) == (" is", " are")


def test_there_may_be_no_wrong_answer(jsonl: Write, gpt2: PreTrainedTokenizerBase) -> None:
    assert read_pairs(jsonl([GOOD | {"wrong_answers": []}]), gpt2).pairs[0].wrong_answers == ()


def test_the_clean_side_alone_is_enough_where_no_corrupt_text_is_needed(jsonl: Write, gpt2: PreTrainedTokenizerBase) -> None:
    short = {**GOOD, "corrupt": "a text of another length, which nobody reads"}
    alone = {"clean": GOOD["clean"], "id": "alone"}
    whole, bare = read_pairs(jsonl([short, alone]), gpt2, corrupt=False).pairs
    expected = read_pairs(jsonl([GOOD]), gpt2).pairs[0]
    assert whole.clean == whole.corrupt == expected.clean
    assert (whole.answers, whole.wrong_answers, whole.segments) == (expected.answers, expected.wrong_answers, expected.segments)
    assert whole.target is None
    assert (bare.answers, bare.target) == ((), (1, len(expected.clean)))
    with pytest.raises(DataError, match="no 'corrupt'"):
        read_pairs(jsonl([alone]), gpt2)
    with pytest.raises(DataError, match="clean is 1 token and has no answers"):
        read_pairs(jsonl([{"clean": " the"}]), gpt2, corrupt=False)


def test_segments_mark_a_text_at_each_place_where_it_is_a_word(jsonl: Write, gpt2: PreTrainedTokenizerBase) -> None:
    row = GOOD | {
        "clean": "Al saw Also Al and",
        "corrupt": "Al saw Also Al or",
        "subject": "saw Also",
        "segments": {"who": "Al", "part": "so"},
    }
    (pair,) = read_pairs(jsonl([row]), gpt2)
    read = {name: [gpt2.decode(pair.clean[slice(*span)]) for span in spans] for name, spans in pair.segments.items()}
    assert read == {"subject": [" saw Also"], "who": ["Al", " Al"], "part": [" Also"]}  # "so" is no word, so it is sought within one


def test_a_limit_is_the_start_of_the_file(jsonl: Write, gpt2: PreTrainedTokenizerBase) -> None:
    rows = [GOOD | {"id": str(at)} for at in range(5)]
    path = jsonl([{"clean": 1}, *rows])
    assert [pair.id for pair in read_pairs(path, gpt2, limit=2, on_problem="skip")] == ["0", "1"]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"corrupt": "The old girls"}, "lengths_differ", "clean has 2 tokens, corrupt has 3: .* make both the same length"),
    ({"corrupt": "The girl"}, "same_texts", "clean and corrupt are the same text"),
    ({"answers": []}, "no_answers", "answers is empty: write at least one right answer"),
    ({"answers": [" unbelievability"]}, "answer_not_one_token", r"answer ' unbelievability' is 2 tokens, not one: ' unbeliev', 'ability'"),
    ({"wrong_answers": [" are not"]}, "answer_not_one_token", "answer ' are not' is 2 tokens, not one: ' are', ' not'"),
    ({"wrong_answers": [" are", " is"]}, "right_and_wrong", "' is' is both a right and a wrong answer"),
    ({"answers": None}, "missing", "no 'answers'; the row has 'clean', 'corrupt', 'answers', 'wrong_answers'"),
    ({"clean": 5}, "not_text", "'clean' is a int, not a text"),
    ({"answers": 5}, "not_text", "'answers' is a int, not a text"),
    ({"answers": [" is", 5]}, "not_text", "'answers' holds a int, not a text"),
    ({"answers": [""]}, "empty", "an empty text in 'answers'"),
    ({"clean": "  "}, "empty", "an empty text in 'clean'"),
    ({"clean": "half \ud83d"}, "undecodable", "half a character .a lone surrogate. in 'clean'"),
    ({"subject": "dog"}, "segment_absent", "subject 'dog' does not stand in 'The girl': copy it"),
    ({"segments": ["girl"]}, "not_text", "'segments' is not an object of names and texts"),
    ({"segments": {"last": "girl"}}, "segment_name", "a segment is named 'last', which means something else"),
]


@pytest.mark.parametrize(("change", "reason", "message"), BAD)
def test_a_row_that_cannot_be_used_is_named_or_counted(
    jsonl: Write, gpt2: PreTrainedTokenizerBase, change: dict[str, Any], reason: str, message: str
) -> None:
    path = jsonl([GOOD, GOOD | change])
    with pytest.raises(DataError, match=f"rows.jsonl, line 2: {message}.*on_problem=.skip. to leave such rows out"):
        read_pairs(path, gpt2)
    pairs = read_pairs(path, gpt2, on_problem="skip")
    assert ([pair.id for pair in pairs], pairs.problems) == (["rows-1"], {reason: 1})


def test_a_key_that_is_missing_is_named_with_those_that_are_there(jsonl: Write, gpt2: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="line 1: no 'corrupt'; the row has 'clean', 'answer': add 'corrupt'"):
        read_pairs(jsonl([{"clean": "a", "answer": " b"}]), gpt2)
    with pytest.raises(DataError, match="line 1: no 'subject'; the row has 'prompt'"):
        read_facts(jsonl([{"prompt": "a"}]), gpt2)


def test_two_rows_of_one_id_are_an_error(jsonl: Write, gpt2: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="line 2: the same id 'x' as an earlier row"):
        read_pairs(jsonl([GOOD | {"id": "x"}, GOOD | {"id": "x"}]), gpt2)


def test_an_answer_outside_the_vocabulary_is_an_error(jsonl: Write, words: PreTrainedTokenizerBase) -> None:
    row = {"clean": "the girl", "corrupt": "the boys", "answers": ["is"], "wrong_answers": ["are"]}
    assert len(read_pairs(jsonl([row]), words)) == 1
    with pytest.raises(DataError, match=r"answer 'was' is not in the tokenizer's vocabulary .it becomes '<unk>'"):
        read_pairs(jsonl([row | {"answers": ["was"]}]), words)
    with pytest.raises(DataError, match="answer 'rome' is not in the tokenizer's vocabulary"):
        read_facts(jsonl([{"prompt": "it is on", "subject": "it", "answer": "rome"}]), words)


def test_texts_that_a_tokenizer_cannot_tell_apart_are_an_error(jsonl: Write, words: PreTrainedTokenizerBase) -> None:
    row = {"clean": "the dog", "corrupt": "the cat", "answers": ["is"], "wrong_answers": ["are"]}
    with pytest.raises(DataError, match="clean and corrupt are the same tokens"):
        read_pairs(jsonl([row]), words)


def test_segments_need_a_tokenizer_with_offsets(jsonl: Write, slow: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="line 1: CharacterTokenizer gives no character offsets"):
        read_facts(jsonl([{"prompt": "a b", "subject": "b", "answer": "c"}]), slow)
    row = {"clean": "a b", "corrupt": "a c", "answers": "d", "wrong_answers": "e"}
    assert read_pairs(jsonl([row]), slow).pairs[0].clean == tuple(b"a b")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, jsonl: Write, gpt2: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "bad.jsonl"
    with pytest.raises(DataError, match=r"bad\.jsonl: no such file"):
        read_pairs(path, gpt2)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"bad\.jsonl is empty"):
        read_pairs(path, gpt2)
    path.write_bytes(b"\n\n")
    with pytest.raises(DataError, match=r"no usable pair .it has no rows."):
        read_pairs(path, gpt2)
    path.write_bytes(b'{"clean": "\xff"}\n')
    with pytest.raises(DataError, match="line 1: bytes that are not UTF-8: save the file as UTF-8"):
        read_pairs(path, gpt2)
    path.write_bytes(b'{"clean": "a"}\n{"clean": \n')
    with pytest.raises(DataError, match="line 2 is not valid JSON"):
        read_pairs(path, gpt2, on_problem="skip")
    path.write_bytes(b"[1, 2]\n")
    with pytest.raises(DataError, match="line 1 holds a JSON list, not an object"):
        read_pairs(path, gpt2)


def test_skipping_everything_is_an_error_that_counts(jsonl: Write, gpt2: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"no usable pair .2 rows left out: 1 no answers, 1 same texts."):
        read_pairs(jsonl([GOOD | {"answers": []}, GOOD | {"corrupt": GOOD["clean"]}]), gpt2, on_problem="skip")


def test_options_that_make_no_sense_are_errors(jsonl: Write, gpt2: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="limit is 0: ask for at least 1 pair"):
        read_pairs(jsonl([GOOD]), gpt2, limit=0)
    with pytest.raises(DataError, match='on_problem \'ignore\': choose "error" or "skip"'):
        read_pairs(jsonl([GOOD]), gpt2, on_problem=slip("ignore"))


def test_control_tokens_written_in_a_prompt_are_meant(words: PreTrainedTokenizerBase, jsonl: Write) -> None:
    words.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    (user,) = words.convert_tokens_to_ids(["<|user|>"])
    row = {"clean": "<|user|>the girl", "corrupt": "<|user|>the boys", "answers": ["is"], "wrong_answers": ["are"], "subject": "girl"}
    (pair,) = read_pairs(jsonl([row]), words)
    assert pair.clean == (user, 1, 2)
    assert pair.segments == {"subject": ((2, 3),)}
