"""Roles in summarization: masses on segments and copying equal loops over whole maps, planted heads score their extremes, chance heads score chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from mechscope.data.documents import Corpus, Document
from mechscope.data.newsroom import newsroom_tokenizer
from mechscope.data.pairs import Pairs
from mechscope.data.prompt import Encoded, Example, encode
from mechscope.data.template import Template
from mechscope.errors import DataError
from mechscope.heads.document_roles import document_roles, lead_spans
from mechscope.heads.roles import RoleScores
from mechscope.instrument.execution import Execution
from mechscope.subject.load import load
from tests import families
from tests.instrument.attention_oracle import truth

OPENING, JOINT = 3, 2  # tokens before the document, and between it and the summary
SHAPES = ((17, 9), (25, 6), (12, 12))  # tokens of document and summary
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "mistral")
# RMS norms compute in float32 whatever the type
CLOSE = {family: 1e-9 if family in ("gpt2", "gpt_neox") else 1e-5 for family in FAMILIES}


def example(name: str, ids: list[int], document: int, summary: int) -> Example:
    end = OPENING + document
    return Example(name, tuple(ids), (OPENING, end), (end + JOINT, end + JOINT + summary), False)


def random_documents(n: int = 3, *, seed: int = 0, words: int = 30) -> Encoded:
    """Return random tokens of few words: summaries repeat much of their documents, and something of themselves."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(n):
        document, summary = SHAPES[index % len(SHAPES)]
        ids = torch.randint(3, 3 + words, (OPENING + document + JOINT + summary,), generator=generator).tolist()
        made.append(example(f"text {index}", ids, document, summary))
    return Encoded(tuple(made), {})


LEADS = {"text 0": (OPENING, OPENING + 5), "text 2": (OPENING + 1, OPENING + 4)}


def by_name(scores: tuple[RoleScores, ...]) -> dict[str, RoleScores]:
    return {one.role.name: one for one in scores}


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def share(row: list[float], span: tuple[int, int]) -> float:
    return sum(row[span[0] : span[1]])


def expected(text: Example, p: Tensor, lead: tuple[int, int] | None) -> dict[str, tuple[float, float]]:
    """Score one head from its whole map ``(query, key)``, in plain numbers: role to score and null."""
    rows = [p[query, : query + 1].tolist() + [0.0] * (len(text) - query - 1) for query in range(len(text))]
    # a key that can be seen has a share, if small
    even = [[(value > 0) / sum(other > 0 for other in row) for value in row] for row in rows]
    document, summary = range(*text.document), range(*text.summary)

    def both(queries: range, span: tuple[int, int]) -> tuple[float, float]:
        return mean([share(rows[query], span) for query in queries]), mean([share(even[query], span) for query in queries])

    found = {
        "within-document": both(document, text.document),
        "within-summary": both(summary, text.summary),
        "summary-to-document": both(summary, text.document),
        "lead-sentence": (float("nan"), float("nan")),
    }
    if lead is not None:
        nulls = []
        for query in summary:
            seen = [at for at in document if even[query][at] > 0]
            inside = [at for at in seen if lead[0] <= at < lead[1]]
            nulls.append(share(rows[query], text.document) * len(inside) / len(seen) if seen else 0.0)
        found["lead-sentence"] = (mean([share(rows[query], lead) for query in summary]), mean(nulls))
    hits, chances = [], []
    for at in summary:
        token = text.input_ids[at]
        places = [place for place in document if text.input_ids[place] == token]
        if places and token not in text.input_ids[text.summary[0] : at]:
            row = rows[at - 1]
            hits.append(float(row.index(max(row)) in places))
            chances.append(sum(even[at - 1][place] for place in places))
    found["retrieval"] = (mean(hits), mean(chances))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_chance_are_those_of_whole_maps(family: str) -> None:
    subject, encoded = families.subject(family, torch.float64), random_documents()
    found = by_name(document_roles(subject, encoded, lead=LEADS, execution=Execution(tokens_per_batch=60)))
    assert list(found) == ["within-document", "within-summary", "summary-to-document", "lead-sentence", "retrieval"]
    for index, text in enumerate(encoded.examples):
        maps = truth(subject.plain, torch.tensor(text.input_ids)).maps
        for layer, heads in enumerate(maps):
            for head, p in enumerate(heads):
                for name, (score, null) in expected(text, p, LEADS.get(text.id)).items():
                    assert found[name].texts[index] == text.id
                    np.testing.assert_allclose(found[name].score[index, layer, head], score, rtol=0, atol=CLOSE[family], err_msg=name)
                    np.testing.assert_allclose(found[name].null[index, layer, head], null, rtol=0, atol=CLOSE[family], err_msg=name)


def force(monkeypatch: pytest.MonkeyPatch, padding: str) -> None:
    """Pad all batches of pairs on one side."""
    batches = Pairs.batches
    monkeypatch.setattr(Pairs, "batches", lambda self, **options: batches(self, **{**options, "padding": padding}))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_matter(family: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, encoded = families.subject(family, torch.float64), random_documents()
    alone = document_roles(subject, encoded, lead=LEADS, execution=Execution(tokens_per_batch=1))
    force(monkeypatch, padding)
    together = document_roles(subject, encoded, lead=LEADS, execution=Execution(tokens_per_batch=10_000))
    for one, two in zip(alone, together, strict=True):
        np.testing.assert_allclose(two.score, one.score, rtol=0, atol=CLOSE[family], err_msg=one.role.name)
        np.testing.assert_allclose(two.null, one.null, rtol=0, atol=CLOSE[family], err_msg=one.role.name)


WORDS = 24


def reader_of(*after: Mapping[int, int]) -> Any:
    """Return a GPT-2 of one layer whose heads attend, from a token, to the tokens that each mapping names."""
    sizes = {"n_layer": 1, "n_head": len(after), "n_embd": WORDS * len(after), "n_positions": 64, "vocab_size": WORDS}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, tie_word_embeddings=False, **sizes)).double()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state |= {name: torch.ones_like(value) for name, value in state.items() if ".ln_" in name and name.endswith("weight")}
    state["transformer.wte.weight"] = torch.eye(WORDS, sizes["n_embd"], dtype=torch.float64)
    qkv = state["transformer.h.0.attn.c_attn.weight"]  # (read, query | key | value)
    for head, mapping in enumerate(after):
        for token, wanted in mapping.items():
            qkv[token, head * WORDS + wanted] = 20.0
        for token in range(WORDS):
            qkv[token, sizes["n_embd"] + head * WORDS + token] = 5.0
    model.load_state_dict(state)
    return model.eval()


def test_a_head_that_looks_for_what_comes_next_retrieves_and_others_do_not() -> None:
    # a token names the one that follows it in every summary, so a head can look for it in the document
    follows = {token: (token - 3 + 5) % (WORDS - 3) + 3 for token in range(3, WORDS)}
    following = {token: follows[follows[token]] for token in follows}
    subject = load(reader_of(follows, following))
    texts = []
    for index in range(6):
        document = torch.randperm(WORDS - 3, generator=torch.Generator().manual_seed(index)).add(3).tolist()
        summary = [document[index]]
        while len(summary) < 8:
            summary.append(follows[summary[-1]])
        # the last token before the summary tells its first
        before = next(token for token, after in follows.items() if after == summary[0])
        texts.append(example(f"text {index}", [0, 1, 2, *document, 0, before, *summary], len(document), len(summary)))
    found = by_name(document_roles(subject, Encoded(tuple(texts), {})))
    assert "lead-sentence" not in found
    np.testing.assert_array_equal(found["retrieval"].score[:, 0], [[1.0, 0.0]] * 6)
    for index, text in enumerate(texts):
        # every word stands once in the document
        chance = np.mean([1 / at for at in range(*text.summary)])
        np.testing.assert_allclose(found["retrieval"].null[index, 0], chance, rtol=0, atol=1e-12)
    # a row that finds its token (once in the document) gives it nearly all; the last row of a summary, too
    assert (found["summary-to-document"].score[:, 0] > 0.6).all()


def test_a_head_that_looks_at_everything_alike_scores_chance() -> None:
    found = by_name(document_roles(load(reader_of({}, {})), random_documents(words=WORDS - 3), lead=LEADS))
    for name in ("within-document", "within-summary", "summary-to-document", "lead-sentence"):
        np.testing.assert_allclose(found[name].score, found[name].null, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_random_weights_score_chance(family: str) -> None:
    encoded = random_documents(12, words=90)
    gaps: dict[str, list[float]] = {}
    for seed in range(16):
        for scores in document_roles(load(families.build(family, seed=seed)), encoded, lead=LEADS):
            # heads of a model share its embedding: one number per model
            gaps.setdefault(scores.role.name, []).append(float(np.nanmean(scores.score - scores.null)))
    for name, values in gaps.items():
        low, high = stats.t.interval(0.999, len(values) - 1, np.mean(values), stats.sem(values))
        assert low < 0 < high, name
        assert high - low < 0.1, name  # narrow enough to tell a role from chance


def test_a_summary_that_copies_nothing_says_nothing_of_retrieval() -> None:
    document, summary = list(range(10, 22)), list(range(40, 46))
    text = example("new words", [3, 4, 5, *document, 6, 7, *summary], len(document), len(summary))
    copying = example("copies", [3, 4, 5, *document, 6, 7, *document[:6]], len(document), len(summary))
    found = by_name(document_roles(families.subject("gpt2"), Encoded((text, copying), {})))
    assert np.isnan(found["retrieval"].score[0]).all()
    assert np.isnan(found["retrieval"].null[0]).all()
    assert np.isfinite(found["retrieval"].score[1]).all()
    assert np.isfinite(found["within-summary"].score).all()


def test_lead_spans_are_the_tokens_of_first_sentences() -> None:
    tokenizer = newsroom_tokenizer()
    documents = (
        Document("a", 'The library in Shelby burned down. "Nobody was hurt!" Mr Abbott said. It rained.', "A library burned down."),
        Document("b", "A sentence that goes on and on until it is cut away before it has ended, as they say. Another.", "It is long."),
    )
    corpus = Corpus(documents, "here")
    for template in (None, Template("{document}\n\nIn short: {summary}.")):
        encoded = encode(corpus, tokenizer, template=template, max_tokens=30)
        spans = lead_spans(corpus, encoded, tokenizer, template=template)
        first, second = encoded.examples
        assert tokenizer.decode(first.input_ids[slice(*spans["a"])]).strip() == "The library in Shelby burned down."
        assert first.document[0] == spans["a"][0]
        assert spans["b"] == second.document  # nothing but the lead is left


def test_bad_input_is_refused_by_name() -> None:
    subject, encoded = families.subject("gpt2"), random_documents()
    with pytest.raises(DataError, match=r"'text 0': its lead sentence \(0, 5\) does not lie in its tokens 3-20"):
        document_roles(subject, encoded, lead={"text 0": (0, 5)})
    with pytest.raises(DataError, match="the model reads 64"):
        document_roles(subject, Encoded((example("long", [5] * 80, 60, 10),), {}))
    with pytest.raises(DataError, match="there is no tokenizer"):
        lead_spans(Corpus((), "nowhere"), encoded, None)
