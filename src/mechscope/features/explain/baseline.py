"""The explanation without a language model: the set of n-grams whose last tokens tell best where a unit is active.

N-grams are added one by one, each time the one that raises F1 over the tokens of the training windows most, until none does: of a unit that is active on some
tokens whatever stands around them it finds just these. It is deterministic, needs nothing, and is what a language model's explanations must beat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mechscope.features.explain.evidence import Evidence, Exchange, Explanation, Window
from mechscope.subject.spelling import Spelling

# n-grams of a set at most
_MOST = 12


class Baseline:
    """Explains a unit by n-grams, and judges windows by whether they have them.

    Attributes:
        longest: Tokens of an n-gram at most.
    """

    name = "baseline"
    intrudes_by_explanation = True

    def __init__(self, tokenizer: Any = None, *, longest: int = 2) -> None:
        """Take the tokenizer that spells the tokens."""
        self._spelling, self.longest = Spelling(tokenizer), longest

    def explain(self, evidence: Evidence) -> Explanation:
        """Return the n-grams that tell best where a unit is active."""
        windows = (*evidence.train, *evidence.train_silent)
        true = np.array([value > 0 for window in windows for value in window.values])
        values = np.array([value for window in windows for value in window.values])
        where: dict[tuple[int, ...], list[int]] = {}
        at = 0
        for window in windows:
            for place in range(len(window.ids)):
                for gram in self._grams(window.ids, place):
                    where.setdefault(gram, []).append(at + place)
            at += len(window.ids)
        # the n-grams that end in an active token, the shortest first: of equal ones the shorter is the simpler
        candidates = sorted((gram for gram, places in where.items() if true[places].any()), key=lambda gram: (len(gram), gram))
        chosen, covered, best = list[tuple[int, ...]](), np.zeros(len(true), dtype=bool), 0.0
        positives = int(true.sum())
        while len(chosen) < _MOST:
            hits, marked = int((covered & true).sum()), int(covered.sum())
            gains = []
            for gram in candidates:
                new = [place for place in where[gram] if not covered[place]]
                right = int(true[new].sum())
                gains.append(2 * (hits + right) / (marked + len(new) + positives))
            if not gains or max(gains) <= best + 1e-12:
                break
            gram = candidates[int(np.argmax(gains))]
            best = max(gains)
            chosen.append(gram)
            covered[where[gram]] = True
        grams = {gram: float(values[where[gram]].mean()) for gram in chosen}
        return Explanation(self.words(grams), grams)

    def words(self, grams: Mapping[tuple[int, ...], float]) -> str:
        """Write n-grams as a sentence: single tokens first, then longer ones, of which the last token counts."""
        one = [f"“{self._spelling.token(gram[0])}”" for gram in grams if len(gram) == 1]
        more = [f"“{self._spelling.text(gram)}”" for gram in grams if len(gram) > 1]
        parts = ([f"the token{'s' * (len(one) > 1)} {', '.join(one)}"] if one else []) + ([f"the end of {', '.join(more)}"] if more else [])
        return " and ".join(parts) if parts else "nothing that its tokens tell"

    def detect(self, explanation: Explanation, windows: Sequence[Window]) -> list[bool | None]:
        """Tell of each window whether it has one of the n-grams."""
        return [any(self._strengths(explanation, window)) for window in windows]

    def fuzz(self, explanation: Explanation, windows: Sequence[Window], marks: Sequence[Sequence[int]]) -> list[bool | None]:
        """Tell of each window whether at least half of the marked tokens end one of the n-grams."""
        found: list[bool | None] = []
        for window, marked in zip(windows, marks, strict=True):
            strengths = self._strengths(explanation, window)
            found.append(2 * sum(strengths[place] > 0 for place in marked) >= len(marked))
        return found

    def simulate(self, explanation: Explanation, windows: Sequence[Window]) -> list[list[float] | None]:
        """Predict the mean activation of the n-gram that ends in a token, 0 without one."""
        return [self._strengths(explanation, window) for window in windows]

    def intrude(self, explanation: Explanation, windows: Sequence[Window]) -> int | None:
        """Tell which window has the fewest ends of n-grams, the first of several."""
        counts = [sum(strength > 0 for strength in self._strengths(explanation, window)) for window in windows]
        return int(np.argmin(counts))

    def taken(self) -> list[Exchange]:
        """Return nothing: no language model is asked."""
        return []

    def _grams(self, ids: Sequence[int], place: int) -> Iterator[tuple[int, ...]]:
        for length in range(1, min(self.longest, place + 1) + 1):
            yield tuple(ids[place + 1 - length : place + 1])

    def _strengths(self, explanation: Explanation, window: Window) -> list[float]:
        """Return for each token the largest value of the n-grams that end there."""
        return [
            max((explanation.grams.get(gram, 0.0) for gram in self._grams(window.ids, place)), default=0.0)
            for place in range(len(window.ids))
        ]
