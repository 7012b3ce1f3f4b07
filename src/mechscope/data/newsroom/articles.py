"""News articles whose facts are known.

An article reports one invented event. Its lead sentence states five typed facts (who, what, where, when, how many); the sentences after it come
back to each fact at least once, in any order, between sentences about other people, places, days and numbers. So a model that reads well
predicts a fact's second mention from its first (copying), and a summary (the five facts in one or two sentences) can be judged fact by
fact. Article `i` of a seed is the same however many are generated.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Literal

from mechscope.data.newsroom import sentences
from mechscope.data.newsroom.events import EVENTS, Event
from mechscope.data.newsroom.vocabulary import COUNTS, DATES, FIRST_NAMES, LAST_NAMES, PLACES, WEEKDAYS
from mechscope.errors import DataError

Role = Literal["who", "what", "where", "when", "count"]
Span = tuple[int, int]
ROLES: tuple[Role, ...] = ("who", "what", "where", "when", "count")

FEWEST_WORDS = 82  # with names of one or two tokens this keeps articles within 90 to 160 tokens
MOST_WORDS = 104
SPLITS = {"train": 2000, "validation": 200, "test": 200}  # articles where no limit is given


@dataclass(frozen=True)
class Fact:
    """One typed fact of an article.

    Attributes:
        role: who, what, where, when or count.
        text: its full form (a person's first and last name).
        document_spans: half-open character spans of every mention in the article; later mentions of a person are the surname alone.
        summary_spans: the same in the summary.
    """

    role: Role
    text: str
    document_spans: tuple[Span, ...]
    summary_spans: tuple[Span, ...]


@dataclass(frozen=True)
class Article:
    """A generated article, its reference summary, and the five facts both state."""

    id: str
    document: str
    summary: str
    facts: tuple[Fact, ...]
    kind: str

    def fact(self, role: Role) -> Fact:
        """Return the fact of a role."""
        for fact in self.facts:
            if fact.role == role:
                return fact
        raise DataError(f"newsroom articles have facts {', '.join(ROLES)}; {role!r} is none of them")


def generate(n: int, seed: int) -> tuple[Article, ...]:
    """Generate articles 0 to n − 1 of a seed.

    Raises:
        DataError: n is below one.
    """
    if n < 1:
        raise DataError(f"newsroom was asked for {n} articles: ask for at least 1")
    return tuple(_article(seed, index) for index in range(n))


def split_articles(split: str, *, limit: int | None = None, seed: int = 0) -> tuple[Article, ...]:
    """Generate the articles of a split; no two splits, and no two seeds, share a generator seed.

    Args:
        split: train, validation or test.
        limit: how many; without it 2,000 to train with and 200 each for the others.
        seed: at least 0 (the shipped model was pre-trained on negative seeds).

    Raises:
        DataError: another split, or a negative seed.
    """
    if split not in SPLITS:
        raise DataError(f"newsroom has splits {', '.join(SPLITS)}; {split!r} is none of them")
    if seed < 0:
        raise DataError(f"newsroom seed {seed}: seeds below 0 are those of the shipped model's training texts: choose 0 or more")
    return generate(limit or SPLITS[split], len(SPLITS) * seed + list(SPLITS).index(split))


def headlines(article_seed: int, index: int, count: int) -> str:
    """Write a plain list of headlines, one a line, each about another event."""
    rng = random.Random(f"headlines/{article_seed}/{index}")
    lines = []
    for _ in range(count):
        event = rng.choice(EVENTS)
        text = _Text(_values(rng, event))
        text.write(rng.choice(event.headlines))
        lines.append(text.text[0].upper() + text.text[1:])
    return "\n".join(lines)


class _Text:
    """Text that grows sentence by sentence and remembers where its facts stand."""

    def __init__(self, values: dict[str, str]) -> None:
        self.values = values
        self.text = ""
        self.spans: dict[str, list[Span]] = {role: [] for role in ROLES}

    def write(self, sentence: str) -> None:
        if self.text:
            self.text += " "
        for literal, name, _, _ in Formatter().parse(sentence):
            self.text += literal
            if name:
                begin = len(self.text)
                self.text += self.values[name]
                role = "who" if name == "last" else name
                if role in self.spans:
                    self.spans[role].append((begin, len(self.text)))


def _article(seed: int, index: int) -> Article:
    rng = random.Random(f"{seed}/{index}")
    event = rng.choice(EVENTS)
    values = _values(rng, event)
    document, summary = _Text(values), _Text(values)
    for sentence in _sentences(rng, event):
        # every distractor names somebody and somewhere else
        values |= _distractors(rng, values)
        document.write(sentence)
    summary.write(rng.choice(event.summaries))
    facts = tuple(Fact(role, values[role], tuple(document.spans[role]), tuple(summary.spans[role])) for role in ROLES)
    return Article(f"newsroom-{seed}-{index}", document.text, summary.text, facts, event.kind)


def _values(rng: random.Random, event: Event) -> dict[str, str]:
    last = rng.choice(LAST_NAMES)
    return {
        "who": f"{rng.choice(FIRST_NAMES)} {last}",
        "last": last,
        "what": rng.choice(event.whats),
        "where": rng.choice(PLACES),
        "when": rng.choice(rng.choice((WEEKDAYS, DATES))),
        "count": rng.choice(COUNTS),
        "unit": rng.choice(event.units),
        "noun": event.noun,
    }


def _distractors(rng: random.Random, values: dict[str, str]) -> dict[str, str]:
    first, last = values["who"].split()
    other = rng.choice([name for name in LAST_NAMES if name != last])
    return {
        "other": f"{rng.choice([name for name in FIRST_NAMES if name != first])} {other}",
        "elsewhere": rng.choice([place for place in PLACES if place != values["where"]]),
        "another_day": rng.choice([day for day in rng.choice((WEEKDAYS, DATES)) if day != values["when"]]),
        "number": rng.choice([count for count in COUNTS if count != values["count"]]),
    }


def _sentences(rng: random.Random, event: Event) -> list[str]:
    """Choose a lead, sentences that come back to every fact, and enough of the rest for the length wanted."""
    about = (sentences.ABOUT_WHO, sentences.ABOUT_WHAT, sentences.ABOUT_WHERE, sentences.ABOUT_WHEN, sentences.ABOUT_COUNT)
    lead = rng.choice(event.leads)
    body = [rng.choice(pool) for pool in about] + rng.sample(sentences.DISTRACTORS, 2)
    opening = rng.choice((*sentences.FILLERS, *sentences.DISTRACTORS)) if rng.random() < 0.25 else None
    words = _words([lead, *body, *([opening] if opening else [])])
    rest = [*event.details, *sentences.FILLERS, *sentences.DISTRACTORS, *(sentence for pool in about for sentence in pool)]
    rng.shuffle(rest)
    rest = [*rng.sample(event.details, 2), *rest]  # the event's own sentences first: they tie the story together
    wanted = rng.randint(FEWEST_WORDS, MOST_WORDS)
    for sentence in rest:
        if words >= wanted - 6:
            break
        if sentence not in body and sentence != opening and words + _words([sentence]) <= MOST_WORDS:
            body.append(sentence)
            words += _words([sentence])
    rng.shuffle(body)
    return [*([opening] if opening else []), lead, *body]


def _words(texts: Sequence[str]) -> int:
    return sum(len(text.split()) for text in texts)
