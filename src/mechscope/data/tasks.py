r"""Prompt pairs made by rule, for any tokenizer.

Four tasks whose circuits in GPT-2 are known: indirect objects (Wang et al. 2022), years (Hanna et al. 2023), docstrings (Heimersheim and Janiak
2023) and repeated random tokens (Olsson et al. 2022; `induction` asks for one next token, `repeated` scores the whole repetition). Texts are put
together from pieces: clean and corrupt line up by construction and every position has a known meaning. Words that a tokenizer cuts up are left out;
too few left is an error that names them. Pair `i` of a seed does not depend on how many are made.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

from transformers import PreTrainedTokenizerBase

from mechscope.data.pairs import Pairs, PromptPair, Span
from mechscope.data.pieces import Pieces
from mechscope.errors import DataError


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = _listed(
    "Mary John James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark Paul Steven Andrew George "
    "Kenneth Kevin Brian Edward Ronald Timothy Jason Jeffrey Ryan Jacob Gary Nicholas Eric Stephen Jonathan Larry Justin Scott Frank "
    "Brandon Samuel Gregory Alexander Patrick Jack Dennis Jerry Tyler Aaron Henry Douglas Adam Peter Nathan Walter Kyle Harold Carl "
    "Jeremy Roger Arthur Simon Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Margaret Sandra Ashley "
    "Emily Donna Michelle Carol Amanda Melissa Deborah Stephanie Rebecca Laura Sharon Cynthia Kathleen Amy Angela Anna Emma Nicole "
    "Helen Samantha Katherine Christine Rachel Carolyn Janet Maria Catherine Diane Julie Victoria Kelly Joan Martha Julia Rose Grace "
    "Jane Alice Ruth Lucy Lily Tom Tim Ben Max Sam Sue"
)
PLACES = _listed("store park school garden station house hospital office restaurant market museum library hotel beach farm kitchen zoo")
OBJECTS = _listed("book drink ring ball computer letter gift box key ticket flower basket phone toy bottle cake picture")
STORIES = (  # A and B are the two names in either order
    "Then, {A} and {B} went to the {place}. {S} gave a {object} to",
    "When {A} and {B} got a {object} at the {place}, {S} decided to give it to",
    "After {A} and {B} went to the {place}, {S} gave a {object} to",
    "Then, {A} and {B} had a lot of fun at the {place}. {S} gave a {object} to",
    "While {A} and {B} were working at the {place}, {S} gave a {object} to",
    "Then, {A} and {B} had a long argument, and afterwards {S} said to",
)
EVENTS = _listed(
    "war siege strike famine drought reign project voyage marriage trial exhibition campaign dispute plague journey alliance revolt "
    "truce negotiation occupation expedition friendship"
)
ARGUMENTS = _listed(
    "page names size files first read state code number order format field model key value name type data path list text user time date "
    "line index file table node group count result message image source target function project option label level mode start end width "
    "height port host query token event parent child root item project config context old new run test last next"
)
DESCRIPTIONS = (
    "the sector gap",
    "a message tree",
    "the fall theme",
    "an open range",
    "the currency used",
    "some detail about it",
    "the wanted share",
    "what it begins with",
    "the motion limit",
    "a plain channel",
    "the light there",
    "how far it goes",
)
CENTURIES = range(11, 18)  # as in the paper; years in common use (1900, 2000) are often single tokens
SHORTEST, LONGEST = 12, 24  # tokens that are repeated: long enough that chance is small, short enough for a model of 64 positions
FIRST_YEAR = 1  # the corrupt prompts begin in the year 01, after which nearly every year is possible


def ioi(tokenizer: PreTrainedTokenizerBase, n: int, *, seed: int = 0) -> Pairs:
    """Make indirect-object pairs: "Then, Jane and Tom went to the park. Jane gave a ring to", answered by " Tom", not by " Jane".

    The two orders of the names (ABBA and BABA) alternate. In the corrupt text each of the three names is another one. Segments "io", "s1" and "s2":
    the indirect object, the subject's first and second mention. Source: Wang et al. 2022, "Interpretability in the Wild".

    Args:
        tokenizer: any Hugging Face tokenizer.
        n: how many pairs.
        seed: of the random choices.

    Raises:
        DataError: too few names, places or objects are single tokens, or fewer than `n` pairs can be made.
    """
    words = _Words(tokenizer)
    names, places, objects = words.choose("names", NAMES, 5), words.choose("places", PLACES, 1), words.choose("objects", OBJECTS, 1)

    def make(rng: random.Random, number: int) -> PromptPair:
        io, subject, *others = rng.sample(names, 5)
        first, second = (io, subject) if number % 2 == 0 else (subject, io)
        other = dict(zip(("A", "B", "S"), others, strict=True))
        both = {"place": rng.choice(places), "object": rng.choice(objects)}
        line = words.line(rng.choice(STORIES), both | {"A": first, "B": second, "S": subject}, both | other)
        here, there = ("A", "B") if number % 2 == 0 else ("B", "A")
        segments = {"io": line.at(here), "s1": line.at(there), "s2": line.at("S")}
        return PromptPair(f"ioi-{seed}-{number}", line.clean, line.corrupt, (words.id(io),), (words.id(subject),), segments=segments)

    return _collect("ioi", make, n, seed)


def greater_than(tokenizer: PreTrainedTokenizerBase, n: int, *, seed: int = 0) -> Pairs:
    """Make year pairs: "The war lasted from the year 1363 to the year 13", answered by every two digits above 63, not by the others.

    The corrupt text starts in the year 01. Segment "year": the two digits. Source: Hanna et al. 2023, "How does GPT-2 compute greater-than?".

    Args:
        tokenizer: a tokenizer that cuts years in two and two digits, as GPT-2's does.
        n: how many pairs.
        seed: of the random choices.

    Raises:
        DataError: the tokenizer cuts years in another way, or fewer than `n` pairs can be made.
    """
    words = _Words(tokenizer)
    digits = [f"{year:02d}" for year in range(100)]
    ids = words.pieces.ids(digits)
    years = {digit: one[0] for digit, one in zip(digits, ids, strict=True) if len(one) == 1 and one[0] != tokenizer.unk_token_id}
    starts: dict[str, list[str]] = {}
    for century in CENTURIES:
        head = words.pieces.ids([f" {century}"])[0]
        whole = words.pieces.ids([f" {century}{digit}" for digit in digits])
        # a year that is one token (GPT-2 has a few) would not be read as its digits
        good = [digit for digit, one in zip(digits, whole, strict=True) if len(head) == 1 and one == [*head, years.get(digit)]]
        if f"{FIRST_YEAR:02d}" in good:
            starts[str(century)] = [digit for digit in good if FIRST_YEAR < int(digit) < 99]
    if len(set(years.values())) < 100 or not any(starts.values()):
        cut = ", ".join(repr(tokenizer.decode([one])) for one in words.pieces.ids([" 1363"])[0])
        raise DataError(
            f"greater_than: {type(tokenizer).__name__} does not make two-digit tokens: ' 1363' becomes {cut}, not ' 13', '63': "
            "choose another task for this model"
        )
    words.known |= years

    def make(rng: random.Random, number: int) -> PromptPair:
        century = rng.choice([century for century, good in starts.items() if good])
        year = rng.choice(starts[century])
        text = f"The {rng.choice(EVENTS)} lasted from the year {century}{{year}} to the year {century}"
        line = words.line(text, {"year": year}, {"year": f"{FIRST_YEAR:02d}"})
        right = tuple(years[digit] for digit in digits if digit > year)
        wrong = tuple(years[digit] for digit in digits if digit <= year)
        return PromptPair(f"greater_than-{seed}-{number}", line.clean, line.corrupt, right, wrong, segments={"year": line.at("year")})

    return _collect("greater_than", make, n, seed)


def docstring(tokenizer: PreTrainedTokenizerBase, n: int, *, seed: int = 0) -> Pairs:
    """Make docstring pairs: a Python function with six arguments, two of them described, answered by the next argument.

    In the corrupt text the three arguments in question have other names in the signature and, so that nothing matches, others again in the
    description. Wrong answers are all other names of both texts. Segments "signature" (the three arguments), "described" (the two in the description)
    and "answer" (the third in the signature). Source: Heimersheim and Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only
    transformer".

    Args:
        tokenizer: any Hugging Face tokenizer.
        n: how many pairs.
        seed: of the random choices.

    Raises:
        DataError: too few argument names are single tokens, or fewer than `n` pairs can be made.
    """
    words = _Words(tokenizer)
    names = words.choose("argument names", ARGUMENTS, 12)

    def make(rng: random.Random, number: int) -> PromptPair:
        name, before1, before2, one, two, three, after, *others = rng.sample(names, 12)
        summary, about1, about2 = rng.sample(DESCRIPTIONS, 3)
        text = (
            "def {name}(self, {before1}, {before2}, {one}, {two}, {three}, {after}):\n"
            f'    """{summary}\n\n    :param {{doc1}}: {about1}\n    :param {{doc2}}: {about2}\n    :param'
        )
        both = {"name": name, "before1": before1, "before2": before2, "after": after}
        clean = both | {"one": one, "two": two, "three": three, "doc1": one, "doc2": two}
        corrupt = both | dict(zip(("one", "two", "three", "doc1", "doc2"), others, strict=True))
        line = words.line(text, clean, corrupt)
        segments = {"signature": line.at("one", "two", "three"), "described": line.at("doc1", "doc2"), "answer": line.at("three")}
        wrong = tuple(words.id(word) for word in (one, two, before1, before2, after, *others))
        return PromptPair(f"docstring-{seed}-{number}", line.clean, line.corrupt, (words.id(three),), wrong, segments=segments)

    return _collect("docstring", make, n, seed)


def induction(vocab: PreTrainedTokenizerBase | int, n: int, *, seed: int = 0, length: int = 16) -> Pairs:
    """Make repeated random tokens: r_1 … r_L r_1 … r_k, answered by r_{k+1}.

    All r are different, so the answer is known. In the corrupt text the earlier r_{k+1} is another token, which is the wrong answer. k is at least half
    of L: by then the repetition is plain. Segments "first" and "next": the earlier r_k and r_{k+1}. Source: Olsson et al. 2022, "In-context Learning
    and Induction Heads".

    Args:
        vocab: a tokenizer, whose special tokens are left out and whose start token is set; or the size of a vocabulary, all of which is used.
        n: how many pairs.
        seed: of the random choices.
        length: L, in tokens.

    Raises:
        DataError: the length is below 2, the vocabulary has too few tokens, or fewer than `n` pairs can be made.
    """
    if length < 2:
        raise DataError(f"induction: length is {length}: at least 2 tokens are needed for one to follow another")
    tokens, start = _ordinary(vocab)
    if len(tokens) <= length:
        raise DataError(f"induction: {len(tokens)} tokens to draw from, {length + 1} are needed: choose a length below {len(tokens)}")

    def make(rng: random.Random, number: int) -> PromptPair:
        *text, other = rng.sample(tokens, length + 1)
        k = rng.randint(max(1, length // 2), length - 1)
        swapped = [*text[:k], other, *text[k + 1 :]]
        first = len(start) + k - 1
        segments: dict[str, tuple[Span, ...]] = {"first": ((first, first + 1),), "next": ((first + 1, first + 2),)}
        clean, corrupt = (*start, *text, *text[:k]), (*start, *swapped, *text[:k])
        return PromptPair(f"induction-{seed}-{number}", clean, corrupt, (text[k],), (other,), segments=segments)

    return _collect("induction", make, n, seed)


def repeated(vocab: PreTrainedTokenizerBase | int, n: int, *, seed: int = 0, longest: int = LONGEST, below: int | None = None) -> Pairs:
    """Make random texts A A (clean) with their controls A B (corrupt), all tokens of A and B different.

    Segment "second" is the second half. The target is the second half but for its first token, which nothing foretells: the loss there is low for a model
    that copies from the first half, and near that of random tokens in the control. Lengths of A differ, 12 tokens or more where there is room, so that no
    distance is all texts'. Source: Olsson et al. 2022, "In-context Learning and Induction Heads".

    Args:
        vocab: a tokenizer, whose special tokens are left out and whose start token is set; or the size of a vocabulary, all of which is used.
        n: how many pairs.
        seed: of the random choices.
        longest: most tokens of A.
        below: only token ids below this are drawn: a tokenizer may know words that the model has no row for.

    Raises:
        DataError: fewer than 2 tokens of A are possible, or fewer than `n` different pairs can be made.
    """
    tokens, start = _ordinary(vocab, below)
    longest = min(longest, len(tokens) // 2)
    if longest < 2:
        raise DataError(
            f"repeated: A has {longest} of {len(tokens)} ordinary tokens: at least 2 are needed, and as many others for the control"
        )

    def make(rng: random.Random, number: int) -> PromptPair:
        length = rng.randint(min(SHORTEST, longest), longest)
        drawn = rng.sample(tokens, 2 * length)
        first, other, begin = drawn[:length], drawn[length:], len(start) + length
        span = (begin, begin + length)
        clean, corrupt = (*start, *first, *first), (*start, *first, *other)
        return PromptPair(f"repeated-{seed}-{number}", clean, corrupt, target=(begin + 1, begin + length), segments={"second": (span,)})

    return _collect("repeated", make, n, seed)


def _ordinary(vocab: PreTrainedTokenizerBase | int, below: int | None = None) -> tuple[Sequence[int], tuple[int, ...]]:
    """Return the tokens to draw from, and what a text begins with."""
    if isinstance(vocab, int):
        return range(vocab if below is None else min(vocab, below)), ()
    special = {*vocab.all_special_ids, *(at for at, token in vocab.added_tokens_decoder.items() if token.special)}
    ids = (at for at in sorted(vocab.get_vocab().values()) if at not in special)
    return [at for at in ids if below is None or at < below], Pieces(vocab).start_ids


TASKS: dict[str, Callable[..., Pairs]] = {task.__name__: task for task in (ioi, greater_than, docstring, induction, repeated)}


def generate_pairs(task: str, tokenizer: PreTrainedTokenizerBase, n: int, *, seed: int = 0) -> Pairs:
    """Make pairs of a task by its name in `TASKS`.

    Raises:
        DataError: no such task, or the tokenizer does not fit it.
    """
    if task not in TASKS:
        raise DataError(f"task {task!r} is not known: choose {', '.join(TASKS)}")
    return TASKS[task](tokenizer, n, seed=seed)


def _collect(task: str, make: Callable[[random.Random, int], PromptPair], n: int, seed: int) -> Pairs:
    """Make pairs until there are n different ones."""
    if n < 1:
        raise DataError(f"{task} was asked for {n} pairs: ask for at least 1")
    pairs: dict[tuple[int, ...], PromptPair] = {}
    for number in range(20 * n + 100):  # beyond that, hardly any new ones turn up
        pair = make(random.Random(f"{task}/{seed}/{number}"), number)
        pairs.setdefault(pair.clean, pair)
        if len(pairs) == n:
            return Pairs(tuple(pairs.values()), f"task {task}, seed {seed}")
    raise DataError(f"{task}: only {len(pairs):,} different pairs turned up, {n:,} were asked for: ask for fewer")


@dataclass(frozen=True)
class _Line:
    """A clean and a corrupt text, and where their slots are."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    slots: dict[str, int]

    def at(self, *slots: str) -> tuple[Span, ...]:
        return tuple((self.slots[slot], self.slots[slot] + 1) for slot in slots)


# words that a message names
_NAMED = 8


class _Words:
    """A tokenizer's single-token words, and texts with slots for them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pieces = Pieces(tokenizer)
        self.known: dict[str, int] = {}

    def choose(self, what: str, words: Sequence[str], least: int) -> list[str]:
        """Return the words that are one token of their own behind a space; `DataError` where they are fewer than needed."""
        single: dict[int, str] = {}
        for word, token in zip(words, self.pieces.single(words), strict=True):
            if token is not None:
                single.setdefault(token, word)
        if len(single) < least:
            lacking = [word for word in words if word not in single.values()]
            cut = ", ".join(lacking[:_NAMED]) + (f", … {len(lacking)} in all" if len(lacking) > _NAMED else "")
            raise DataError(
                f"{type(self.pieces.tokenizer).__name__} has {len(single)} of {len(words)} {what} as single tokens, at least {least} are needed "
                f"(not single: {cut}): choose another task for this model"
            )
        self.known |= {word: at for at, word in single.items()}
        return list(single.values())

    def id(self, word: str) -> int:
        return self.known[word]

    def line(self, text: str, clean: Mapping[str, str], corrupt: Mapping[str, str]) -> _Line:
        """Fill the slots of a text, token by token; a space before a slot goes with its word."""
        parts = list(Formatter().parse(text))
        fixed = [part.rstrip(" ") if slot else part for part, slot, _, _ in parts]
        ids = [self.pieces.ids([part], first=at == 0)[0] if part else [] for at, part in enumerate(fixed)]
        lines: tuple[list[int], list[int]] = ([*self.pieces.start_ids], [*self.pieces.start_ids])
        slots = {}
        for (_, slot, _, _), piece in zip(parts, ids, strict=True):
            for line, words in zip(lines, (clean, corrupt), strict=True):
                line.extend(piece)
                if slot:
                    slots[slot] = len(line)
                    line.append(self.known[words[slot]])
        return _Line(tuple(lines[0]), tuple(lines[1]), slots)
