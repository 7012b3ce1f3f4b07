"""The programs that are shipped, each with its texts and what it answers.

induction   after … A B … A, B: a previous-token head, then a head that matches what stood before (Olsson et al. 2022)
names       A and B went, A gave to: B. Duplicate tokens, inhibition of the subject, a mover of names, as in GPT-2 (Wang et al. 2022)
brackets    whether brackets are balanced: depth by a head that counts, two thresholds by an MLP, whether any was crossed by a head, both by an MLP
counting    how often a letter occurs, modulo three: a head that counts, and an MLP that looks the remainder up

`answers` says in plain Python what the program predicts at every position: the oracle of the weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.errors import DataError, SettingsError
from mechscope.groundtruth.program import ONE, POSITION, TOKEN, Head, Mlp, Program, Reads

SHARPNESS = 60.0
"""Attention score of what a head looks for, where everything else has none: softmax gives it all but e^−30."""
# logit of what is predicted
_LOUD = 10.0
_START = "<s>"
_LETTERS = tuple("abcdefghij")
_NAMES = ("Mary", "John", "Anna", "Tom", "Lucy", "Ben")
_MODULUS = 3


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """A program, with texts for it.

    Attributes:
        name: What it is called.
        what: A sentence on what it computes.
        program: What is written into the weights.
        draw: A random text of so many tokens at most, start token included, as words; and the word that it is answered by.
        answers: By a text's words the logits of every position, in plain Python.
    """

    name: str
    what: str
    program: Program
    draw: Callable[[random.Random], tuple[list[str], str]]
    answers: Callable[[Sequence[str]], Float[np.ndarray, "token vocab"]]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer of its words, which sets the start token."""
        inner = Tokenizer(WordLevel({word: at for at, word in enumerate(self.program.words)}, unk_token=_START))
        inner.pre_tokenizer = WhitespaceSplit()
        inner.post_processor = TemplateProcessing(single=f"{_START} $A", special_tokens=[(_START, 0)])
        return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=_START, eos_token=_START, pad_token=_START)

    def ids(self, words: Sequence[str]) -> tuple[int, ...]:
        """Return the token ids of a text's words."""
        return tuple(self.program.words.index(word) for word in words)

    def pairs(self, n: int, *, seed: int = 0) -> Pairs:
        """Draw pairs of texts of equal length and different answers; nothing else ties clean and corrupt, so all that the program reads differs.

        Raises:
            DataError: Fewer than one was asked for, or as many different ones do not turn up.
        """
        if n < 1:
            raise DataError(f"{self.name} was asked for {n} pairs: ask for at least 1")
        pairs: dict[tuple[tuple[int, ...], tuple[int, ...]], PromptPair] = {}
        for number in range(200 * n + 1000):
            rng = random.Random(f"{self.name}/{seed}/{number}")
            (clean, answer), (corrupt, wrong) = self.draw(rng), self.draw(rng)
            if len(clean) != len(corrupt) or answer == wrong:
                continue
            texts, ids = (self.ids(clean), self.ids(corrupt)), self.ids((answer, wrong))
            pairs.setdefault(texts, PromptPair(f"{self.name}-{seed}-{len(pairs)}", *texts, answers=ids[:1], wrong_answers=ids[1:]))
            if len(pairs) == n:
                return Pairs(tuple(pairs.values()), f"ground truth {self.name}, seed {seed}")
        raise DataError(f"{self.name}: only {len(pairs):,} different pairs turned up, {n:,} were asked for: ask for fewer")


def induction(sharpness: float = SHARPNESS, positions: int = 16) -> GroundTruth:
    """Write the induction program."""
    words = (_START, *_LETTERS)
    size, copy = len(words), np.eye(len(words))
    heads = (
        Head(0, {TOKEN: copy}, "before", {POSITION: sharpness * np.eye(positions, k=-1)}, {POSITION: np.eye(positions)}),
        Head(1, {TOKEN: copy}, "next", *_matching({TOKEN: copy}, {"before": copy}, sharpness, positions)),
    )
    program = Program(words, positions, {"before": size, "next": size}, heads, (), {"next": _LOUD * copy})

    def draw(rng: random.Random) -> tuple[list[str], str]:
        letters = rng.sample(_LETTERS, rng.choice((4, 6, 8)))
        at = rng.randrange(len(letters) - 1)
        return [_START, *letters, letters[at]], letters[at + 1]

    def answers(text: Sequence[str]) -> np.ndarray:
        logits = np.zeros((len(text), size))
        for at, word in enumerate(text):
            behind = [text[key] for key in range(1, at + 1) if text[key - 1] == word]
            # with nothing to match, a head looks at the start token
            for one in behind or [_START]:
                logits[at, words.index(one)] += _LOUD / max(1, len(behind))
        return logits

    return GroundTruth("induction", "After … A B … A it predicts B.", program, draw, answers)


def names(sharpness: float = SHARPNESS, positions: int = 12) -> GroundTruth:
    """Write the program of indirect objects."""
    words = (_START, "then", *_NAMES, "and", "went", "gave", "to")
    size = len(words)
    copy = np.diag([float(word in _NAMES) for word in words])
    apart = {POSITION: -np.eye(positions)}
    query, key = _matching({TOKEN: copy}, {TOKEN: copy}, sharpness, positions)
    # a token is no duplicate of itself: its own position counts against it
    heads = (
        Head(0, {TOKEN: copy}, "seen", _beside(query, {POSITION: sharpness * np.eye(positions)}), _beside(key, apart)),
        Head(1, {"seen": copy}, "subject", *_matching({ONE: np.ones((1, 1))}, {"seen": np.ones((size, 1))}, sharpness, positions)),
        Head(
            2,
            {TOKEN: copy},
            "object",
            *_matching(
                {ONE: np.eye(1, 1 + size), "subject": np.hstack([np.zeros((size, 1)), -2 * np.eye(size)])},
                {TOKEN: np.hstack([copy.sum(1, keepdims=True), copy])},
                sharpness,
                positions,
            ),
        ),
    )
    program = Program(words, positions, dict.fromkeys(("seen", "subject", "object"), size), heads, (), {"object": _LOUD * copy})

    def draw(rng: random.Random) -> tuple[list[str], str]:
        one, two = rng.sample(_NAMES, 2)
        subject, answer = rng.choice(((one, two), (two, one)))
        # fillers stand in other places, so that it also differs where the subject is said again
        text, fillers = [_START, one, "and", two, "went", subject, "gave", "to"], rng.sample((1, 2, 3, 4, 5, 6), 2)
        for at in sorted(fillers, reverse=True):
            text.insert(at, "then")
        return text, answer

    def answers(text: Sequence[str]) -> np.ndarray:
        logits = np.zeros((len(text), size))
        said: list[str] = []
        doubled: list[str] = []
        for at, word in enumerate(text):
            doubled += [word] if word in said else []
            said += [word] if word in _NAMES else []
            weights = {name: sum(name == one for one in said) for name in _NAMES}
            share = {name: doubled.count(name) / max(1, len(doubled)) for name in _NAMES}
            # a name that is said twice is inhibited; of the others all mentions count
            free = {name: count for name, count in weights.items() if count and not share[name]}
            for name, count in free.items():
                logits[at, words.index(name)] = _LOUD * count / sum(free.values())
        return logits

    return GroundTruth("names", "Of two names it predicts the one that is not said again.", program, draw, answers)


def brackets(sharpness: float = SHARPNESS, positions: int = 14) -> GroundTruth:
    """Write the program of balanced brackets."""
    words = (_START, "(", ")", ".", "yes", "no")
    signs = np.array([[float(word == "(") - float(word == ")")] for word in words])
    # depths are means over what was read so far, so one bracket too many is 1/positions at least
    steps = positions * np.array([[-1.0, -1.0, 1.0, 1.0]])
    once = np.array([0.0, -1.0, 0.0, -1.0])
    rise, flag = np.array([[1.0], [-1.0]]), np.ones((1, 1))
    heads = (
        Head(0, {TOKEN: signs}, "depth"),
        Head(1, {"below": flag}, "crossed", *_matching({ONE: flag}, {"below": flag}, sharpness, positions)),
    )
    mlps = (
        Mlp(0, {"depth": steps}, once, {"below": np.vstack([rise, 0 * rise]), "above": np.vstack([0 * rise, rise])}),
        Mlp(1, {"crossed": np.ones((1, 2)), "above": np.ones((1, 2))}, np.array([0.0, -1.0]), {"unbalanced": rise}),
    )
    verdict = np.array([[_LOUD * (float(word == "no") - float(word == "yes")) for word in words]])
    program = Program(
        words,
        positions,
        dict.fromkeys(("depth", "below", "above", "crossed", "unbalanced"), 1),
        heads,
        mlps,
        {"unbalanced": verdict, ONE: np.array([[_LOUD * float(word == "yes") for word in words]])},
    )

    def balanced(text: Sequence[str]) -> bool:
        depths = np.cumsum([(word == "(") - (word == ")") for word in text])
        return bool(depths.min() >= 0 and depths[-1] == 0)

    def draw(rng: random.Random) -> tuple[list[str], str]:
        pairs = rng.choice((2, 3, 4, 5))
        text: list[str] = []
        for left in range(2 * pairs, 0, -1):
            depth = text.count("(") - text.count(")")
            text.append("(" if depth == 0 or (depth < left and rng.random() < 0.5) else ")")
        if rng.random() < 0.5:
            flipped = rng.randrange(len(text))
            text[flipped] = ")" if text[flipped] == "(" else "("
        elif rng.random() < 0.3:
            rng.shuffle(text)
        return [_START, *text, "."], "yes" if balanced(text) else "no"

    def answers(text: Sequence[str]) -> np.ndarray:
        logits = np.zeros((len(text), len(words)))
        for at in range(len(text)):
            logits[at, words.index("yes" if balanced(text[: at + 1]) else "no")] = _LOUD
        return logits

    return GroundTruth("brackets", "It tells whether the brackets before the full stop are balanced.", program, draw, answers)


def counting(sharpness: float = SHARPNESS, positions: int = 12) -> GroundTruth:
    """Write the program that counts modulo three; no head of it looks for something, so nothing hangs on the sharpness."""
    words = (_START, "a", "b", ".", *map(str, range(_MODULUS)))
    size = len(words)
    reads, gates, bias, writes = [np.zeros(1)], [np.zeros(positions)], [1.0], [_remainder(0)]
    for at in range(positions):
        for count in range(1, at + 1):
            # of count − 1 and fewer nothing, of count and more one: the difference of two ReLUs, at this position alone
            for late, sign in ((0.0, 1.0), (1.0, -1.0)):
                gate = np.zeros(positions)
                gate[at] = closed = 2.0 * (positions + 1)
                reads.append(np.array([2.0 * (at + 1)]))
                gates.append(gate)
                bias.append(1.5 - 2.0 * count - late - closed)
                writes.append(sign * (_remainder(count) - _remainder(count - 1)))
    mlp = Mlp(0, {"share": np.array(reads).T, POSITION: np.array(gates).T}, np.array(bias), {"remainder": np.array(writes)})
    told = np.array([[_LOUD * float(word == str(rest)) for word in words] for rest in range(_MODULUS)])
    heads = (Head(0, {TOKEN: np.array([[float(word == "a")] for word in words])}, "share"),)
    program = Program(words, positions, {"share": 1, "remainder": _MODULUS}, heads, (mlp,), {"remainder": told})

    def draw(rng: random.Random) -> tuple[list[str], str]:
        text = [rng.choice("ab") for _ in range(rng.choice((5, 7, 9)))]
        return [_START, *text, "."], str(text.count("a") % _MODULUS)

    def answers(text: Sequence[str]) -> np.ndarray:
        logits = np.zeros((len(text), size))
        for at in range(len(text)):
            logits[at, words.index(str(list(text[: at + 1]).count("a") % _MODULUS))] = _LOUD
        return logits

    return GroundTruth("counting", "It counts a letter, modulo three.", program, draw, answers)


def _remainder(count: int) -> np.ndarray:
    return np.eye(_MODULUS)[count % _MODULUS]


def _matching(query: Reads, key: Reads, sharpness: float, positions: int) -> tuple[Reads, Reads]:
    """Return queries and keys whose match scores `sharpness`, beside the start token, which scores half of it: what is looked at where nothing matches."""
    first = np.zeros((positions, 1))
    first[0] = 0.5
    queries = {name: sharpness * matrix for name, matrix in query.items()}
    return _beside(queries, {ONE: np.full((1, 1), sharpness)}), _beside(key, {POSITION: first})


def _beside(reads: Reads, more: Reads) -> Reads:
    """Put reads beside others: their columns follow."""
    widths = [max(matrix.shape[1] for matrix in each.values()) for each in (reads, more)]
    laid: dict[str, np.ndarray] = {}
    for each, (before, behind) in ((reads, (0, widths[1])), (more, (widths[0], 0))):
        for name, matrix in each.items():
            laid[name] = laid.get(name, 0.0) + np.pad(matrix, ((0, 0), (before, behind)))
    return laid


PROGRAMS: dict[str, Callable[..., GroundTruth]] = {make.__name__: make for make in (induction, names, brackets, counting)}
"""Programs by name."""


def ground_truth(name: str, *, sharpness: float = SHARPNESS, heads: int = 4, seed: int = 0) -> GroundTruth:
    """Return a program among distractors.

    Args:
        name: Of `PROGRAMS`.
        sharpness: Attention score of what a head looks for. Gradients through softmax vanish as it grows: at the default, where the model is exact, methods
            that read gradients at the clean run alone see nothing of queries and keys.
        heads: Heads of each layer; those that the program does not use are distractors.
        seed: Of what distractors read.

    Raises:
        SettingsError: The program is not known, needs more heads, or the sharpness is not above zero.
    """
    if name not in PROGRAMS:
        raise SettingsError(f"ground truth {name!r} is not known: choose {', '.join(PROGRAMS)}")
    if not sharpness > 0:
        raise SettingsError(f"sharpness is {sharpness:g}: it must be above 0")
    made = PROGRAMS[name](sharpness)
    return replace(made, program=made.program.distracted(heads, seed=seed))
