"""Rates of verdicts and coverages of intervals under known truths, with what is allowed of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pandas as pd
from scipy.stats import binom

from mechscope.stats.inference import share_interval
from mechscope.studies.calibration.truth import Truth, all_truths

# what a verdict's error rate and an interval's coverage may be, but for the binomial error of as many draws
ERROR = 0.05
COVERAGE = (0.93, 0.97)
# how far a rate may lie from what is allowed by chance alone: the central 99 % of the binomial, as a suite has some hundred rates
_CENTRAL = 0.99


def draw_many(index: int, seeds: Sequence[int]) -> Counter[str]:
    """Draw a truth, named by its place among all, once for every seed, and count what was said; fits a pool of processes."""
    truth = all_truths()[index]
    return Counter(truth.draw(seed) for seed in seeds)


def rates_table(truths: Sequence[Truth], counts: Sequence[Mapping[str, int]]) -> pd.DataFrame:
    """Build the table `calibration`.

    Args:
        truths: What was drawn.
        counts: How often each verdict was given, or an interval was "inside", "outside" or "withheld".

    Returns:
        One row per truth: `claim`, `world`, `kind`, `size`, `unit`, `n` (draws that count: of a coverage those with an interval), `withheld` (share of draws
        without one), `rate` (of wrong verdicts under a null, of right ones under a planted effect, of intervals that hold the truth) with `low` and `high`
        (Wilson), `allowed_from` and `allowed_to` with the binomial error of `n` draws, `holds`, and `verdicts` in words. A power is allowed everything.
    """
    return pd.DataFrame([_row(truth, count) for truth, count in zip(truths, counts, strict=True)])


def _row(truth: Truth, count: Mapping[str, int]) -> dict[str, object]:
    draws = sum(count.values())
    withheld = count.get("withheld", 0) if truth.kind == "coverage" else 0
    n = draws - withheld
    counted = {"null": truth.wrong, "planted": truth.right, "coverage": ("inside",)}[truth.kind]
    hits = sum(count.get(verdict, 0) for verdict in counted)
    low, high = share_interval(hits, n)
    allowed = _allowed(truth, n)
    return {
        "claim": truth.claim,
        "world": truth.world,
        "kind": truth.kind,
        "size": truth.size,
        "unit": truth.unit,
        "n": n,
        "withheld": withheld / draws if draws else float("nan"),
        "rate": hits / n if n else float("nan"),
        "low": low,
        "high": high,
        "allowed_from": allowed[0],
        "allowed_to": allowed[1],
        # where every interval is withheld none can be wrong
        "holds": n == 0 or allowed[0] <= hits / n <= allowed[1],
        "verdicts": ", ".join(f"{verdict} {times}" for verdict, times in sorted(count.items(), key=lambda item: -item[1])),
    }


def _allowed(truth: Truth, n: int) -> tuple[float, float]:
    if truth.kind == "planted" or n == 0:
        return 0.0, 1.0
    tail = (1 - _CENTRAL) / 2
    if truth.kind == "null":
        return 0.0, float(binom.ppf(1 - tail, n, ERROR)) / n
    return float(binom.ppf(tail, n, COVERAGE[0])) / n, float(binom.ppf(1 - tail, n, COVERAGE[1])) / n
