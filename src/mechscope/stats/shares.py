"""Shares of a whole: ratios of means over texts, by Fieller's interval, withheld where there is no whole to take a share of.

A share is mean(part) / mean(whole): faithfulness, a normalised patch effect, a part of the gain of fine-tuning. A mean of per-text ratios would
be ruled by texts whose whole is close to zero. Fieller (1954, "Some problems in interval estimation") inverts the t test of
mean(part − r · whole) = 0, so the interval takes the whole's own noise into account, is as long on each side as the data say, and is bounded
exactly where the whole's t interval excludes zero: there, and only there, a share is given.

Chosen by simulation among delta-method t, jackknife t, percentile, BCa and studentised bootstraps (`mechscope.studies.calibration.intervals`
repeats it for this one): on a language model's per-text losses before and after fine-tuning, with shares from .37 to .85, lognormal wholes
(σ from .5 to 1.5), Student's t with 3 degrees of freedom and logit differences, it covers .93 to .97 from 8 texts up where .95 is claimed, given
that the share is not withheld. The percentile bootstrap covers .82 to .93 at 8 and 16 texts, the delta method .79 at its worst. It is not held
where the part itself has a one-sided heavy tail that the whole does not share: a residual that is lognormal with σ = 1 gives .83 at 8 and .90 at 64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats as distributions

from mechscope.shapes import by_shape
from mechscope.stats.inference import MIN_TEXTS, too_few


@dataclass(frozen=True)
class Share:
    """A share of a whole, with its interval.

    Attributes:
        value: mean(part) / mean(whole); NaN where withheld, as are the ends.
        low: Lower end of the interval.
        high: Upper end.
        n: Texts behind it.
        withheld: Why it is not given, in words; empty where it is.
    """

    value: float
    low: float
    high: float
    n: int
    withheld: str


@dataclass(frozen=True)
class Shares:
    """Shares of many parts, arrays with one entry per part; attributes as those of `Share`."""

    value: Float[np.ndarray, " row"]
    low: Float[np.ndarray, " row"]
    high: Float[np.ndarray, " row"]
    n: np.ndarray
    withheld: np.ndarray

    __repr__ = by_shape

    def __getitem__(self, row: int) -> Share:
        """Return one part's share."""
        return Share(float(self.value[row]), float(self.low[row]), float(self.high[row]), int(self.n[row]), str(self.withheld[row]))

    @property
    def note(self) -> str | None:
        """The reason why shares are withheld, of the first that is; None where all are given."""
        return next((str(reason) for reason in self.withheld if reason), None)


def share_of(
    part: Float[np.ndarray, " text"],
    whole: Float[np.ndarray, " text"],
    *,
    absent: str = "the whole does not differ from zero",
    positive: bool = False,
    unit: str = "texts",
    level: float = 0.95,
) -> Share:
    """Estimate mean(part) / mean(whole) over texts; arguments as those of `shares_of`."""
    return shares_of(np.asarray(part)[None], whole, absent=absent, positive=positive, unit=unit, level=level)[0]


def shares_of(
    parts: Float[np.ndarray, "row text"],
    whole: Float[np.ndarray, " text"] | Float[np.ndarray, "row text"],
    *,
    absent: str = "the whole does not differ from zero",
    positive: bool = False,
    unit: str = "texts",
    level: float = 0.95,
) -> Shares:
    """Estimate the share that each part is of a whole.

    Args:
        parts: One value per part and text; NaN where a text has no such part.
        whole: What they are shares of, per text; for all parts or for each.
        absent: What is said where there is no whole, before its mean and interval: "fine-tuning did not lower the loss on these summaries".
        positive: Whether the whole is an improvement, so that a negative one is none: the share is withheld unless the whole's interval lies
            above zero, otherwise unless it excludes zero.
        unit: What is counted, in the plural.
        level: Confidence, a fraction.

    Returns:
        Shares with Fieller intervals. Withheld (NaN, with the reason) below `MIN_TEXTS` texts and where there is no whole.

    Raises:
        ValueError: The shapes do not fit.
    """
    x = np.asarray(parts, dtype=np.float64)
    if x.ndim != 2 or np.shape(whole) not in (x.shape, x.shape[1:]):
        raise ValueError(
            f"parts of shape {x.shape} and a whole of shape {np.shape(whole)}: give parts (row, text) and a whole (text) or (row, text)"
        )
    y = np.broadcast_to(np.asarray(whole, dtype=np.float64), x.shape)
    counted = ~(np.isnan(x) | np.isnan(y))
    n = counted.sum(1)
    enough = n >= MIN_TEXTS
    few = np.maximum(n, 2)
    (mean_x, dx), (mean_y, dy) = (_centred(values, counted) for values in (x, y))
    xx, xy, yy = ((a * b).sum(1) / (few - 1) for a, b in ((dx, dx), (dx, dy), (dy, dy)))
    t = distributions.t.ppf((1 + level) / 2, few - 1)
    width = t * np.sqrt(yy / few)
    there = (mean_y - width > 0) | ((mean_y + width < 0) & (not positive))
    given = enough & there
    # the two roots of (mean_x − r mean_y)² = t² var(x − r y) / n: a is positive exactly where the whole excludes zero
    k = t**2 / few
    a, b, c = mean_y**2 - k * yy, mean_x * mean_y - k * xy, mean_x**2 - k * xx
    root = np.sqrt(np.maximum(b**2 - a * c, 0.0))

    def shown(values: np.ndarray, over: np.ndarray) -> np.ndarray:
        return np.divide(values, over, out=np.full(len(x), np.nan), where=given)

    withheld = np.full(len(x), "", dtype=object)
    for row in np.flatnonzero(~given):
        if not enough[row]:
            withheld[row] = too_few(n[row], unit)
            continue
        mean, low, high = (_written(value) for value in (mean_y[row], mean_y[row] - width[row], mean_y[row] + width[row]))
        # a whole on the wrong side is none; one on the right side may be there, but these texts do not show it
        doubt = f", as far as {n[row]} {unit} show" if mean_y[row] > 0 or not positive else ""
        withheld[row] = f"{absent}{doubt}: {mean} ({low} to {high})"
    return Shares(shown(mean_x, mean_y), shown(b - root, a), shown(b + root, a), n, withheld)


def difference_of_shares(
    one: tuple[Float[np.ndarray, " text"], Float[np.ndarray, " text"]],
    other: tuple[Float[np.ndarray, " text"], Float[np.ndarray, " text"]],
    *,
    absent: str = "the whole does not differ from zero",
    positive: bool = False,
    unit: str = "texts",
    level: float = 0.95,
) -> Share:
    """Estimate how much more one share is than another of the same texts.

    Args:
        one: Part and whole of each text; NaN where a text has none.
        other: The same of the other share.
        absent: As for `shares_of`, as are the others.
        positive: Whether the wholes are improvements.
        unit: What is counted, in the plural.
        level: Confidence, a fraction.

    Returns:
        The difference, with the t interval of its linear part, (part − share · whole) / mean(whole) of one less that of the other, so that what texts have in
        common drops out. Withheld where one of the shares is.
    """
    values = np.stack([np.asarray(each, dtype=np.float64) for each in (*one, *other)])
    values = values[:, ~np.isnan(values).any(0)]
    shares = [share_of(values[at], values[at + 1], absent=absent, positive=positive, unit=unit, level=level) for at in (0, 2)]
    n = values.shape[1]
    if withheld := next((share.withheld for share in shares if share.withheld), ""):
        return Share(np.nan, np.nan, np.nan, n, withheld)
    first, second = ((values[at] - share.value * values[at + 1]) / values[at + 1].mean() for at, share in zip((0, 2), shares, strict=True))
    value = shares[0].value - shares[1].value
    half = distributions.t.ppf((1 + level) / 2, n - 1) * (first - second).std(ddof=1) / np.sqrt(n)
    return Share(value, value - half, value + half, n, "")


def _centred(values: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's mean over the texts that count, and their deviations from it, 0 elsewhere."""
    mean = np.where(counted, values, 0.0).sum(1) / np.maximum(counted.sum(1), 1)
    return mean, np.where(counted, values - mean[:, None], 0.0)


def _written(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")
