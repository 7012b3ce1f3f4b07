"""The generated newsroom: its facts are where it says, its counterfactuals line up, its model copies what, where and when."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mechscope.data.documents import Corpus, Document, load_documents
from mechscope.data.newsroom import ROLES, Article, Role, counterfactual, generate, newsroom_model_path, newsroom_tokenizer, split_articles
from mechscope.data.newsroom.events import EVENTS
from mechscope.data.newsroom.train import mention_losses, write_card
from mechscope.data.newsroom.training_texts import IGNORED, SEGMENT, repeats
from mechscope.data.newsroom.vocabulary import COUNTS, DATES, FIRST_NAMES, LAST_NAMES, PLACES, WEEKDAYS
from mechscope.data.pieces import Pieces
from mechscope.data.prompt import encode
from mechscope.data.spans import locate
from mechscope.errors import DataError
from tests.slips import slip


@cache
def articles() -> tuple[Article, ...]:
    return generate(300, 7)


def values(role: Role, kind: str) -> set[str]:
    return {
        "who": {f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES},
        "what": set(next(event.whats for event in EVENTS if event.kind == kind)),
        "where": set(PLACES),
        "when": {*WEEKDAYS, *DATES},
        "count": set(COUNTS),
    }[role]


def test_an_article_depends_on_its_seed_and_number_alone() -> None:
    assert generate(300, 7)[:40] == generate(40, 7)
    assert len({article.document for article in (*articles(), *generate(300, 8))}) == 600


def test_the_newsroom_of_today_is_the_newsroom_of_tomorrow() -> None:
    article = generate(3, 0)[2]
    facts = {"who": "Carla Vargas", "what": "yacht", "where": "Underhill", "when": "March 10", "count": "87"}
    assert {fact.role: fact.text for fact in article.facts} == facts
    assert article.summary == "A yacht broke down near Underhill on March 10. All 87 travellers were rescued by Carla Vargas."


def test_every_span_holds_its_fact_in_full_or_the_surname() -> None:
    for article in articles():
        assert [fact.role for fact in article.facts] == list(ROLES)
        for fact in article.facts:
            assert fact.text in values(fact.role, article.kind)
            forms = {fact.text, fact.text.split()[-1]} if fact.role == "who" else {fact.text}
            mentions = [article.document[slice(*span)] for span in fact.document_spans]
            assert set(mentions) <= forms
            assert mentions[0] == fact.text
            assert [article.summary[slice(*span)] for span in fact.summary_spans] == [fact.text]


def test_no_mention_of_a_fact_is_outside_its_spans() -> None:
    for article in articles():
        for fact in article.facts:
            word = fact.text.split()[-1] if fact.role == "who" else fact.text
            for text, spans in ((article.document, fact.document_spans), (article.summary, fact.summary_spans)):
                found = [match.start() for match in re.finditer(rf"\b{word}\b", text)]
                assert len(found) == len(spans), (article.document, word)
                assert all(any(begin <= at < end for begin, end in spans) for at in found)


def test_every_fact_is_mentioned_again() -> None:
    assert min(len(fact.document_spans) for article in articles() for fact in article.facts) >= 2


def test_articles_name_other_people_places_and_numbers_too() -> None:
    others = Counter[str]()
    pools: dict[Role, tuple[str, ...]] = {"who": LAST_NAMES, "where": PLACES, "count": COUNTS}
    for article in articles():
        for role, pool in pools.items():
            fact = article.fact(role)
            others[role] += any(re.search(rf"\b{value}\b", article.document) for value in pool if value not in fact.text.split())
    assert min(others.values()) > 150, others


def test_articles_and_summaries_are_as_long_as_promised() -> None:
    tokenizer = newsroom_tokenizer()
    assert all(90 <= len(tokenizer(" " + article.document)["input_ids"]) <= 160 for article in articles())
    assert all(15 <= len(tokenizer(" " + article.summary)["input_ids"]) <= 40 for article in articles())


def test_articles_are_about_every_kind_of_event_in_varied_words() -> None:
    assert {article.kind for article in articles()} == {event.kind for event in EVENTS}
    opening_words = Counter(" ".join(article.document.split()[:2]) for article in articles())
    assert opening_words.most_common(1)[0][1] < 30
    sentences = Counter(sentence for article in articles() for sentence in re.split(r"(?<=[.”]) ", article.document))
    assert all(count == 1 for article in articles() for count in Counter(re.split(r"(?<=[.”]) ", article.document)).values())
    assert len(sentences) > 1500


def test_splits_share_no_article_and_a_limit_is_a_start() -> None:
    texts = {
        article.document
        for split in ("train", "validation", "test")
        for seed in (0, 1)
        for article in split_articles(split, limit=150, seed=seed)
    }
    assert len(texts) == 900
    small, large = load_documents("newsroom", split="test", limit=5), load_documents("newsroom:test", limit=9)
    assert large.documents[:5] == small.documents
    assert large.split == "test"
    assert len(load_documents("newsroom:validation")) == 200


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_documents("newsroom", split="dev"), r"newsroom has splits train, validation, test; 'dev' is none of them"),
        (lambda: load_documents("newsroom:train", split="test"), r'names split "train", but split="test" was given'),
        (lambda: load_documents("newsroom", seed=-1), r"newsroom seed -1: seeds below 0 are those of the shipped model"),
        (lambda: generate(0, 1), r"asked for 0 articles: ask for at least 1"),
        (lambda: generate(1, 1)[0].fact(slip("why")), r"facts who, what, where, when, count; 'why' is none of them"),
    ],
)
def test_what_the_newsroom_lacks_is_said(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize("role", ROLES)
def test_a_counterfactual_differs_in_one_fact_everywhere_and_lines_up(role: Role) -> None:
    tokenizer = newsroom_tokenizer()
    for article in articles()[:60]:
        other = counterfactual(article, role, 5)
        fact, swapped = article.fact(role), other.fact(role)
        assert swapped.text != fact.text
        assert swapped.text in values(role, article.kind)
        # as text: the other facts' words stand at their (moved) spans and the old one is gone
        assert [f.text for f in other.facts if f.role != role] == [f.text for f in article.facts if f.role != role]
        for old, new in zip(article.facts, other.facts, strict=True):
            for text, spans, old_text, old_spans in (
                (other.document, new.document_spans, article.document, old.document_spans),
                (other.summary, new.summary_spans, article.summary, old.summary_spans),
            ):
                mentions = [text[slice(*span)] for span in spans]
                before = [old_text[slice(*span)] for span in old_spans]
                assert mentions == [
                    new.text if mention == old.text else new.text.split()[-1] if old.role == "who" else "" for mention in before
                ]
        assert re.search(rf"\b{fact.text.split()[-1] if role == 'who' else fact.text}\b", other.document) is None
        # as tokens of a prompt: equal outside the fact, different inside
        pair = [Document(a.id, a.document, a.summary) for a in (article, other)]
        first, second = (encode(Corpus((document,), "made"), tokenizer, max_tokens=384).examples[0] for document in pair)
        assert len(first) == len(second)
        assert (first.document, first.summary) == (second.document, second.summary)
        inside: set[int] = set()
        for begin, end in locate(first, pair[0], tokenizer, document_spans=fact.document_spans, summary_spans=fact.summary_spans):
            assert first.input_ids[begin:end] != second.input_ids[begin:end]
            inside |= set(range(begin, end))
        differing = {at for at in range(len(first)) if first.input_ids[at] != second.input_ids[at]}
        assert differing
        assert differing <= inside


def test_every_value_has_another_of_its_kind_with_as_many_tokens() -> None:
    tokenizer = newsroom_tokenizer()
    pools = [FIRST_NAMES, LAST_NAMES, PLACES, WEEKDAYS, DATES, COUNTS, *(event.whats for event in EVENTS)]
    for pool in pools:
        lengths = Counter(len(tokenizer(" " + value)["input_ids"]) for value in pool)
        assert min(lengths.values()) >= 2, [value for value in pool if lengths[len(tokenizer(" " + value)["input_ids"])] == 1]


def test_a_counterfactual_is_the_same_for_the_same_seed_and_varies_with_it() -> None:
    article = articles()[0]
    assert counterfactual(article, "where", 1) == counterfactual(article, "where", 1)
    assert len({counterfactual(article, "where", seed).fact("where").text for seed in range(8)}) > 3


@pytest.mark.parametrize("role", ROLES)
def test_counterfactuals_line_up_under_another_tokenizer_or_say_that_none_does(gpt2: PreTrainedTokenizerBase, role: Role) -> None:
    found = []
    for article in articles()[:20]:
        with suppress(DataError):  # the names of the newsroom were made for another tokenizer
            found.append((article, counterfactual(article, role, 5, gpt2)))
    assert len(found) >= 10
    for article, other in found:
        assert len(gpt2(other.document)["input_ids"]) == len(gpt2(article.document)["input_ids"])
        assert len(gpt2(other.summary)["input_ids"]) == len(gpt2(article.summary)["input_ids"])


def test_a_counterfactual_that_cannot_line_up_is_an_error(slow: PreTrainedTokenizerBase, gpt2: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="CharacterTokenizer gives no character offsets"):
        counterfactual(articles()[0], "where", 0, slow)
    # GPT-2's tokenizer has one token for every other place that can burn, two for a bookshop
    article = next(article for article in articles() if article.fact("what").text == "bookshop")
    with pytest.raises(
        DataError, match=f"{article.id}: none of 11 other values for what has as many tokens as 'bookshop' under GPT2Tokenizer"
    ):
        counterfactual(article, "what", 0, gpt2)


def test_the_tokens_of_a_fact_read_as_the_fact() -> None:
    pieces = Pieces(newsroom_tokenizer())
    for article in articles()[:50]:
        ids = pieces.ids([article.document], first=True)[0]
        for fact in article.facts:
            for (begin, end), span in zip(
                pieces.token_spans(article.document, fact.document_spans, first=True), fact.document_spans, strict=True
            ):
                assert newsroom_tokenizer().decode(ids[begin:end]).strip() == article.document[slice(*span)]


def test_the_shipped_model_is_small_float32_when_loaded_and_made_by_the_script() -> None:
    folder = newsroom_model_path()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3.7e6
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(newsroom_tokenizer()) <= 2048
    assert "Made by `python -m mechscope.data.newsroom.train" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_shipped_model_knows_how_the_news_is_written() -> None:
    model = AutoModelForCausalLM.from_pretrained(newsroom_model_path()).eval()
    losses = []
    with torch.no_grad():
        for article in split_articles("validation", limit=20):
            ids = torch.tensor([newsroom_tokenizer()(article.document)["input_ids"]])
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert sum(losses) / len(losses) < 1.4  # nats per token; a uniform guess has log 2,048 = 7.6


@cache
def losses_at_mentions() -> dict[str, tuple[float, float]]:
    model = AutoModelForCausalLM.from_pretrained(newsroom_model_path()).eval()
    return mention_losses(model, newsroom_tokenizer(), 40)


# on the card's 100 articles the ratios are 0.30, 0.45 and 0.09; who and count, whose later mentions follow other words, are not copied
@pytest.mark.parametrize(("role", "at_most"), [("what", 0.5), ("where", 0.65), ("when", 0.3)])
def test_the_shipped_model_expects_a_fact_it_has_read(role: Role, at_most: float) -> None:
    first, later = losses_at_mentions()[role]
    assert later < at_most * first


@pytest.mark.parametrize("role", ["what", "where", "when"])
def test_the_shipped_model_copies_whichever_fact_it_has_read(role: Role) -> None:
    model = AutoModelForCausalLM.from_pretrained(newsroom_model_path()).eval()
    pieces = Pieces(newsroom_tokenizer())
    followed = 0
    for article in split_articles("validation", limit=40):
        ids, other_ids = (pieces.ids([a.document], first=True)[0] for a in (article, counterfactual(article, role, 0)))
        begin, end = pieces.token_spans(article.document, article.fact(role).document_spans, first=True)[1]
        at = next(at for at in range(begin, end) if ids[at] != other_ids[at])
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([read[:at]])).logits[0, -1] for read in (ids, other_ids)]
        own, swapped = ((row[ids[at]] - row[other_ids[at]]).item() for row in logits)
        followed += own > 0 > swapped
    assert followed > 20, followed  # of 40; a model that does not read the first mention has 0


def test_repeated_rows_can_be_told_by_copying_after_the_first_round() -> None:
    tokens, labels = repeats(torch.Generator().manual_seed(0), rows=50, length=60)
    for row, expected in zip(tokens, labels, strict=True):
        period = int((expected == IGNORED).sum())
        assert SEGMENT[0] <= period <= SEGMENT[1]
        assert torch.equal(row[period:], row[:-period])
        assert torch.equal(expected[period:], row[period:])
        assert (expected[:period] == IGNORED).all()


def test_the_model_card_states_how_the_model_was_made(tmp_path: Path) -> None:
    write_card(tmp_path, "python -m x --steps 3", {"steps": 3}, 1.23456, {"who": (4.0, 0.5)})
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Made by `python -m x --steps 3`" in card
    assert "| final training loss (mean of the last 20 steps) | 1.235 nats per token |" in card
    assert "| who | 4.00 | 0.50 |" in card
