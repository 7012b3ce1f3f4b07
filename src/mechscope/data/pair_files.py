"""Prompt pairs from a user's files.

A row is a pair written out: `clean` and `corrupt` texts, `answers` and `wrong_answers`. What patching needs is checked here, where the row can
still be named: both texts have as many tokens, and an answer is one token in the place where it stands, behind the text (so it is written
with its own leading space). Facts (`prompt`, `subject`, `answer`) have no corrupt version: their subject is blurred with noise instead, as in
Meng et al. 2022, "Locating and Editing Factual Associations in GPT".
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mechscope.data.documents import OnProblem, describe_problems
from mechscope.data.pairs import Pairs, PromptPair, Span
from mechscope.data.pieces import Pieces
from mechscope.data.sources import Row, file_rows
from mechscope.errors import DataError

log = logging.getLogger(__name__)

RESERVED = ("all", "last", "changed", "target")  # what PairBatch.positions means by these is not up to a file


def read_pairs(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    on_problem: OnProblem = "error",
    corrupt: bool = True,
) -> Pairs:
    """Read pairs of texts that line up under a tokenizer.

    Args:
        source: a JSONL file (or another that `load_documents` reads). A row has `clean`, `corrupt`, and `answers` and `wrong_answers` (a text or a
            list of texts; wrong answers may be an empty list). It may have an `id`; a `subject`, a text standing in `clean`, which becomes the
            segment "subject"; and `segments`, such texts by name. A text that stands there several times is marked at each place, as a whole word
            where it is one.
        tokenizer: any Hugging Face tokenizer; with offsets (a "fast" one) where rows name segments.
        limit: read so many usable pairs, from the start.
        on_problem: `"error"` raises at the first row that cannot be used; `"skip"` counts such rows by reason in `Pairs.problems`.
        corrupt: whether a corrupt text is needed. Without, only the clean side of a row is read and stands for both; answers may then be left out,
            and every token but the first of a text without any is a target.

    Returns:
        The pairs; ids are the rows' own or `<file>-<row>`.

    Raises:
        DataError: the file is absent, empty or not JSON; no row is usable; with `on_problem="error"` any row is not: a key is missing or of another
            type, the texts have different lengths or are the same, an answer is not one known token, is both right and wrong, or there is none.
    """
    texts = _Texts(tokenizer)
    make = _pair if corrupt else _clean
    return _read(source, lambda values, name: make(values, name, texts), limit, on_problem)


def read_facts(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None, on_problem: OnProblem = "error"
) -> Pairs:
    """Read facts: a prompt, the subject it is about, and what follows.

    The corrupt text is the clean one; the segment "subject" is where noise goes; the one answer is the first token of `answer`.

    Args:
        source: a JSONL file with `prompt`, `subject` and `answer` (with its leading space), and `id` if wanted.
        tokenizer: a Hugging Face tokenizer with offsets.
        limit: read so many usable facts, from the start.
        on_problem: `"error"` raises at the first row that cannot be used; `"skip"` counts such rows by reason in `Pairs.problems`.

    Raises:
        DataError: the file is absent, empty or not JSON; no row is usable; with `on_problem="error"` any row is not: a key is missing or of another
            type, the subject does not stand in the prompt, or the answer begins with an unknown token.
    """
    texts = _Texts(tokenizer)
    return _read(source, lambda values, name: _fact(values, name, texts), limit, on_problem)


class _Unusable(Exception):
    """A row that cannot be used: the reason it counts under, the fault, and what to do about it."""

    def __init__(self, reason: str, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.reason, self.fault, self.remedy = reason, fault, remedy


def _read(source: str | Path, make: Callable[[Mapping[str, Any], str], PromptPair], limit: int | None, on_problem: OnProblem) -> Pairs:
    if limit is not None and limit < 1:
        raise DataError(f"{source}: limit is {limit}: ask for at least 1 pair, or leave the limit out")
    if on_problem not in ("error", "skip"):
        raise DataError(f'on_problem {on_problem!r}: choose "error" or "skip"')
    path = Path(source).expanduser()
    counts: Counter[str] = Counter()
    pairs: dict[str, PromptPair] = {}
    for number, row in enumerate(file_rows(path), start=1):
        if len(pairs) == limit:
            break
        try:
            pair = make(_values(row), f"{path.stem}-{number}")
            if pair.id in pairs:
                raise _Unusable("duplicate", f"the same id {pair.id!r} as an earlier row", "give each row its own id, or none")
        except _Unusable as problem:
            if on_problem == "error":
                message = f'{path}, {row.place}: {problem.fault}: {problem.remedy}, or pass on_problem="skip" to leave such rows out'
                raise DataError(message) from problem
            counts[problem.reason] += 1
            continue
        pairs[pair.id] = pair
    if not pairs:
        what = describe_problems(counts).replace("_", " ") if counts else "it has no rows"
        raise DataError(f'{path} has no usable pair ({what}): pass on_problem="error" to see the first problem')
    if counts:
        log.warning("%s: %s", path, describe_problems(counts).replace("_", " "))
    return Pairs(tuple(pairs.values()), str(source), dict(counts))


def _pair(values: Mapping[str, Any], name: str, texts: _Texts) -> PromptPair:
    clean, corrupt = _text(values, "clean"), _text(values, "corrupt")
    right, wrong = _list(values, "answers"), _list(values, "wrong_answers")
    if clean == corrupt:
        raise _Unusable("same_texts", "clean and corrupt are the same text", "change what the answer depends on in the corrupt one")
    if not right:
        raise _Unusable("no_answers", "answers is empty", "write at least one right answer")
    ids, others = texts.ids(clean), texts.ids(corrupt)
    if len(ids) != len(others):
        raise _Unusable(
            "lengths_differ",
            f"clean has {len(ids)} tokens, corrupt has {len(others)}",
            "patching compares them token by token, so choose words that make both the same length",
        )
    if ids == others:
        raise _Unusable("same_texts", "clean and corrupt are the same tokens", "change more than this tokenizer ignores")
    answers, wrongs = texts.answers(right), texts.answers(wrong)
    if both := [text for text, answer in zip(right, answers, strict=True) if answer in wrongs]:
        raise _Unusable("right_and_wrong", f"{both[0]!r} is both a right and a wrong answer", "take it out of one of the lists")
    return PromptPair(
        _identity(values, name), ids, others, _unique(answers), _unique(wrongs), segments=texts.segments(clean, _named(values))
    )


def _clean(values: Mapping[str, Any], name: str, texts: _Texts) -> PromptPair:
    """Read the clean side of a row."""
    clean = _text(values, "clean")
    right, wrong = (texts.answers(_list(values, key)) if values.get(key) is not None else [] for key in ("answers", "wrong_answers"))
    ids = texts.ids(clean)
    if not right and len(ids) < 2:
        raise _Unusable("too_short", f"clean is {len(ids)} token and has no answers", "write a longer text, or what is right after it")
    target = None if right else (1, len(ids))
    segments = texts.segments(clean, _named(values))
    return PromptPair(_identity(values, name), ids, ids, _unique(right), _unique(wrong), target=target, segments=segments)


def _fact(values: Mapping[str, Any], name: str, texts: _Texts) -> PromptPair:
    prompt, subject, answer = (_text(values, key) for key in ("prompt", "subject", "answer"))
    ids = texts.ids(prompt)
    return PromptPair(
        _identity(values, name), ids, ids, (texts.first_answer(answer),), segments=texts.segments(prompt, {"subject": subject})
    )


def _values(row: Row) -> dict[str, Any]:
    if row.values is None:
        raise _Unusable("undecodable", "bytes that are not UTF-8", "save the file as UTF-8")
    return row.values


def _present(values: Mapping[str, Any], key: str) -> Any:
    if values.get(key) is None:
        has = ", ".join(map(repr, values)) or "nothing"
        raise _Unusable("missing", f"no {key!r}; the row has {has}", f"add {key!r}")
    return values[key]


def _text(values: Mapping[str, Any], key: str) -> str:
    value = _present(values, key)
    if not isinstance(value, str):
        raise _Unusable("not_text", f"{key!r} is a {type(value).__name__}, not a text", "write it in quotation marks")
    return _sound(value, key)


def _sound(value: str, key: str) -> str:
    if not value.strip():
        raise _Unusable("empty", f"an empty text in {key!r}", "fill it in")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can escape half of a character pair
        raise _Unusable("undecodable", f"half a character (a lone surrogate) in {key!r}", "write the character out") from None
    return value


def _list(values: Mapping[str, Any], key: str) -> list[str]:
    value = _present(values, key)
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            where = f"{key!r} holds a" if isinstance(value, list) else f"{key!r} is a"
            raise _Unusable("not_text", f"{where} {type(text).__name__}, not a text", "write a text or a list of texts")
    return [_sound(text, key) for text in texts]


def _named(values: Mapping[str, Any]) -> dict[str, str]:
    named = values.get("segments") or {}
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
        raise _Unusable("not_text", "'segments' is not an object of names and texts", 'write it as {"name": "text in clean"}')
    if taken := [name for name in named if name in RESERVED]:
        raise _Unusable("segment_name", f"a segment is named {taken[0]!r}, which means something else", "choose another name")
    subject = {} if values.get("subject") is None else {"subject": _text(values, "subject")}
    return {**subject, **{name: _sound(text, name) for name, text in named.items()}}


def _identity(values: Mapping[str, Any], name: str) -> str:
    return name if values.get("id") is None else str(values["id"])


def _unique(ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids))


@dataclass
class _Texts:
    """A tokenizer that turns the prompts, answers and segments of rows into tokens."""

    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        self.pieces = Pieces(self.tokenizer)

    def ids(self, text: str) -> tuple[int, ...]:
        return self.pieces.opened(text)

    def answers(self, texts: Sequence[str]) -> list[int]:
        """Return the one token of each answer."""
        tokens = []
        for text, ids in zip(texts, self.pieces.ids(texts, control=True), strict=True):
            if len(ids) != 1:
                pieces = ", ".join(repr(self.tokenizer.decode([one])) for one in ids)
                remedy = "choose a word of one token (behind a space it is written with that space, ' so')"
                raise _Unusable("answer_not_one_token", f"answer {text!r} is {len(ids)} tokens, not one: {pieces}", remedy)
            tokens.append(self._known(ids[0], text))
        return tokens

    def first_answer(self, text: str) -> int:
        return self._known(self.pieces.ids([text], control=True)[0][0], text)

    def segments(self, text: str, named: Mapping[str, str]) -> dict[str, tuple[Span, ...]]:
        """Find where named texts stand, in tokens of the prompt."""
        start = len(self.ids(text)) - len(self.pieces.ids([text], first=True, control=True)[0])
        segments = {}
        for name, wanted in named.items():
            places = _occurrences(text, wanted)
            if not places:
                raise _Unusable("segment_absent", f"{name} {wanted!r} does not stand in {text!r}", "copy it from there letter by letter")
            try:
                spans = self.pieces.token_spans(text, places, first=True, control=True)
            except DataError as error:
                raise _Unusable("segment_unplaced", str(error), "leave the segment out") from error
            segments[name] = tuple((start + begin, start + end) for begin, end in spans)
        return segments

    def _known(self, answer: int, text: str) -> int:
        # byte-level tokenizers name an unknown token (GPT-2 its end token) but never make it of a text
        if answer == self.tokenizer.unk_token_id:
            fault = f"answer {text!r} is not in the tokenizer's vocabulary (it becomes {self.tokenizer.unk_token!r})"
            raise _Unusable("answer_unknown", fault, "choose a word that it knows")
        return answer


def _occurrences(text: str, wanted: str) -> list[Span]:
    """Find a text as a whole word, or, where it is none ("Al" is not meant by "Also", but Chinese has no borders), anywhere."""
    letters = re.escape(wanted.strip())
    whole = [match.span() for match in re.finditer(rf"(?<!\w){letters}(?!\w)", text)]
    return whole or [match.span() for match in re.finditer(letters, text)]
