"""Newsroom pairs: a fact's last mention comes next, and only the earlier mentions tell which it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from mechscope.data.newsroom import ROLES, Role, newsroom_tokenizer, split_articles
from mechscope.data.newsroom_pairs import newsroom_pairs
from mechscope.data.pairs import Pairs
from mechscope.errors import DataError
from tests.slips import slip

ARTICLES = {article.id: article for article in split_articles("test", limit=60)}


@pytest.mark.parametrize("role", ROLES)
def test_the_prompt_ends_where_the_fact_is_mentioned_last(role: Role) -> None:
    tokenizer = newsroom_tokenizer()
    for pair in newsroom_pairs(12, role=role):
        article = ARTICLES[pair.id]
        fact = article.fact(role)
        prompt = tokenizer.decode(pair.clean)
        last = max(begin for begin, _ in fact.document_spans)
        assert prompt == article.document[:last].rstrip()
        answer, wrong = tokenizer.decode(pair.answers), tokenizer.decode(pair.wrong_answers)
        expected = fact.text.split()[-1] if role == "who" else fact.text
        assert f" {expected}".startswith(answer)
        assert not f" {expected}".startswith(wrong)


@pytest.mark.parametrize("role", ROLES)
def test_texts_differ_in_earlier_mentions_alone(role: Role) -> None:
    tokenizer = newsroom_tokenizer()
    for pair in newsroom_pairs(12, role=role):
        fact = ARTICLES[pair.id].fact(role)
        mentions = [tokenizer.decode(pair.clean[slice(*span)]).strip(" “”.,") for span in pair.segments["fact"]]
        assert mentions[0] == fact.text
        assert len(mentions) == len(fact.document_spans) - 1
        assert set(mentions) <= {fact.text, fact.text.split()[-1]}
        assert pair.segments["first"] == pair.segments["fact"][:1]
        assert set(pair.changed) <= {at for span in pair.segments["fact"] for at in range(*span)}
        assert set(pair.changed) & set(range(*pair.segments["first"][0]))


def test_the_wrong_answer_is_what_the_corrupt_text_says() -> None:
    for pair in newsroom_pairs(20, role="where"):
        (first, _), *_ = pair.segments["first"]
        if first == 0:  # at the start of the text there is no space before the name, so it is another token
            continue
        assert pair.clean[first] == pair.answers[0]
        assert pair.corrupt[first] == pair.wrong_answers[0]


def test_as_many_pairs_come_as_asked_and_those_passed_over_are_counted() -> None:
    pairs = newsroom_pairs(30, role="when")  # dates of one month begin alike
    assert len(pairs) == 30
    assert pairs.problems["same_first_token"] > 0
    assert all(pair.answers != pair.wrong_answers for pair in pairs)
    seen = list(ARTICLES)
    assert seen.index(pairs.pairs[-1].id) + 1 == 30 + sum(pairs.problems.values())


def test_pairs_depend_on_the_seed_and_fewer_are_the_start_of_more() -> None:
    assert newsroom_pairs(10).first(4).hash == newsroom_pairs(4).hash
    assert newsroom_pairs(4, seed=1).hash != newsroom_pairs(4).hash


def test_other_tokenizers_pass_over_articles_that_do_not_line_up(
    gpt2: PreTrainedTokenizerBase, tinystories: PreTrainedTokenizerBase
) -> None:
    pairs = newsroom_pairs(10, role="what", tokenizer=gpt2)
    assert len(pairs) == 10
    assert set(pairs.problems) <= {"no_counterfactual", "same_first_token"}
    for pair in newsroom_pairs(5, role="count", tokenizer=tinystories):
        assert pair.clean[0] == tinystories.bos_token_id
        assert tinystories.decode(pair.clean[slice(*pair.segments["first"][0])]).strip().isdigit()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: newsroom_pairs(0), "newsroom was asked for 0 pairs: ask for at least 1"),
        (lambda: newsroom_pairs(2, role=slip("why")), "newsroom articles have facts who, what, where, when, count; 'why' is none of them"),
        (lambda: newsroom_pairs(2, seed=-1), "newsroom seed -1"),
    ],
)
def test_what_cannot_be_made_is_said(make: Callable[[], Pairs], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_a_tokenizer_that_never_lines_up_or_has_no_offsets_is_an_error(
    slow: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="CharacterTokenizer gives no character offsets"):
        newsroom_pairs(2, tokenizer=slow)

    def none(*_: object) -> None:
        raise DataError("nothing lines up")

    monkeypatch.setattr("mechscope.data.newsroom_pairs.counterfactual", none)
    with pytest.raises(DataError, match=r"0 of 2 pairs from 16 articles for 'where' under .* .16 no counterfactual.: choose another role"):
        newsroom_pairs(2)
