"""Prompt pairs and their batches: texts line up, and every name marks the tokens it says, wherever the padding is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mechscope.data.documents import Corpus, Document
from mechscope.data.newsroom import newsroom_tokenizer
from mechscope.data.pairs import PairBatch, Pairs, PromptPair, Where, collate_pairs, from_examples, from_tokens
from mechscope.data.prompt import Padding, encode
from mechscope.errors import DataError
from tests.causal.pairs import random_pairs

LONG = PromptPair(
    "long", (1, 2, 3, 4, 5), (1, 9, 3, 8, 5), (6,), (7,), target=(3, 5), segments={"subject": ((1, 2), (3, 4)), "verb": ((2, 3),)}
)
SHORT = PromptPair("short", (1, 2, 3), (1, 2, 4), target=(1, 2), segments={"subject": ((0, 1),)})


def marked(which: Where, padding: Padding = "right", *pairs: PromptPair) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in collate_pairs(pairs or (LONG, SHORT), padding=padding).positions(which)]


def test_changed_positions_are_those_where_the_tokens_differ() -> None:
    assert LONG.changed == (1, 3)
    assert PromptPair("same", (1, 2), (1, 2)).changed == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptPair("p", (1, 2), (1,)), "pair 'p': clean has 2 tokens, corrupt has 1: patching compares them token by token"),
        (lambda: PromptPair("p", (), ()), "pair 'p' is empty"),
        (lambda: PromptPair("p", (1, 2), (1, 2), target=(0, 1)), "the first token cannot be predicted"),
        (lambda: PromptPair("p", (1, 2), (1, 2), target=(1, 3)), r"target \(1, 3\) does not lie in its 2 tokens"),
        (lambda: PromptPair("p", (1, 2), (1, 2), target=(1, 1)), r"target \(1, 1\) does not lie"),
        (lambda: PromptPair("p", (1,), (2,), (5, 6), (6,)), "token 6 is both a right and a wrong answer"),
        (lambda: collate_pairs([]), "a batch needs at least one pair"),
    ],
)
def test_a_pair_that_cannot_be_compared_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


@pytest.mark.parametrize(
    ("which", "right", "left"),
    [
        ("all", [[0, 1, 2, 3, 4], [0, 1, 2]], [[0, 1, 2, 3, 4], [2, 3, 4]]),
        ("last", [[4], [2]], [[4], [4]]),
        ("changed", [[1, 3], [2]], [[1, 3], [4]]),
        ("target", [[3, 4], [1]], [[3, 4], [3]]),
        ("subject", [[1, 3], [0]], [[1, 3], [2]]),
        (0, [[0], [0]], [[0], [2]]),
        (-2, [[3], [1]], [[3], [3]]),
        ((0, -1), [[0, 4], [0, 2]], [[0, 4], [2, 4]]),
    ],
)
def test_positions_are_counted_in_each_text(which: Where, right: list[list[int]], left: list[list[int]]) -> None:
    assert marked(which) == right
    assert marked(which, "left") == left


def test_a_mask_marks_its_tokens_but_never_padding() -> None:
    everything = torch.ones(2, 5, dtype=torch.bool)
    assert marked(everything) == [[0, 1, 2, 3, 4], [0, 1, 2]]
    assert marked(torch.zeros(2, 5, dtype=torch.bool)) == [[], []]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("verb", "positions 'verb' are not known in pair 'short': use all, last, changed, target, subject, or numbers"),
        (3, "position 3 lies outside pair 'short', which has 3 tokens"),
        (-4, "position -4 lies outside pair 'short'"),
        ((), "pair 'long' has no token at"),
        (torch.ones(2, 4, dtype=torch.bool), r"a mask of positions has shape \(2, 4\), the batch has \(2, 5\)"),
    ],
)
def test_positions_that_a_text_lacks_are_an_error(which: Where, message: str) -> None:
    with pytest.raises(DataError, match=message):
        marked(which)


def test_a_text_without_a_change_or_a_target_says_so() -> None:
    plain = PromptPair("plain", (1, 2), (1, 2))
    with pytest.raises(DataError, match="pair 'plain' has no token at 'changed'"):
        marked("changed", "right", plain)
    with pytest.raises(DataError, match="'target' are not known in pair 'plain': use all, last, changed, or numbers"):
        marked("target", "right", plain)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_real_tokens_are_the_texts_and_the_rest_is_padding(padding: Padding) -> None:
    batch = collate_pairs((LONG, SHORT), pad_id=99, padding=padding)
    for row, pair in enumerate(batch.pairs):
        assert tuple(batch.clean[row][batch.real[row]].tolist()) == pair.clean
        assert tuple(batch.corrupt[row][batch.real[row]].tolist()) == pair.corrupt
    assert batch.clean[1][~batch.real[1]].tolist() == [99, 99]
    assert [batch.shift(0), batch.shift(1)] == ([0, 2] if padding == "left" else [0, 0])


def test_batches_hold_every_pair_once_longest_first_within_the_limit() -> None:
    pairs = Pairs(tuple(PromptPair(str(n), (1,) * n, (2,) * n) for n in (2, 7, 3, 3, 40, 5)), "here")
    batches: list[PairBatch] = list(pairs.batches(tokens_per_batch=14))
    assert [[pair.id for pair in batch.pairs] for batch in batches] == [["40"], ["7", "5"], ["3", "3", "2"]]
    assert all(batch.clean.numel() <= 14 for batch in batches[1:])


def test_a_set_of_pairs_is_known_by_its_content_and_order() -> None:
    pairs = Pairs((LONG, SHORT), "here")
    assert pairs.hash == Pairs((LONG, SHORT), "there").hash
    assert pairs.hash != Pairs((SHORT, LONG), "here").hash
    assert [pair.id for pair in pairs.first(1)] == ["long"]
    assert len(pairs) == 2


def test_examples_become_texts_whose_target_is_the_summary() -> None:
    corpus = Corpus((Document("d", "Maria Lopez opened a new library in Marlow on Monday. It was time.", "Lopez opened it."),), "here")
    encoded = encode(corpus, newsroom_tokenizer(), max_tokens=200)
    (pair,) = from_examples(encoded, "here")
    assert pair.clean == pair.corrupt == encoded.examples[0].input_ids
    assert pair.target == encoded.examples[0].summary
    assert newsroom_tokenizer().decode(pair.clean[slice(*pair.segments["document"][0])]).strip() == corpus.documents[0].document


def test_rows_of_tokens_become_texts_with_every_token_but_the_first_a_target() -> None:
    rows = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert [(pair.clean, pair.corrupt, pair.target) for pair in from_tokens(rows, rows + 1)] == [
        ((1, 2, 3), (2, 3, 4), (1, 3)),
        ((4, 5, 6), (5, 6, 7), (1, 3)),
    ]


def test_halves_know_the_places_of_their_texts() -> None:
    first, second = random_pairs(2, lengths=(9, 10))
    same = Pairs((first, second, first, second, first), "resample")
    for batch in same.batches(tokens_per_batch=30):
        assert [same.pairs[index] for index in batch.indices] == list(batch.pairs)
        for half in batch.halves() if len(batch) > 1 else ():
            assert [same.pairs[index] for index in half.indices] == list(half.pairs)
            assert [index for half in batch.halves() for index in half.indices] == list(batch.indices)
    assert sorted(index for batch in same.batches(tokens_per_batch=30) for index in batch.indices) == [0, 1, 2, 3, 4]
