"""Statements about fine-tuning, with the training as the unit: a number of each training, compared with the same number of control trainings.

Heads and documents of one training are not independent observations of what training does: they share its order of examples, its start and its luck. So
each training gives one number, a share, and groups of trainings are compared by Student's t, both with one variance for all and with one for each group
(Welch 1947); the wider interval counts, since either alone decides too often (up to 7 % and 29 % of exchangeable trainings). The scale is the probit:
where the heads of a training move together, shares pile up at none and all, on which no t interval holds, and their probits stay normal. They pile up
there too: where all shares of a group lie at none, or all at all, its spread cannot be seen, and trainings that go far either way are alike by luck, three
of them in one case of four. Six are in one of thirty-two: below, such a group is not compared. Each side has 1 %. Simulated (3 to 8 trainings of each, 24
to 144 heads, one group varying ten times as much as the other): decided in up to 5.2 % of nulls; with 2 % a side, and shares at none and all taken as they
are, in up to 19 %. `mechscope calibrate` repeats some. A rank test could not decide: among so few trainings its smallest p is above 5 %.

One tuned training is one observation of what fine-tuning does, however many controls there are: nothing is decided about fine-tuning. Against noise, drawn
anew at will, the tuned model is compared by a prediction interval that holds all draws, and only "this is not noise of the same size" follows. Simulated
with eight draws: draws in two clusters of any odds are told apart in up to 5.0 % (with five draws and 2 % a side 8.2 %), heavy-tailed ones (Student's t, 3
and 2 degrees of freedom) in 4.4 and 5.2 %, exponential ones in 4.8 %, log-normal ones (σ = 1) in 6.5 %.
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
FEWEST_DRAWS = 8
"""Draws of noise below which nothing is said of it: of seven in two clusters another one is told apart in 5.6 %."""
FEWEST_AT_AN_END = 6
"""Trainings below which a group whose shares are all at none, or all at all, is not compared: so many that go far either way are alike in one case of 32."""
# one per cent on each side, chosen by simulation, see above
_QUANTILE = 0.99
# so near to none or all a share is at the end, or a step of its own where that is more
_AT_AN_END = 0.025
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
    """Compare shares of two groups of trainings, by the wider of Student's and Welch's intervals on the probit scale, 1 % on each side.

    Args:
        tuned: One share per training.
        controls: One per control training.
        grain: The step between two shares that can be, such as one head of all; 0 where any share can be.
    """
    if len(tuned) < FEWEST_TUNED or len(controls) < FEWEST_CONTROLS or not _spread(np.concatenate([tuned, controls]), grain):
        return Comparison()
    if _at_an_end(tuned, grain) or _at_an_end(controls, grain):
        return Comparison()
    ours, theirs = _probit(tuned, grain), _probit(controls, grain)
    n = np.array([len(ours), len(theirs)])
    variance = np.array([max(group.std(ddof=1), _hidden(group, grain)) ** 2 for group in (ours, theirs)])
    part = variance / n
    pooled = float(((n - 1) * variance).sum() / (n - 1).sum())
    student = stats.t.ppf(_QUANTILE, n.sum() - 2) * np.sqrt(pooled * (1 / n).sum())
    degrees = part.sum() ** 2 / (part**2 / (n - 1)).sum() if part.sum() > 0 else n.min() - 1
    width = max(student, stats.t.ppf(_QUANTILE, degrees) * np.sqrt(part.sum()))
    return _as_shares(ours.mean() - theirs.mean(), width, width, theirs.mean())


def beyond(value: float, draws: np.ndarray, *, grain: float = 0.0) -> Comparison:
    """Compare one share with draws from a null by a prediction interval; arguments as for `compare`.

    Student's t on the probit scale, 1 % on each side; no shorter than the draws reach.
    """
    k = len(draws)
    if k < FEWEST_DRAWS or not _spread(np.append(draws, value), grain):
        return Comparison()
    ours, theirs = _probit(np.array([value]), grain), _probit(draws, grain)
    width = stats.t.ppf(_QUANTILE, k - 1) * max(theirs.std(ddof=1), _hidden(theirs, grain)) * np.sqrt(1 + 1 / k)
    # the difference from the highest draw is the lowest one
    down, up = max(width, theirs.max() - theirs.mean()), max(width, theirs.mean() - theirs.min())
    return _as_shares(ours.mean() - theirs.mean(), down, up, theirs.mean())


def _at_an_end(shares: np.ndarray, grain: float) -> bool:
    """Tell whether a group's spread cannot be seen: few trainings, all at none or all at all."""
    near = max(grain, _AT_AN_END) + 1e-9
    return len(shares) < FEWEST_AT_AN_END and bool((shares <= near).all() or (shares >= 1 - near).all())


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


def _as_shares(difference: float, down: float, up: float, of_controls: float) -> Comparison:
    """Turn a difference on the probit scale, with its widths, into one of shares: that of typical trainings, the controls' being where it is."""
    ends = stats.norm.cdf(of_controls + difference + np.array([0.0, -down, up])) - stats.norm.cdf(of_controls)
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
        at_an_end = _at_an_end(found.tuned, grain) or _at_an_end(found.controls, grain)
        return judgement.replaced(
            verdict="undecided",
            measured=measured,
            note=f"Undecided: {_ALL_AT_AN_END if at_an_end else _NO_SPREAD} {judgement.note}".strip(),
            overturn=f"At least {FEWEST_AT_AN_END} trainings of that kind." if at_an_end else judgement.overturn,
        )
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
        note="Value: the tuned model minus the mean of the draws; prediction interval of Student's t on the probit scale, no shorter than the draws "
        "reach. Noise has, matrix by matrix, the norm of what fine-tuning changed. That this model is not noise says nothing about what it was trained on.",
        overturn="Nothing about fine-tuning hangs on it: control trainings do."
        if differs
        else f"More draws (noise_draws): {len(found.noise)} were made, at least {FEWEST_DRAWS} are needed."
        if len(found.noise) < FEWEST_DRAWS
        else f"Another measurement: {_NO_SPREAD}"
        if not enough
        else "A larger change, or more documents; more draws narrow the interval by little.",
    )


_NO_SPREAD = "the shares are all equal, at none or all, or not measured in some, so they cannot be compared."
_ALL_AT_AN_END = "the shares of one kind are all at none, or all at all, so their spread cannot be seen in so few trainings."
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
