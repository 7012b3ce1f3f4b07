"""Means over trainings and documents at once: both vary, and every training was scored on the same documents.

A difference between two placements of LoRA, scored on D documents after S trainings each, is a table of trainings by documents. A t interval
over the trainings' means holds the documents fixed: where the arms differ by document, as a placement that suits some articles does, it excludes
zero in 12 to 73 % of nulls. An interval over documents holds the trainings fixed. Here both are random and crossed (Searle, Casella and McCulloch
1992, *Variance Components*): with mean squares A over trainings, B over documents and E of the rest, the variance of the grand mean is
(A + max(0, B − E)) / SD, and its degrees of freedom are Satterthwaite's (1946).

Simulated (`mechscope.studies.calibration.training`): the interval excludes zero in 3.3 to 6.8 % of nulls for 3 to 12 trainings and 12 to 200
documents, with seeds, documents, both or neither making the difference. The two-level percentile bootstrap excluded it in 40, 27, 19, 17, 12 and 9 % for
2, 3, 4, 5, 8 and 12 trainings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats as distributions

MIN_TRAININGS = 3
"""Fewest trainings of which anything is said about another training."""

# more trainings than anybody runs
_MOST = 1000


@dataclass(frozen=True)
class Crossed:
    """A mean over trainings and documents.

    Attributes:
        value: The mean.
        low: Lower end of its interval over trainings and documents; NaN below `MIN_TRAININGS`.
        high: Upper end.
        sd: Standard deviation between the trainings' means; NaN below two.
        trainings: How many there are.
    """

    value: float
    low: float
    high: float
    sd: float
    trainings: int


def crossed_mean(values: Float[np.ndarray, "training document"], *, level: float = 0.95) -> Crossed:
    """Estimate the mean over trainings and documents.

    Args:
        values: Every document's score after every training; for two arms paired by seed their differences.
        level: Confidence, a fraction.

    Raises:
        ValueError: The values are not a full table.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size or np.isnan(values).any():
        raise ValueError(f"values of shape {values.shape}: give a table of trainings by documents without gaps")
    trainings, documents = values.shape
    mean, by_training, by_document = float(values.mean()), values.mean(1), values.mean(0)
    sd = float(by_training.std(ddof=1)) if trainings > 1 else math.nan
    if trainings < MIN_TRAININGS or documents < 2:
        return Crossed(mean, math.nan, math.nan, sd, trainings)
    rest = values - by_training[:, None] - by_document + mean
    error = (rest**2).sum() / ((trainings - 1) * (documents - 1))
    of_trainings = by_training.var(ddof=1) / trainings
    of_documents = max(0.0, by_document.var(ddof=1) / documents - error / values.size)
    variance = of_trainings + of_documents
    if not variance:
        return Crossed(mean, mean, mean, sd, trainings)
    degrees = variance**2 / (of_trainings**2 / (trainings - 1) + of_documents**2 / (documents - 1))
    width = float(distributions.t.ppf((1 + level) / 2, degrees)) * math.sqrt(variance)
    return Crossed(mean, mean - width, mean + width, sd, trainings)


def trainings_for(width: float, sd: float, *, level: float = 0.95) -> int | None:
    """Return how many trainings give a t interval no wider than ± `width`, where their means spread by `sd`; None where it takes over a thousand."""
    n = np.arange(MIN_TRAININGS, _MOST + 1)
    narrow = distributions.t.ppf((1 + level) / 2, n - 1) * sd / np.sqrt(n) <= width
    return int(n[narrow.argmax()]) if narrow.any() else None
