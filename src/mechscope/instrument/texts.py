"""The loop over texts that every technique runs: batch by batch, halved where memory runs out, with progress, shared among ranks if wanted.

Whatever is done to each text goes through here, so that a technique says what to do with a batch and nothing else. A batch knows which of the texts
it holds, by their places and not by what they are: the same text may occur twice, as in a bootstrap resample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from mechscope import ranks
from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.instrument.memory import Halvable, each

B = TypeVar("B", bound=Halvable)
B_co = TypeVar("B_co", bound=Halvable, covariant=True)
R = TypeVar("R")


class Texts(Protocol[B_co]):
    """What can be run batch by batch."""

    def __len__(self) -> int:
        """Return the number of texts."""

    def batches(self, *, tokens_per_batch: int) -> Iterator[B_co]:
        """Batch the texts, longest first."""


class Loop(Generic[B]):
    """One pass over some `texts`."""

    def __init__(self, texts: Texts[B], execution: Execution, *, tokens: int, label: str = "", units: int = 1, dealt: bool = False) -> None:
        """Prepare a pass; `units` things are done to each text, and of `dealt` batches this rank works on its own only.

        Raises:
            SettingsError: There are no texts.
        """
        if not len(texts):
            raise SettingsError("there are no pairs to run: give at least one")
        self.texts = texts
        self._execution, self._tokens, self._label, self._units, self._dealt = execution, execution.tokens(tokens), label, units, dealt
        self._total = units * len(texts)
        # units that are done with their batches, and with the batch at work; its texts; the most that was reported
        self._done, self._at, self._now, self._reported = 0, 0, 0, 0

    def run(self, work: Callable[[B], R]) -> Iterator[tuple[B, R]]:
        """Yield each batch, or half of one, with what work makes of it.

        Args:
            work: Begun again with half of the batch where memory runs out, so it may leave nothing behind until it returns.

        Raises:
            RunError: Not even half of a batch, or a single text, fits into memory.
        """

        def attempt(batch: B) -> tuple[B, R]:
            self._at, self._now = self._done, len(batch)
            return batch, work(batch)

        batches = self.texts.batches(tokens_per_batch=self._tokens)
        for batch, result in each(attempt, ranks.own(batches) if self._dealt else batches):
            self._done += self._units * len(batch)
            self._report(self._done)
            yield batch, result
        self._report(self._total)  # a rank's own share may be the smaller one

    def step(self, number: int) -> None:
        """Report, from within work, that so many more of its units are done."""
        self._at += number * self._now
        self._report(self._at)

    def _report(self, at: int) -> None:
        if self._dealt:
            at *= ranks.size()  # the others have done about as much
        at = min(at, self._total)
        # less than before where work was begun again
        if self._label and at > self._reported:
            self._reported = at
            self._execution.told(self._label, at, self._total)


def over_texts(
    texts: Texts[B], work: Callable[[B], R], execution: Execution, *, tokens: int, label: str = "", units: int = 1, dealt: bool = False
) -> Iterator[tuple[B, R]]:
    """Yield each batch of some texts, longest first, with what work makes of it; from the first that does not fit into memory on, of its halves.

    Args:
        texts: What is run over.
        work: Begun again with half of the batch where memory runs out, so it may leave nothing behind until it returns.
        execution: Tokens of a batch, progress.
        tokens: Tokens of a batch where `execution` says nothing.
        label: What progress is called; none is reported without one.
        units: What progress counts for each text.
        dealt: Share the batches among ranks: yield this rank's only.

    Raises:
        SettingsError: There are no texts.
        RunError: Not even half of a batch, or a single text, fits into memory.
    """
    yield from Loop(texts, execution, tokens=tokens, label=label, units=units, dealt=dealt).run(work)
