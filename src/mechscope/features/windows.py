"""What units do on texts, in one pass whose memory does not hang on how much text there is: counts, the largest activations, random ones, random tokens.

Of every unit are kept the `top` largest activations, one of a text at most, and `drawn` random ones of all tokens in which it is active; each with its
values in the tokens around it. Beside them a random sample of tokens, with everything that is active there (`mechscope.features.reservoirs`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.errors import SettingsError
from mechscope.features.observed import Observed
from mechscope.features.reservoirs import ALONE, Drawn, Entries, Kept, Largest, Part, Sample, Span, Tokens
from mechscope.features.rows import TOKENS_PER_BATCH, require_rows
from mechscope.instrument import Execution
from mechscope.instrument.texts import over_texts
from mechscope.shapes import by_shape

STEPS = 4
"""Bars of a histogram for each doubling of an activation."""
LOWEST, HIGHEST = -16, 16
"""Its range in doublings: 2⁻¹⁶ to 2¹⁶; what lies outside counts in the first or the last bar."""
BARS = STEPS * (HIGHEST - LOWEST)


@dataclass(frozen=True)
class Watched:
    """What units did on texts.

    Attributes:
        names: Each unit's text form.
        span: The tokens around what is kept.
        tokens: Tokens that were read.
        active: ``(unit)``: tokens in which it is active.
        energy: ``(unit)``: Σ f² over all tokens.
        bars: ``(unit, bar)``: its histogram: tokens by the activation, `STEPS` bars for each doubling from 2 to the power of `LOWEST` on.
        top: The largest activations, the largest first.
        drawn: Random ones of all tokens in which a unit is active, in random order.
        sample: Random tokens.
    """

    names: tuple[str, ...]
    span: Span
    tokens: int
    active: Int[np.ndarray, " unit"]
    energy: Float[np.ndarray, " unit"]
    bars: Int[np.ndarray, "unit bar"]
    top: Kept
    drawn: Kept
    sample: Sample

    __repr__ = by_shape

    def strongest(self, count: int) -> list[int]:
        """Return the units with the largest Σ f², the largest first, without those that are silent."""
        return strongest(self.energy, count)


def strongest(energy: Float[np.ndarray, " unit"], count: int) -> list[int]:
    """Return the units with the largest Σ f², the largest first, without those that are silent."""
    order = np.lexsort((np.arange(len(energy)), -energy))
    return [int(unit) for unit in order[:count] if energy[unit] > 0]


def watch(
    observed: Observed,
    texts: Pairs,
    *,
    top: int,
    drawn: int = 0,
    span: Span = ALONE,
    sample: int = 0,
    around: Span = ALONE,
    execution: Execution = Execution(),
    label: str = "examples",
) -> Watched:
    """Read texts once.

    Args:
        observed: The units.
        texts: Any texts; their clean versions are read.
        top: Largest activations of a unit, each from another text.
        drawn: Random activations of a unit.
        span: The tokens around each of them whose activations are kept.
        sample: Random tokens.
        around: The tokens around each of these.
        execution: Tokens of a batch, seed of what is drawn, progress.
        label: What progress is called.

    Raises:
        MechscopeError: The texts do not fit, or no token is left.
    """
    if top < 1:
        raise SettingsError(f"count={top}: ask for at least one example of a latent")
    units = len(observed.names)
    largest, random = Largest(units, top, span), Drawn(units, drawn, span)
    tokens = Tokens(units, sample, around)
    active, energy, bars, read = np.zeros(units, dtype=np.int64), np.zeros(units), np.zeros(units * BARS, dtype=np.int32), 0

    def work(batch: PairBatch) -> _Found:
        seen = Entries(observed.see(batch), execution.seed)
        return _Found(seen, largest.candidates(seen), random.candidates(seen), tokens.candidates(seen))

    for _, found in over_texts(texts, work, execution, tokens=TOKENS_PER_BATCH, label=label):
        seen = found.seen
        read += len(seen.text)
        active += np.bincount(seen.unit, minlength=units)
        energy += np.bincount(seen.unit, weights=seen.value.astype(np.float64) ** 2, minlength=units)
        with np.errstate(divide="ignore"):
            bar = np.floor(STEPS * (np.log2(seen.value) - LOWEST)).clip(0, BARS - 1).astype(np.int64)
        at, count = np.unique(seen.unit * BARS + bar, return_counts=True)
        bars[at] += count.astype(np.int32)
        largest.add(found.largest)
        random.add(found.random)
        tokens.add(found.tokens)
    require_rows(read, texts, observed.reader.tokens)
    return Watched(
        tuple(observed.names), span, read, active, energy, bars.reshape(units, BARS), largest.kept(), random.kept(), tokens.kept()
    )


def apart(kept: Kept, least: int) -> list[int]:
    """Return the places, in order, of those that lie at least so many tokens from all before them in the same text."""
    chosen: list[int] = []
    for at in range(len(kept)):
        own = [other for other in chosen if kept.text[other] == kept.text[at]]
        if all(abs(int(kept.position[other]) - int(kept.position[at])) >= least for other in own):
            chosen.append(at)
    return chosen


def deciles(values: Float[np.ndarray, " kept"], groups: int = 10) -> Iterator[Int[np.ndarray, " some"]]:
    """Yield the places of values by the group, of so many equally large ones, in which they lie: the largest values first."""
    order = np.argsort(-values, kind="stable")
    yield from np.array_split(order, groups)


@dataclass(frozen=True)
class _Found:
    """What a batch adds."""

    seen: Entries
    largest: np.ndarray
    random: np.ndarray
    tokens: Part | None
