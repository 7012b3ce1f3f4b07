"""Means over trainings and documents at once: both vary, and every training was scored on the same documents.

A difference between two placements of LoRA, scored on D documents after S trainings each, is a table of trainings by documents. A t interval
over the trainings' means holds the documents fixed: where the arms differ by document, as a placement that suits some articles does, it excludes
zero in 12 to 73 % of nulls. An interval over documents holds the trainings fixed. Here both are random and crossed (Searle, Casella and McCulloch
1992, *Variance Components*): with mean squares A over trainings, B over documents and E of the rest, the variance of the grand mean is
(A + max(0, B − E)) / SD. Its t is Cochran and Cox's (1950, *Experimental Designs*): the parts' own, weighted by their variances. Satterthwaite's
degrees of freedom (1946) let nulls of three trainings that differ mostly by themselves exclude zero in 8 %, of four in 6 %. Documents are skewed: a
placement may suit a few of them very well. So each end is the farther of that interval and of Hall's (1992) for skewed means. A sample of skewed values
looks less skewed than they are; the skewness of the documents counts twice. Of the trainings, too few to show any, it counts as none.

Simulated (4,000 draws; 3, 5 and 12 trainings, 60 documents; documents' effects beside rest and trainings of three sizes, these normal):
zero is excluded in 2.6 to 5.1 % of nulls with normal effects of documents, 2.3 to 4.5 % with Student's t of 3 degrees of freedom, 1.1 to 4.1 % with
exponential ones, 1.4 to 4.3 % with log-normal ones of σ = 1, and where one document in ten or in twenty has the effect in .9 to 5.0 %. A sample without
the rare ones shows no skewness: with 24 documents these last give up to 29 %, with 40 up to 13 %. So below `MIN_DOCUMENTS` there is no interval. The
two-level percentile bootstrap excluded zero in 40, 27, 19, 17, 12 and 9 % for 2, 3, 4, 5, 8 and 12 trainings whose arms differ by their seeds alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats as distributions

from mechscope.stats.skewness import ThirdMoments, hall_inverse

MIN_TRAININGS = 3
"""Fewest trainings of which anything is said about another training."""
MIN_DOCUMENTS = 60
"""Fewest documents of which anything is said about others."""

# chosen by simulation, see above
_SKEW = 2.0
# more trainings than anybody runs
_MOST = 1000


@dataclass(frozen=True)
class Crossed:
    """A mean over trainings and documents.

    Attributes:
        value: The mean.
        low: Lower end of its interval over trainings and documents; NaN below `MIN_TRAININGS` or `MIN_DOCUMENTS`.
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
    if trainings < MIN_TRAININGS or documents < MIN_DOCUMENTS:
        return Crossed(mean, math.nan, math.nan, sd, trainings)
    rest = values - by_training[:, None] - by_document + mean
    error = (rest**2).sum() / ((trainings - 1) * (documents - 1))
    of_trainings = by_training.var(ddof=1) / trainings
    with_rest = by_document.var(ddof=1) / documents
    of_documents = max(0.0, with_rest - error / values.size)
    variance = of_trainings + of_documents
    if not variance:
        return Crossed(mean, mean, mean, sd, trainings)
    # Cochran and Cox's: each part of the variance has the t of its own degrees of freedom
    parts = (of_trainings * _t(trainings - 1, level), of_documents * _t(documents - 1, level))
    t = sum(parts) / variance
    over_documents = ThirdMoments()
    over_documents.update_many(by_document)
    # of the grand mean: its third cumulant is that of the documents' mean, its variance has the trainings' beside
    skewness = _SKEW * over_documents.skewness * with_rest**1.5 / math.sqrt(documents) / variance**1.5
    above, below = max(t, float(hall_inverse(t, skewness))), max(t, -float(hall_inverse(-t, skewness)))
    return Crossed(mean, mean - above * math.sqrt(variance), mean + below * math.sqrt(variance), sd, trainings)


def _t(degrees: int, level: float) -> float:
    return float(distributions.t.ppf((1 + level) / 2, degrees))


def trainings_for(width: float, sd: float, *, level: float = 0.95) -> int | None:
    """Return how many trainings give a t interval no wider than ± `width`, where their means spread by `sd`; None where it takes over a thousand."""
    n = np.arange(MIN_TRAININGS, _MOST + 1)
    narrow = distributions.t.ppf((1 + level) / 2, n - 1) * sd / np.sqrt(n) <= width
    return int(n[narrow.argmax()]) if narrow.any() else None
