"""Explaining and judging by a language model that is asked in words: what it is sent, and how its answers are read.

Texts stand on one line each, active tokens between « and ». Yes and no, places and activations are asked for as a list of numbers in brackets, of a length that
is known: an answer without one is unreadable, and nothing is guessed. All that is sent and answered is kept.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from mechscope.features.explain.evidence import Evidence, Exchange, Explanation, Messages, Window
from mechscope.subject.spelling import Spelling

logger = logging.getLogger(__name__)

# windows that are judged by one question
_AT_ONCE = 5
# activations are written, and asked for, as whole numbers up to here (Bills et al. 2023)
_SCALE = 10
_LIST = re.compile(r"\[([^\[\]]*)\]")
_SYSTEM = (
    "You study one unit of a language model: it is active in some tokens of a text and silent in all others. Answer briefly and in the form that is asked for, "
    "without anything else."
)


class Chat(ABC):
    """A language model that is asked; a subclass says how.

    Attributes:
        name: What it is called in tables.
        exchanges: All that was sent and answered since it was last taken (`taken`).
    """

    # it is shown no explanation that could be another's
    intrudes_by_explanation = False

    def __init__(self, name: str, tokenizer: Any) -> None:
        """Take what it is called, and the tokenizer of the model that is studied."""
        self.name = name
        self.exchanges: list[Exchange] = []
        self._spelling = Spelling(tokenizer)

    @abstractmethod
    def generate(self, messages: Messages, *, tokens: int) -> str:
        """Return the answer to messages, of so many tokens at most."""

    def taken(self) -> list[Exchange]:
        """Return the exchanges since this was last called."""
        found, self.exchanges = self.exchanges, []
        return found

    def explain(self, evidence: Evidence) -> Explanation:
        """Ask what the tokens have in common in which a unit is active."""
        shown = "\n".join(self._example(number, window, evidence.largest) for number, window in enumerate(evidence.train, start=1))
        answer = self._ask(
            "explanation",
            "Texts in which it is active. The tokens in which it is active stand between « and »; behind each text, how strongly, "
            f"from 1 to {_SCALE}.\n\n{shown}\n\n"
            "What do these tokens, or what stands around them, have in common? Answer in one short sentence.",
            tokens=80,
        )
        return Explanation(" ".join(answer.split())[:600])

    def detect(self, explanation: Explanation, windows: Sequence[Window]) -> list[bool | None]:
        """Ask whether the unit is active in windows."""
        lines = [self._text(window, ()) for window in windows]
        return self._judged("detection", explanation, lines, "is the unit active in any token of it?")

    def fuzz(self, explanation: Explanation, windows: Sequence[Window], marks: Sequence[Sequence[int]]) -> list[bool | None]:
        """Ask whether marks are right."""
        lines = [self._text(window, marked) for window, marked in zip(windows, marks, strict=True)]
        return self._judged("fuzzing", explanation, lines, "is the unit active in the tokens between « and »?")

    def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[list[float] | None]:
        """Ask for activations token by token."""
        found: list[list[float] | None] = []
        for window in windows:
            tokens = "\n".join(f"{number}: {_line(self._spelling.token(token))}" for number, token in enumerate(window.ids, start=1))
            answer = self._ask(
                "simulation",
                f"The unit stands for: {explanation.text}\n\nTokens of a text, one a line:\n{tokens}\n\nHow active is it in each, from 0 (silent) to {_SCALE}? "
                f"Answer with a list of {len(window.ids)} numbers, such as [0, 0, 7, …].",
                tokens=4 * len(window.ids) + 20,
            )
            numbers = listed(answer, len(window.ids), _SCALE)
            found.append(None if numbers is None else [float(number) for number in numbers])
        return found

    def intrude(self, explanation: Explanation, windows: Sequence[Window]) -> int | None:
        """Ask which window is the intruder; no explanation is shown: what is asked is whether the others have something in common at all."""
        lines = "\n".join(f"{number}: {self._text(window, ())}" for number, window in enumerate(windows, start=1))
        answer = self._ask(
            "intruder",
            f"In all but one of these {len(windows)} texts the unit is active.\n\n{lines}\n\n"
            "In which one is it silent? Answer with its number in brackets, such as [2].",
            tokens=20,
        )
        numbers = listed(answer, 1, len(windows))
        return None if numbers is None or not numbers[0] else numbers[0] - 1

    def _judged(self, purpose: str, explanation: Explanation, lines: Sequence[str], question: str) -> list[bool | None]:
        found: list[bool | None] = []
        for start in range(0, len(lines), _AT_ONCE):
            some = lines[start : start + _AT_ONCE]
            shown = "\n".join(f"{number}: {line}" for number, line in enumerate(some, start=1))
            answer = self._ask(
                purpose,
                f"The unit stands for: {explanation.text}\n\n{shown}\n\nOf each text: {question} "
                f"Answer with a list of {len(some)} numbers, 1 for yes and 0 for no, such as [{', '.join('10101'[: len(some)])}].",
                tokens=6 * len(some) + 20,
            )
            numbers = listed(answer, len(some), 1)
            found += [None] * len(some) if numbers is None else [number == 1 for number in numbers]
        return found

    def _ask(self, purpose: str, question: str, *, tokens: int) -> str:
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
        # before it is sent, so that what was sent is known of a question without an answer too
        logger.info("%s is asked for %s", self.name, purpose, extra={"data": {"messages": messages}})
        answer = self.generate(messages, tokens=tokens)
        self.exchanges.append(Exchange(purpose, messages, answer))
        return answer

    def _example(self, number: int, window: Window, largest: float) -> str:
        strengths = ", ".join(
            f"{_line(self._spelling.token(window.ids[at]))} {max(1, round(_SCALE * window.values[at] / largest))}" for at in window.active
        )
        return f"{number}: {self._text(window, window.active)}\n   ({strengths})"

    def _text(self, window: Window, marked: Sequence[int]) -> str:
        """Write a window on one line, neighbouring marks as one."""
        chosen, parts, begin = set(marked), list[str](), 0
        whole = self._spelling.text(window.ids)
        for inside, run in groupby(range(len(window.ids)), key=lambda place: place in chosen):
            # what a text gains by some tokens: alone they may be spelled without the space before them
            end = len(self._spelling.text(window.ids[: list(run)[-1] + 1]))
            text = whole[begin:end]
            space = text[: len(text) - len(text.lstrip(" "))] if inside else ""
            parts.append(f"{space}«{text[len(space) :]}»" if inside else text)
            begin = end
        return _line("".join(parts))


def listed(answer: str, count: int, most: int) -> list[int] | None:
    """Return the first list of so many whole numbers from 0 to `most` in an answer; None without one."""
    for inside in _LIST.findall(answer):
        words = [word.strip() for word in inside.split(",")]
        if len(words) == count and all(re.fullmatch(r"\d{1,4}", word) for word in words):
            numbers = [int(word) for word in words]
            if max(numbers) <= most:
                return numbers
    return None


def _line(text: str) -> str:
    return "".join("↵" if character in "\n\r" else character for character in text)
