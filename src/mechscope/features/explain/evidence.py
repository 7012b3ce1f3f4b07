"""What a unit is explained from and judged on: windows of text in which it is active, and windows in which it is silent.

The texts are halved: explanations are made of one half and judged on the other, so no window, and no text, is in both. Windows do not begin where a unit
becomes active but at random, so that a place in the window says nothing. Those that are judged are random ones of all tokens in which the unit is active, and
random ones of all windows in which it is silent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mechscope.data.pairs import Pairs
from mechscope.data.splits import held_out
from mechscope.features.observed import Observed
from mechscope.features.reservoirs import Kept, Span
from mechscope.features.windows import Watched, apart, watch
from mechscope.instrument import Execution
from mechscope.settings.features import ExplainSettings
from mechscope.stats.chance import drawn

# random activations that are drawn for each window that is wanted: some overlap
_DRAWN = 3
# random windows that are drawn for each silent one that is wanted: in most a unit of some density is active
_SILENT = 50


@dataclass(frozen=True)
class Window:
    """Some neighbouring tokens of a text.

    Attributes:
        ids: The tokens.
        values: The unit's activation in each; 0 where it is silent.
    """

    ids: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def peak(self) -> int:
        """The token in which the unit is active most."""
        return self.ids[int(np.argmax(self.values))]

    @property
    def active(self) -> tuple[int, ...]:
        """The places of the tokens in which the unit is active."""
        return tuple(at for at, value in enumerate(self.values) if value > 0)


@dataclass(frozen=True)
class Evidence:
    """The windows of a unit.

    Attributes:
        unit: Its text form.
        tokens: Tokens that were read of both halves.
        active: Those in which it is active.
        train: Windows in which it is active, of the first half: those with its largest activations, then random ones.
        train_silent: Windows of the first half in which it is silent.
        test: Random windows in which it is active, of the other half.
        test_silent: Random windows of the other half in which it is silent.
        dictionary: Of a latent, the dictionary that it belongs to, where units of several are explained together.
    """

    unit: str
    tokens: int
    active: int
    train: tuple[Window, ...]
    train_silent: tuple[Window, ...]
    test: tuple[Window, ...]
    test_silent: tuple[Window, ...]
    dictionary: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """The dictionary and the unit: latents of two dictionaries at one place have the same names."""
        return self.dictionary, self.unit

    @property
    def largest(self) -> float:
        """Its largest activation in the windows that explain it; 0 without any."""
        return max((value for window in self.train for value in window.values), default=0.0)


@dataclass(frozen=True)
class Explanation:
    """What is said of a unit.

    Attributes:
        text: In words.
        grams: Of the baseline: n-grams, each with the mean activation at its last token; none of an explanation in words.
    """

    text: str
    grams: Mapping[tuple[int, ...], float] = field(default_factory=dict)


Messages = list[dict[str, str]]
"""A conversation as language models take it: `role` and `content` of each message."""


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    Attributes:
        purpose: What it was asked for: explanation, detection, fuzzing, simulation, intruder.
        messages: What was sent.
        answer: What came back.
    """

    purpose: str
    messages: Messages
    answer: str


class Explainer(Protocol):
    """Explains units, and judges windows by an explanation; what it gives no readable answer to is None."""

    name: str
    """What it is called in tables."""
    intrudes_by_explanation: bool
    """Whether it seeks intruders by the explanation, so that another unit's is a control, or by what the windows have in common."""

    def explain(self, evidence: Evidence) -> Explanation:
        """Explain a unit from its first half's windows."""

    def detect(self, explanation: Explanation, windows: Sequence[Window]) -> list[bool | None]:
        """Tell of each window whether the unit is active in it."""

    def fuzz(self, explanation: Explanation, windows: Sequence[Window], marks: Sequence[Sequence[int]]) -> list[bool | None]:
        """Tell of each window whether the marked places are where the unit is active."""

    def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[list[float] | None]:
        """Predict the activation in each token, on any scale."""

    def intrude(self, explanation: Explanation, windows: Sequence[Window]) -> int | None:
        """Tell in which one of some windows the unit is silent, active in all others."""

    def taken(self) -> list[Exchange]:
        """Return what was sent to a language model and answered since this was last called; nothing where none is asked."""


def halves(texts: Pairs, seed: int) -> tuple[Pairs, Pairs]:
    """Return the texts that explanations are made of, and those that they are judged on; equal ones are in one half.

    Raises:
        DataError: There are fewer than two different texts.
    """
    return held_out(texts, 0.5, seed, of_pairs=False)


def gather(
    observed: Observed,
    texts: Pairs,
    *,
    settings: ExplainSettings | None = None,
    dictionary: str = "",
    execution: Execution = Execution(),
) -> list[Evidence]:
    """Read texts once and return the windows of every unit.

    Args:
        observed: The units.
        texts: Any texts; a half of them is held out (`halves`).
        settings: How many windows, of which length.
        dictionary: What the dictionary is called, where latents of several are explained together.
        execution: Tokens of a batch, seed, progress.

    Raises:
        MechscopeError: There are fewer than two different texts, or no token is left in a half of them.
    """
    settings = settings or ExplainSettings()
    longest = max(settings.windows, settings.examples)
    read = []
    for name, half in zip(("explain on", "judge on"), halves(texts, execution.seed), strict=True):
        around = Span(settings.window - 1, settings.window - 1)
        seen = watch(
            observed,
            half,
            top=max(1, settings.examples // 2),
            drawn=_DRAWN * longest,
            span=around,
            sample=_SILENT * longest,
            around=around,
            execution=execution,
            label=f"windows to {name}",
        )
        read.append(_Half(half, seen, settings.window, observed.reader.tokens.first))
    first, second = read
    found = []
    for unit, name in enumerate(observed.names):
        top = first.active(first.seen.top.of(unit), settings.examples // 2)
        taken = {(text, start) for text, start, _ in top}
        random = [each for each in first.active(first.seen.drawn.of(unit), settings.examples) if each[:2] not in taken]
        found.append(
            Evidence(
                name,
                first.seen.tokens + second.seen.tokens,
                int(first.seen.active[unit] + second.seen.active[unit]),
                tuple(window for _, _, window in (*top, *random[: settings.examples - len(top)])),
                first.silent(unit, settings.examples),
                tuple(window for _, _, window in second.active(second.seen.drawn.of(unit), settings.windows)),
                second.silent(unit, settings.windows),
                dictionary,
            )
        )
    return found


class _Half:
    """A half of the texts, and what was seen there."""

    def __init__(self, texts: Pairs, seen: Watched, window: int, first: int) -> None:
        self.texts, self.seen, self._window, self._first = texts, seen, window, first
        sample = seen.sample
        self._columns = sample.codes.tocsc()
        self._starts = [self._start(int(text), int(position)) for text, position in zip(sample.text, sample.position, strict=True)]

    def _start(self, text: int, position: int) -> int:
        """Return where the window of a token begins: anywhere such that the token is in it, but not among tokens that are left out."""
        length = len(self.texts.pairs[text].clean)
        # by the token's own place, so that it hangs on nothing else
        back = int(drawn(0, np.array(text), np.array(position))) % self._window
        return min(max(position - back, self._first), max(length - self._window, self._first))

    def active(self, kept: Kept, count: int) -> list[tuple[int, int, Window]]:
        """Return windows around activations, with the place of their text and where they begin."""
        found = []
        for at in apart(kept, self._window)[:count]:
            text, position = int(kept.text[at]), int(kept.position[at])
            start = self._start(text, position)
            ids = self.texts.pairs[text].clean[start : start + self._window]
            begin = start - (position - (self._window - 1))
            values = kept.around[at][begin : begin + len(ids)]
            found.append((text, start, Window(ids, tuple(float(value) for value in values))))
        return found

    def silent(self, unit: int, count: int) -> tuple[Window, ...]:
        """Return random windows in which a unit is silent."""
        span, sample, found, taken = 2 * self._window - 1, self.seen.sample, list[Window](), list[tuple[int, int]]()
        column = self._columns[:, unit]
        touched = np.zeros(len(sample) * span, dtype=bool)
        touched[column.indices] = True
        for at in range(len(sample)):
            text, start = int(sample.text[at]), self._starts[at]
            ids = self.texts.pairs[text].clean[start : start + self._window]
            begin = at * span + start - (int(sample.position[at]) - (self._window - 1))
            apart_from_others = all(text != other or abs(start - begun) >= self._window for other, begun in taken)
            if apart_from_others and not touched[begin : begin + len(ids)].any():
                found.append(Window(ids, (0.0,) * len(ids)))
                taken.append((text, start))
            if len(found) == count:
                break
        return tuple(found)
