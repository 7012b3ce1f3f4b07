"""Statements about fine-tuning, with the training as the unit: a number of each training, compared with the same number of control trainings.

Heads and documents of one training are not independent observations of what training does: they share its order of examples, its start and its luck. So
each training gives one number, a share, and groups of trainings are compared by Student's t, both with one variance for all and with one for each group
(Welch 1947); the wider interval counts, since either alone decides too often (up to 7 % and 29 % of exchangeable trainings). The scale is the probit: where
the heads of a training move together, shares pile up at none and all, on which no t interval holds, and their probits stay normal. `mechscope calibrate`
repeats the simulation. A rank test could not decide: among so few trainings its smallest p is above 5 %.

One tuned training is one observation of what fine-tuning does, however many controls there are: nothing is decided about fine-tuning. Against noise, drawn
anew at will, the tuned model is compared by a prediction interval, and only "this is not noise of the same size" follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from mechscope.studies.paper_2505_17073.judgement import NAN, Judgement, Scope, Tables, verdict

FEWEST_TUNED = FEWEST_CONTROLS = 3
"""Tuned and control trainings below which nothing is decided about fine-tuning: a spread from two is no spread."""
FEWEST_DRAWS = 5
"""Draws of noise below which nothing is said of it: with fewer, shares of which all heads are alike would be told apart too often."""
# two per cent on each side: where tuned trainings vary five times as much as controls, 2.5 % err in 6 % of cases for 3 against 5 (simulated), and this in 5 %
_QUANTILE = 0.98
# shares nearer to none or all than this are taken for this
_EDGE = 1e-4
# trainings that a sentence proposes at most: beyond, the difference is too small to be worth any
_MOST = 100

Statistic = Callable[[pd.DataFrame, pd.DataFrame], float]
"""One share of a training, from its rows of `control_heads` and `control_layers`."""


@dataclass(frozen=True)
class Trainings:
    """One number of every training.

    Attributes:
        tuned: Of the tuned model and of the same training with other seeds.
        controls: Of control trainings.
        kind: What these are; empty where there are none.
        noise: Of the draws of noise.
        n: Documents that each was measured on.
    """

    tuned: np.ndarray
    controls: np.ndarray
    kind: str
    noise: np.ndarray
    n: int


@dataclass(frozen=True)
class Comparison:
    """Mean of one group of trainings minus another's; NaN where there are too few."""

    difference: float = NAN
    low: float = NAN
    high: float = NAN


def trainings(statistic: Statistic, tables: Tables, scope: Scope) -> Trainings | None:
    """Return a statistic of every training that was measured; None where none was."""
    if not {"controls", "control_heads", "control_layers"} <= tables.keys():
        return None
    models = tables["controls"]
    heads, layers = (tables[name][tables[name]["rows"] == scope.rows] for name in ("control_heads", "control_layers"))
    by_model = [dict(list(table.groupby("control", sort=False))) for table in (heads, layers)]
    number = {name: statistic(*(parts[name] for parts in by_model)) for name in models["control"]}
    values = {kind: np.array([number[name] for name in rows["control"]]) for kind, rows in models.groupby("kind", sort=False)}
    none = np.array([])
    # kinds are not mixed: each has a spread of its own
    kind = next((kind for kind in ("shuffled", "other") if kind in values), "")
    tuned = np.concatenate([values.get(kind, none) for kind in ("tuned", "seed")])
    return Trainings(tuned, values.get(kind, none), kind, values.get("noise", none), int(models["n"].max()))


def compare(tuned: np.ndarray, controls: np.ndarray, *, grain: float = 0.0) -> Comparison:
    """Compare shares of two groups of trainings, by the wider of Student's and Welch's intervals on the probit scale: at least 95 %.

    Args:
        tuned: One share per training.
        controls: One per control training.
        grain: The step between two shares that can be, such as one head of all; 0 where any share can be.
    """
    if len(tuned) < FEWEST_TUNED or len(controls) < FEWEST_CONTROLS or not _spread(np.concatenate([tuned, controls]), grain):
        return Comparison()
    ours, theirs = _probit(tuned, grain), _probit(controls, grain)
    n = np.array([len(ours), len(theirs)])
    variance = np.array([max(group.std(ddof=1), _hidden(group, grain)) ** 2 for group in (ours, theirs)])
    part = variance / n
    pooled = float(((n - 1) * variance).sum() / (n - 1).sum())
    student = stats.t.ppf(_QUANTILE, n.sum() - 2) * np.sqrt(pooled * (1 / n).sum())
    degrees = part.sum() ** 2 / (part**2 / (n - 1)).sum() if part.sum() > 0 else n.min() - 1
    width = max(student, stats.t.ppf(_QUANTILE, degrees) * np.sqrt(part.sum()))
    return _as_shares(ours.mean() - theirs.mean(), width, theirs.mean())


def beyond(value: float, draws: np.ndarray, *, grain: float = 0.0) -> Comparison:
    """Compare one share with draws from a null by a prediction interval of Student's t on the probit scale, at least 95 %; arguments as for `compare`."""
    k = len(draws)
    if k < FEWEST_DRAWS or not _spread(np.append(draws, value), grain):
        return Comparison()
    ours, theirs = _probit(np.array([value]), grain), _probit(draws, grain)
    spread = max(theirs.std(ddof=1), _hidden(theirs, grain)) * np.sqrt(1 + 1 / k)
    return _as_shares(ours.mean() - theirs.mean(), stats.t.ppf(_QUANTILE, k - 1) * spread, theirs.mean())


def _spread(shares: np.ndarray, grain: float) -> bool:
    """Tell whether shares can be compared: all measured, and where any share can be, none so near to none or all that its distance is cut off."""
    if not np.isfinite(shares).all():
        return False
    return grain > 0 or bool(np.ptp(shares) > 1e-9 and shares.min() > _EDGE and shares.max() < 1 - _EDGE)


def _probit(shares: np.ndarray, grain: float) -> np.ndarray:
    """Return shares on the scale on which heads that move together leave a training's number normal; none and all of the heads are finite."""
    inside = (shares + grain / 2) / (1 + grain)
    return np.asarray(stats.norm.ppf(np.clip(inside, _EDGE, 1 - _EDGE)))


def _hidden(probits: np.ndarray, grain: float) -> float:
    """Return the least spread that a group is taken to have: half a step where it lies, which equal shares hide."""
    return float(grain / 2 / stats.norm.pdf(probits.mean()))


def _as_shares(difference: float, width: float, of_controls: float) -> Comparison:
    """Turn a difference on the probit scale into one of shares: that of typical trainings, the controls' being where it is."""
    ends = stats.norm.cdf(of_controls + difference + np.array([0.0, -width, width])) - stats.norm.cdf(of_controls)
    return Comparison(*map(float, ends))


def about_fine_tuning(
    judgement: Judgement, found: Trainings | None, say: Callable[[float], str], *, grain: float = 0.0, holds: Callable[[float], bool]
) -> Judgement:
    """Judge a statement about fine-tuning: its number is larger than in control trainings.

    Args:
        judgement: What is said of the two models alone, with the interval over documents.
        found: The number of every training.
        say: Writes a number.
        grain: As for `compare`.
        holds: What the tuned trainings' mean must fulfil besides to support the statement.

    Returns:
        The judgement of the two models, undecided, where there are too few trainings; else value and interval are those of the difference.
    """
    if found is None or not len(found.controls):
        others = f" {_listed('Other seeds', found.tuned[1:], say)}" if found is not None and len(found.tuned) > 1 else ""
        return judgement.replaced(
            verdict="undecided",
            note=f"Undecided: no control. The interval is over documents and about these two models only.{others} {judgement.note}".strip(),
            overturn=f"Control trainings: {_wanted(0 if found is None else len(found.tuned), 0)}.",
        )
    measured = f"{judgement.measured} {_listed(f'On {found.n} documents, tuned', found.tuned, say)} {_listed(_KINDS[found.kind], found.controls, say)}"
    compared = compare(found.tuned, found.controls, grain=grain)
    few = len(found.tuned) < FEWEST_TUNED or len(found.controls) < FEWEST_CONTROLS
    if np.isnan(compared.difference) and not few:
        return judgement.replaced(verdict="undecided", measured=measured, note=f"Undecided: {_NO_SPREAD} {judgement.note}".strip())
    if few:
        return judgement.replaced(
            verdict="undecided",
            measured=measured,
            note=f"Undecided: too few trainings. The interval is over documents and about these two models only. {judgement.note}".strip(),
            overturn=f"More trainings: {_wanted(len(found.tuned), len(found.controls))}.",
        )
    decided = verdict(compared.low, compared.high, 0.0)
    if decided == "supported" and not holds(float(found.tuned.mean())):
        decided = "undecided"
    return judgement.replaced(
        measured=measured,
        value=compared.difference,
        low=compared.low,
        high=compared.high,
        verdict=decided,
        unit="training",
        note=f"Value: {len(found.tuned)} tuned trainings minus {len(found.controls)} control trainings (means on the probit scale, as shares); the wider of "
        "Student's and Welch's interval. Documents do not enter it.",
        overturn=_more(found.tuned, found.controls, compared, grain),
    )


def about_noise(judgement: Judgement, found: Trainings | None, say: Callable[[float], str], *, grain: float = 0.0) -> Judgement | None:
    """Judge whether the tuned model's number is one that noise of the same size does not give; None where no noise was drawn."""
    if found is None or not len(found.noise):
        return None
    value = float(found.tuned[0])
    compared = beyond(value, found.noise, grain=grain)
    enough = not np.isnan(compared.difference)
    differs = enough and (compared.low > 0 or compared.high < 0)
    return judgement.replaced(
        measured=f"On {found.n} documents, tuned: {say(value)}. {_listed('Noise of the same size', found.noise, say)}",
        value=compared.difference,
        low=compared.low,
        high=compared.high,
        verdict="supported" if differs else "undecided",
        unit="noise draw",
        note="Value: the tuned model minus the mean of the draws; prediction interval of Student's t on the probit scale. Noise has, matrix by matrix, "
        "the norm of what fine-tuning changed. That this model is not noise says nothing about what it was trained on.",
        overturn="Nothing about fine-tuning hangs on it: control trainings do."
        if differs
        else f"More draws (noise_draws): {len(found.noise)} were made, at least {FEWEST_DRAWS} are needed."
        if len(found.noise) < FEWEST_DRAWS
        else f"Another measurement: {_NO_SPREAD}"
        if not enough
        else "A larger change, or more documents; more draws narrow the interval by little.",
    )


_NO_SPREAD = "the shares are all equal, at none or all, or not measured in some, so they cannot be compared."
_KINDS = {"shuffled": "Trained on shuffled summaries", "other": "Other trainings", "": ""}


def _listed(words: str, values: np.ndarray, say: Callable[[float], str]) -> str:
    return f"{words}: {', '.join(say(float(value)) for value in values)}."


def _wanted(tuned: int, controls: int) -> str:
    """Say which trainings are missing until something can be decided."""
    more_tuned = max(0, FEWEST_TUNED - tuned)
    more_controls = max(0, FEWEST_CONTROLS - controls)
    parts = []
    if more_controls:
        parts.append(f"{more_controls} more on shuffled summaries (mechscope tune --control shuffled)")
    if more_tuned:
        parts.append(f"{more_tuned} more of the same with another seed (--control seed)")
    return f"at least {' and '.join(parts)}, given to --controls"


def _more(tuned: np.ndarray, controls: np.ndarray, compared: Comparison, grain: float) -> str:
    """Say how many trainings of each would decide, if the difference is what it seems."""
    rests = f"{len(tuned)} tuned against {len(controls)} control trainings"
    if compared.low > 0 or compared.high < 0:
        return f"Other trainings: it rests on {rests}."
    ours, theirs = _probit(tuned, grain), _probit(controls, grain)
    spread, apart = np.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / 2), abs(ours.mean() - theirs.mean())
    sizes = np.arange(max(len(tuned), len(controls)) + 1, _MOST)
    enough = sizes[stats.t.ppf(_QUANTILE, 2 * sizes - 2) * spread * np.sqrt(2 / sizes) < apart]
    each = int(enough[0]) if len(enough) else None
    if each is None:
        return f"Hardly more trainings: the difference is within what {rests} differ by among themselves."
    return f"About {each} trainings of each kind, if the difference is what it seems; it rests on {rests}."
