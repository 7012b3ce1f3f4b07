"""What is said of a claim: what the paper says, what was measured, and the verdict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

Verdict = Literal["supported", "contradicted", "undecided", "no change", "withheld"]
Tables = Mapping[str, pd.DataFrame]
NAN = float("nan")
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Scope:
    """What claims are judged by.

    Attributes:
        rows: Which query rows' statistics count.
        rule: The rule of layers that "selected layers" means.
        metric: The ROUGE score that decides.
        margin: By how much of that score (a fraction; 0.005 is half a point) targeted LoRA may fall behind standard LoRA and still count as
            equal.
    """

    rows: str = "all"
    rule: str = "layers_by_kl"
    metric: str = "rougeL"
    margin: float = 0.005


@dataclass(frozen=True)
class Judgement:
    """One row of the table `claims`, but for the claim's name.

    Attributes:
        statement: What is claimed.
        paper: What the paper says of it.
        measured: What was measured here; where withheld, why there is nothing to measure.
        value: The number that the verdict hangs on; NaN where there is none.
        low: Lower end of its interval.
        high: Upper end.
        verdict: `undecided` where the evidence does not reach, `withheld` where what the claim presupposes does not hold: "what carries the
            improvement" of a fine-tuning that improved nothing.
        note: How it was judged.
        unit: What was observed independently: document, prompt pair, seed, training, set of layers.
        overturn: What would overturn the verdict, or what it lacks: more seeds, a control, n.
    """

    statement: str
    paper: str
    measured: str = "not measured"
    value: float = NAN
    low: float = NAN
    high: float = NAN
    verdict: Verdict = "undecided"
    note: str = ""
    unit: str = ""
    overturn: str = ""

    def replaced(self, **fields: Any) -> Judgement:
        """Return the judgement with some fields changed."""
        return replace(self, **fields)

    def row(self, claim: str) -> dict[str, str | float]:
        """Return it as a row of the table; numbers in its sentences have true minus signs, as everywhere."""
        return {"claim": claim, **{name: minus(value) if isinstance(value, str) else value for name, value in asdict(self).items()}}


def verdict(low: float, high: float, threshold: float) -> Verdict:
    """Judge a claim that something exceeds a threshold by the interval it was measured with; undecided where that is NaN."""
    return "supported" if low > threshold else "contradicted" if high < threshold else "undecided"


def minus(text: str) -> str:
    """Write the hyphen before a number as a minus sign."""
    return re.sub(r"(?<![\w-])-(?=\d)", "−", text)


def percent(share: float) -> str:
    """Write a fraction as a percentage."""
    return "unknown" if np.isnan(share) else f"{100 * share:.0f}\u202f%"
