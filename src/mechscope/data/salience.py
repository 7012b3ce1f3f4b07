"""Documents and the same documents without what their summaries are about.

A sentence is salient if the reference summary says the same: the cosine of their TF-IDF vectors is high. Replacing the most salient sentences, as
many tokens for as many, and leaving all else (the summary too) as it is gives pairs whose summary has lost its source. What a model
computes for the clean text and not for the corrupt one is how it uses what matters.
"""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import PreTrainedTokenizerBase

from mechscope.data.documents import Corpus, Document, describe_problems
from mechscope.data.pairs import Pairs, PromptPair, Span
from mechscope.data.prompt import Example, encode
from mechscope.data.spans import locate
from mechscope.data.template import Template
from mechscope.errors import DataError

log = logging.getLogger(__name__)

Replacement = Literal["other", "mask"]

# up to a full stop (with quotation marks or brackets that close behind it) before white space, an East Asian full stop, or the end of a line
SENTENCE = re.compile(r"\S.*?(?:[.!?…]+[\"'”’»)\]]*(?=\s|\Z)|[。！？]+[”’」』]*|(?=\s*\n)|(?=\s*\Z))")


def salience_pairs(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template | None = None,
    max_tokens: int,
    sentences: int = 1,
    replace: Replacement = "other",
    seed: int = 0,
) -> Pairs:
    """Make pairs whose corrupt text lacks the sentences that the summary is about.

    Both texts have the same tokens outside these sentences. `target` is the summary (with its end token); segments are "salient" (the sentences
    replaced), "document" and "summary".

    Args:
        corpus: documents with reference summaries.
        tokenizer: a Hugging Face tokenizer with offsets (a "fast" one).
        template: the text around document and summary, paper 1's by default.
        max_tokens: most tokens of a text; articles are cut to fit, as in `mechscope.data.prompt.encode`.
        sentences: how many sentences to replace, the most similar ones; a document needs at least one more.
        replace: `"other"` puts sentences of other documents there, cut to the same number of tokens; `"mask"` repeats one token: the tokenizer's
            mask, unknown, padding or end token, whichever it has first. Note that the second makes texts that no model has seen.
        seed: of the choice among other documents.

    Returns:
        The pairs; `problems` counts what `encode` left out or cut and documents with `too_few_sentences`, `nothing_salient` (no sentence shares a
        word with the summary), `salient_truncated` (such a sentence was cut away with the article's end), `unplaced` (the tokenizer's offsets
        do not fit the text) or `unchanged` (the other document has the same sentence).

    Raises:
        DataError: no pair is left, no other document to take sentences from, no token to mask with, or a tokenizer without offsets.
    """
    if sentences < 1:
        raise DataError(f"salience: {sentences} sentences are to be replaced: ask for at least 1")
    if replace not in ("other", "mask"):
        raise DataError(f'replace {replace!r}: choose "other" or "mask"')
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} gives no character offsets: use the fast version of this tokenizer")
    mask = _mask(tokenizer) if replace == "mask" else None
    encoded = encode(corpus, tokenizer, template=template, max_tokens=max_tokens)
    counts = Counter(encoded.problems)
    by_id = {document.id: document for document in corpus.documents}
    texts = []
    for example in encoded.examples:
        try:
            texts.append(_Text.of(example, by_id[example.id], tokenizer, template))
        except DataError:  # offsets go astray behind characters that some tokenizers have no token for
            counts["unplaced"] += 1
    if mask is None and len(texts) < 2:
        raise DataError(
            f'{corpus.source}: {len(texts)} usable document: sentences of other documents need at least 2: add some, or pass replace="mask"'
        )
    vectors = _vectorizer(corpus)
    pairs = []
    for text in texts:
        chosen = _salient(text, vectors, sentences)
        if isinstance(chosen, str):
            counts[chosen] += 1
            continue
        spans = tuple(text.tokens[at] for at in chosen)
        rng = random.Random(f"{seed}/{text.example.id}")
        corrupt = list(text.example.input_ids)
        for begin, end in spans:
            corrupt[begin:end] = _others(text, texts, end - begin, rng) if mask is None else [mask] * (end - begin)
        if tuple(corrupt) == text.example.input_ids:  # the same sentence stands in several documents
            counts["unchanged"] += 1
            continue
        segments = {"salient": spans, "document": (text.example.document,), "summary": (text.example.summary,)}
        pairs.append(PromptPair(text.example.id, text.example.input_ids, tuple(corrupt), target=text.example.summary, segments=segments))
    problems = {reason: count for reason, count in counts.items() if count}
    what = describe_problems(problems).replace("_", " ")
    if not pairs:
        raise DataError(
            f"{corpus.source}: no document has {sentences} salient sentences to replace ({what}): raise max_tokens or ask for fewer"
        )
    if problems:
        log.warning("%s: %s", corpus.source, what)
    return Pairs(tuple(pairs), f"{corpus.source}, {sentences} salient sentences replaced ({replace}), seed {seed}", problems)


def sentence_spans(text: str) -> list[Span]:
    """Cut a text into sentences; half-open character spans without the white space between them."""
    return [match.span() for match in SENTENCE.finditer(text)]


@dataclass(frozen=True)
class _Text:
    """An encoded document, its sentences, and the tokens of those that were not cut away (the first ones)."""

    example: Example
    summary: str
    sentences: tuple[str, ...]
    tokens: tuple[Span, ...]

    @classmethod
    def of(cls, example: Example, document: Document, tokenizer: PreTrainedTokenizerBase, template: Template | None) -> _Text:
        spans = sentence_spans(document.document)
        tokens = locate(example, document, tokenizer, document_spans=spans, template=template)
        return cls(example, document.summary, tuple(document.document[begin:end] for begin, end in spans), tokens)


def _vectorizer(corpus: Corpus) -> TfidfVectorizer:
    texts = [text for document in corpus.documents for text in (document.document, document.summary)]
    try:
        return TfidfVectorizer(token_pattern=r"\w+").fit(texts)
    except ValueError as error:  # scikit-learn's "empty vocabulary"
        raise DataError(f"{corpus.source}: its documents hold no words to compare sentences by: look at the columns") from error


def _salient(text: _Text, vectors: TfidfVectorizer, count: int) -> list[int] | str:
    """Return the numbers of the sentences most like the summary, in order, or the reason why there are none."""
    if len(text.sentences) <= count:
        return "too_few_sentences"
    # the vectors have length 1 (or 0): their product is the cosine
    likeness = (vectors.transform(text.sentences) @ vectors.transform([text.summary]).T).toarray()[:, 0]
    best = np.argsort(-likeness, kind="stable")[:count]
    if likeness[best].min() <= 0:
        return "nothing_salient"
    if best.max() >= len(text.tokens):
        return "salient_truncated"
    return sorted(best.tolist())


def _others(text: _Text, texts: Sequence[_Text], count: int, rng: random.Random) -> list[int]:
    """Take tokens from sentences of other documents, each from its beginning."""
    taken: list[int] = []
    while len(taken) < count:
        other = rng.choice(texts)
        if other is not text:
            begin, end = rng.choice(other.tokens)
            taken.extend(other.example.input_ids[begin:end])
    return taken[:count]


def _mask(tokenizer: PreTrainedTokenizerBase) -> int:
    for choice in (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if choice is not None:
            return int(choice)
    raise DataError(f'{type(tokenizer).__name__} has no mask, unknown, padding or end token: pass replace="other"')
