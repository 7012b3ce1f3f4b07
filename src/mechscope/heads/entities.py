"""Heads that follow a story's facts: from a later mention of an entity to its first, and from the summary to what matters in the document.

The newsroom's articles state five facts (who, what, where, when, how many) in the lead and come back to each, so the tokens of every mention are known.

    entity      attention from the tokens of a fact's second mention to those of its first
    salience    attention from the summary's rows to the document's mentions of the five facts

Chance for the first is the same row's attention to the same place when another article's fact of the same kind, of as many tokens, stands there: a liking
for the lead, for names or for a distance is in both. Later mentions repeat words of the first (of a person the surname; the newsroom has no pronouns), so
heads that match equal tokens, or go on where a name was begun, follow entities too: compare with their duplicate-token and induction scores. Chance for the
second is the same row's attention to the document, spread evenly over it.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechscope.data.documents import Corpus, Document
from mechscope.data.newsroom import ROLES, Article, split_articles
from mechscope.data.newsroom import Role as Kind
from mechscope.data.pairs import PairBatch, Pairs, PromptPair, Span
from mechscope.data.prompt import Example, encode
from mechscope.data.scoring import check_fits
from mechscope.data.spans import locate
from mechscope.errors import DataError
from mechscope.heads.attention import mass_at, run_probes
from mechscope.heads.roles import Role, RoleScores
from mechscope.heads.segments import marked, masses, row_means, spread
from mechscope.heads.turned import TEXTS, Turns, mean_excess
from mechscope.instrument import AttentionCall
from mechscope.instrument.execution import Execution
from mechscope.subject import Subject

log = logging.getLogger(__name__)

_SOURCE = "mechscope: what arXiv 2505.17073 calls coreference and salience, measured on texts whose facts are known"

ENTITY = Role(
    name="entity",
    definition="Attention from the tokens of a fact's second mention to those of its first.",
    source=_SOURCE,
    null="The same rows' attention when another article's fact of the same kind stands at the first mention.",
    least=0.1,
)
SALIENCE = Role(
    name="salience",
    definition="Attention from the summary's rows to the tokens of the document that state its five facts.",
    source=_SOURCE,
    null="The same rows' attention to the document, spread evenly over its tokens.",
    least=None,
)


@torch.no_grad()
def entity_roles(subject: Subject, *, n: int = 50, execution: Execution = Execution()) -> tuple[RoleScores, ...]:
    """Score how every head follows the facts of newsroom articles.

    Args:
        subject: The model, with a tokenizer that gives offsets (a "fast" one).
        n: How many articles, of the newsroom's test split; those longer than the model reads are cut.
        execution: Tokens of a batch (4,096 by default), seed (of the articles, and of the facts that replace theirs), progress.

    Returns:
        The roles `entity` and `salience`. An article whose facts are all cut away, or have no substitute, scores NaN in the first.

    Raises:
        DataError: The model has no such tokenizer, or reads too few tokens for an article.
    """
    pairs = entity_pairs(subject.tokenizer, n, seed=execution.seed, max_tokens=subject.anatomy.max_positions)
    return roles_on(subject, pairs, execution=execution)


@torch.no_grad()
def roles_on(subject: Subject, pairs: Pairs, *, execution: Execution = Execution()) -> tuple[RoleScores, ...]:
    """Score the roles `entity` and `salience` on pairs made by `entity_pairs`; raises DataError where one does not fit the model."""
    check_fits(subject, pairs)
    clean = run_probes(subject, pairs, _facts, execution=execution)
    corrupt = run_probes(subject, pairs.swapped(), _followed, execution=execution)
    texts, layers = tuple(pair.id for pair in pairs), subject.anatomy.attending
    few, followed = pairs.first(TEXTS), Turns(subject, seed=execution.seed).each(_followed)
    turned = mean_excess(*(run_probes(subject, of, followed, execution=execution) for of in (few, few.swapped())))
    return (
        RoleScores(ENTITY, texts, clean[..., 0], corrupt, turned, layers=layers),
        RoleScores(SALIENCE, texts, clean[..., 1], clean[..., 2], layers=layers),
    )


def entity_pairs(tokenizer: PreTrainedTokenizerBase | None, n: int, *, seed: int = 0, max_tokens: int) -> Pairs:
    """Make newsroom articles with their summaries, and the same with other facts at the first mentions alone.

    Segments: "document", "summary", "salient" (all mentions in the document), and for each fact whose second mention was not cut away and that has a
    substitute, for example, "who first" and "who again".

    Args:
        tokenizer: It must give offsets.
        n: How many articles.
        seed: Of the articles, and of the facts that replace theirs.
        max_tokens: Most tokens of a text.

    Returns:
        The pairs; `problems` counts what `encode` cut or left out, and articles that are `unplaced`: the tokenizer's offsets do not fit them.

    Raises:
        DataError: No tokenizer, one without offsets, or no article fits.
    """
    if tokenizer is None or not tokenizer.is_fast:
        problem = "there is no tokenizer" if tokenizer is None else f"{type(tokenizer).__name__} gives no character offsets"
        raise DataError(f"facts cannot be found among tokens: {problem}: give the model a fast tokenizer")
    articles = split_articles("test", limit=n, seed=seed)
    corpus = Corpus(tuple(Document(article.id, article.document, article.summary) for article in articles), "newsroom", "test")
    encoded = encode(corpus, tokenizer, max_tokens=max_tokens)
    known, counts = {article.id: article for article in articles}, Counter(encoded.problems)
    stories = []
    for example in encoded.examples:
        try:
            stories.append(_Story.of(known[example.id], example, tokenizer))
        except DataError:  # offsets go astray behind characters that some tokenizers have no token for
            counts["unplaced"] += 1
    if not stories:
        raise DataError(f"{type(tokenizer).__name__} places the facts of none of {n:,} newsroom articles: its offsets do not fit them")
    if counts["unplaced"]:
        log.warning(
            "%s does not place the facts of %d of %d newsroom articles: they are left out",
            type(tokenizer).__name__,
            counts["unplaced"],
            n,
            extra={"weakens": "head_roles"},
        )
    return Pairs(tuple(_pair(story, stories, seed) for story in stories), f"newsroom facts, seed {seed}", dict(counts))


@dataclass(frozen=True)
class _Story:
    """An encoded article and the tokens of every mention of its facts, in order."""

    article: Article
    example: Example
    mentions: dict[Kind, tuple[Span, ...]]

    @classmethod
    def of(cls, article: Article, example: Example, tokenizer: PreTrainedTokenizerBase) -> _Story:
        document = Document(article.id, article.document, article.summary)
        mentions = {fact.role: locate(example, document, tokenizer, document_spans=sorted(fact.document_spans)) for fact in article.facts}
        return cls(article, example, mentions)

    def first(self, role: Kind) -> tuple[int, ...]:
        """Return the tokens of a fact's first mention."""
        return self.example.input_ids[slice(*self.mentions[role][0])] if self.mentions[role] else ()


def _pair(story: _Story, stories: Sequence[_Story], seed: int) -> PromptPair:
    example, corrupt = story.example, list(story.example.input_ids)
    salient = tuple(span for spans in story.mentions.values() for span in spans)
    segments = {"document": (example.document,), "summary": (example.summary,), "salient": salient}
    for role in ROLES:
        other = _substitute(story, stories, role, random.Random(f"{seed}/{example.id}/{role}"))
        if len(story.mentions[role]) > 1 and other:
            first, again = story.mentions[role][:2]
            corrupt[slice(*first)] = other
            segments |= {f"{role} first": (first,), f"{role} again": (again,)}
    return PromptPair(example.id, example.input_ids, tuple(corrupt), target=example.summary, segments=segments)


def _substitute(story: _Story, stories: Sequence[_Story], role: Kind, rng: random.Random) -> tuple[int, ...]:
    """Choose another article's fact of a kind, with as many tokens and no word that the story holds; nothing if there is none."""
    for other in rng.sample(stories, len(stories)):
        words = other.article.fact(role).text.split()
        if len(other.first(role)) == len(story.first(role)) and not any(word in story.article.document for word in words):
            return other.first(role)
    return ()


def _facts(call: AttentionCall, batch: PairBatch) -> Float[Tensor, "batch head 3"]:
    """Return each head's attention to first mentions and to salient tokens, and chance for the second."""
    salient = marked(batch, {pair.id: pair.segments["salient"] for pair in batch.pairs})
    document, summary = batch.positions("document"), batch.positions("summary")
    shares, chance = masses(call, batch, {"salient": salient, "document": document})
    evenly = spread(shares["document"], chance["salient"], chance["document"])
    return torch.stack([_followed(call, batch), row_means(shares["salient"], summary), row_means(evenly, summary)], -1)


def _followed(call: AttentionCall, batch: PairBatch) -> Float[Tensor, "batch head"]:
    keys, device = _first_mentions(batch), call.query.device
    return row_means(mass_at(call, keys.to(device), batch.real.to(device)), (keys >= 0).any(-1))


def _first_mentions(batch: PairBatch) -> Tensor:
    """Return, for the tokens of every second mention, the columns of the first mention's; −1 elsewhere, ``(batch, token, key)``."""
    links = [
        (row, batch.shift(row), pair.segments[f"{role} first"][0], pair.segments[f"{role} again"][0])
        for row, pair in enumerate(batch.pairs)
        for role in ROLES
        if f"{role} first" in pair.segments
    ]
    longest = max((end - begin for _, _, (begin, end), _ in links), default=1)
    keys = torch.full((*batch.real.shape, longest), -1)
    for row, shift, (begin, end), again in links:
        keys[row, shift + again[0] : shift + again[1], : end - begin] = torch.arange(shift + begin, shift + end)
    return keys
