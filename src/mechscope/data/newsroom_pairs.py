"""Prompt pairs from newsroom articles: the same article with one fact changed, up to where the fact is mentioned again.

What comes next is known in both texts, and only the earlier mentions determine it: a model that gives the right answer has copied it.
"""

from __future__ import annotations

from collections import Counter

from transformers import PreTrainedTokenizerBase

from mechscope.data.newsroom.articles import Article, Role, split_articles
from mechscope.data.newsroom.counterfactual import counterfactual
from mechscope.data.newsroom.shipped import newsroom_tokenizer
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.data.pieces import Pieces
from mechscope.errors import DataError

MOST_ARTICLES = 8  # per pair wanted, before a tokenizer is taken not to fit


def newsroom_pairs(n: int, *, seed: int = 0, role: Role = "where", tokenizer: PreTrainedTokenizerBase | None = None) -> Pairs:
    """Make pairs of test articles that end right before the last mention of a fact.

    The corrupt text is the counterfactual: the fact is another one at every mention. The answer is the first token of the fact as it would go on (of a
    person the surname), the wrong answer that of the counterfactual. Segments: "first", the first mention, and "fact", all of them.
    A first mention that opens the article has no space before it, and so may be other tokens than the answer.

    Args:
        n: how many pairs.
        seed: of the articles and of the choice of other facts; at least 0.
        role: which fact: who, what, where, when or count.
        tokenizer: must give offsets; the shipped model's where none is given.

    Returns:
        The pairs; `problems` counts the articles passed over: `no_counterfactual` lines up under this tokenizer, or both facts begin with the
        `same_first_token`.

    Raises:
        DataError: fewer than `n` pairs can be made with this tokenizer, it gives no offsets, `n` is below one, or the role is none.
    """
    if n < 1:
        raise DataError(f"newsroom was asked for {n} pairs: ask for at least 1")
    pieces = Pieces(tokenizer or newsroom_tokenizer())
    if not pieces.tokenizer.is_fast:
        raise DataError(f"{type(pieces.tokenizer).__name__} gives no character offsets: use the fast version of this tokenizer")
    counts: Counter[str] = Counter()
    pairs: list[PromptPair] = []
    done = 0
    while len(pairs) < n and done < MOST_ARTICLES * n:
        # article i is the same however many are generated, so asking for more goes on where the last ones ended
        for article in split_articles("test", limit=max(n, 2 * done), seed=seed)[done:]:
            done += 1
            pair = _pair(article, role, seed, pieces)
            if isinstance(pair, str):
                counts[pair] += 1
            else:
                pairs.append(pair)
            if len(pairs) == n:
                break
    if len(pairs) < n:
        what = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items())
        raise DataError(
            f"newsroom: {len(pairs):,} of {n:,} pairs from {done:,} articles for {role!r} under {type(pieces.tokenizer).__name__} ({what}): "
            "choose another role, or ask for fewer"
        )
    return Pairs(tuple(pairs), f"newsroom, {role} changed, seed {seed}", dict(counts))


def _pair(article: Article, role: Role, seed: int, pieces: Pieces) -> PromptPair | str:
    """Return an article's pair, or the reason why it has none."""
    article.fact(role)  # an unknown role is an error, not a reason to pass over the article
    try:
        other = counterfactual(article, role, seed, pieces.tokenizer)
    except DataError:
        return "no_counterfactual"
    clean, spans = _tokens(article, role, pieces)
    corrupt, _ = _tokens(other, role, pieces)  # its spans are the same: it lines up
    *earlier, (cut, _) = spans
    if clean[cut] == corrupt[cut]:
        return "same_first_token"
    segments = {"first": (earlier[0],), "fact": tuple(earlier)}
    return PromptPair(article.id, clean[:cut], corrupt[:cut], (clean[cut],), (corrupt[cut],), segments=segments)


def _tokens(article: Article, role: Role, pieces: Pieces) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Return an article's tokens, start token included, and the spans of a fact's mentions in order."""
    start = pieces.start_ids
    ids = pieces.ids([article.document], first=True)[0]
    spans = pieces.token_spans(article.document, sorted(article.fact(role).document_spans), first=True)
    return (*start, *ids), [(len(start) + begin, len(start) + end) for begin, end in spans]
