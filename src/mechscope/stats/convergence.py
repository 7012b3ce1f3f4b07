"""Whether a training arrived: the one definition for everything that is trained here.

A training has converged if it is shown that its last quarter changed the loss by less than a tenth of all that the training changed it: the whole 90 %
interval of the late change lies within that tenth, up and down (an equivalence test at the 5 % level, Schuirmann 1987), as a loss that rises at the end
has not arrived either. Where the loss never left its noise there is no whole to take a tenth of: then the late change is compared with the noise of
one point.

"A quarter" is of the way that the learning rate allows: steps count by their learning rate, since a rate that falls to zero flattens every curve,
one that is far from its end too. Under a rate that falls linearly the last quarter is the last half of the steps.

The late change is that of a straight line through the means of up to eight blocks of the last quarter, as what one step leaves behind stays for some
steps. With fewer than four points there, or too much noise, nothing is shown, and the training counts as not converged.

How often it errs, and what it sees of trainings that arrived: `mechscope.studies.calibration.optimisers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as distributions

from mechscope.errors import DataError

# of the training, by learning rate
LATE = 0.25
# of the whole change of the loss
TOLERANCE = 0.1
FEWEST = 4
_BLOCKS = 8
_LEVEL = 0.05
# the loss before training is the mean of this share of the points
_FIRST = 0.02
# standard errors of the whole change above which the loss is held to have moved at all
_MOVED = 3.0


@dataclass(frozen=True)
class Convergence:
    """What a loss curve says of a training.

    Attributes:
        converged: Whether it arrived.
        late_share: Fall of the loss in the last quarter, as a share of the whole change; negative where the loss rose. NaN where too few points tell or
            the loss never moved.
        reason: Why it does not count as converged, in words that may follow "because"; empty where it does.
    """

    converged: bool
    late_share: float
    reason: str

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that tables of trained things carry."""
        return {"converged": self.converged, "late_share": self.late_share}


def convergence(loss: ArrayLike, *, pace: ArrayLike | None = None, whole: float | None = None) -> Convergence:
    """Judge whether a training arrived.

    Args:
        loss: ``(points)``: the loss at each point, in order, in any unit; of an objective that stays the same throughout.
        pace: ``(points)``: the learning rate at each point, in any unit; None where it was constant.
        whole: What a tenth is taken of, in the loss's unit, where the curve does not begin with the untrained loss; None for the curve's own change.

    Raises:
        DataError: A loss is not finite, or there is not one learning rate for each.
    """
    y = np.asarray(loss, dtype=np.float64)
    rate = np.ones(len(y)) if pace is None else np.asarray(pace, dtype=np.float64)
    if y.ndim != 1 or rate.shape != y.shape:
        raise DataError(f"a loss curve of shape {y.shape} with learning rates of shape {rate.shape}: give one of each per point")
    if not np.isfinite(y).all():
        raise DataError("a loss curve holds values that are NaN or infinite: the training diverged, lower its learning rate")
    # where each point lies on the way, at its middle
    way = (rate.cumsum() - rate / 2) / max(rate.sum(), np.finfo(float).tiny)
    late = np.flatnonzero(way > 1 - LATE)
    if len(late) < FEWEST:
        points = f"{len(late)} point{'' if len(late) == 1 else 's'}"
        return Convergence(False, float("nan"), f"its last quarter has {points}, too few to tell whether it arrived")
    if np.ptp(way[late]) == 0:
        return Convergence(False, float("nan"), "its learning rate was zero in its last quarter, so nothing tells whether it arrived")
    blocks = np.array_split(late, np.clip(len(late) // 3, FEWEST, _BLOCKS))
    line = distributions.linregress(*(np.array([values[block].mean() for block in blocks]) for values in (way, y)))
    fall, error = -float(line.slope) * LATE, float(np.nan_to_num(line.stderr)) * LATE
    first, last = y[: max(1, round(_FIRST * len(y)))], blocks[-1]
    own = abs(float(first.mean() - y[last].mean()))
    noise = float(np.std(y[late] - line.intercept - line.slope * way[late], ddof=2))
    reach = float(distributions.t.ppf(1 - _LEVEL, len(blocks) - 2)) * error
    if whole is None and own <= _MOVED * noise * np.sqrt(1 / len(first) + 1 / len(last)):
        flat = abs(fall) + reach <= noise or not own
        return Convergence(flat, float("nan"), "" if flat else "noise hides whether the training changed the loss at all")
    whole = own if whole is None else whole
    if whole <= 0:
        return Convergence(False, float("nan"), "there was nothing to learn: the loss of the untrained is zero")
    if abs(fall) + reach <= TOLERANCE * whole:
        return Convergence(True, fall / whole, "")
    if abs(fall) <= reach:
        reason = f"noise hides whether its last quarter still changed the loss ({_percent(fall / whole)} ± {_percent(reach / whole)} of the whole change)"
    else:
        reason = (
            f"its last quarter still {'lowered' if fall > 0 else 'raised'} the loss by {_percent(abs(fall) / whole)} of the whole change"
        )
    return Convergence(False, fall / whole, reason)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u202f%"
