"""How well an explanation tells where a unit is active, on windows that it was not made of.

detection   Is the unit active in this window? Balanced accuracy: the mean of the share right of windows in which it is, and of those in which it is not
fuzzing     Are the marked tokens those in which it is active? Right marks are its active tokens; wrong ones are as many, on average, at random in windows in
            which it is silent. Balanced accuracy
simulation  Which activation in each token? Pearson's correlation with the true ones over the tokens of all windows
intruder    In which of five windows is it silent? The share right

The first two and the last of Paulo et al. (2024), "Automatically interpreting millions of features in large language models" (the intruder of a later
version); simulation of Bills et al. (2023), "Language models can explain neurons in language models". What has no readable answer counts as wrong (in a
simulation as silent everywhere), and how often that was stands beside the score: left out, it would flatter an explainer that answers only what is easy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mechscope.choices import ExplanationScorer
from mechscope.features.explain.evidence import Evidence, Explainer, Explanation, Window
from mechscope.stats.inference import balanced_accuracy, share_interval

# windows among which an intruder is sought
_AMONG = 5
CHANCE: dict[ExplanationScorer, float] = {"detection": 0.5, "fuzzing": 0.5, "simulation": 0.0, "intruder": 1 / _AMONG}
"""What guessing scores."""
# windows of a kind below which nothing is scored
FEWEST = 5


@dataclass(frozen=True)
class Score:
    """What an explanation scored.

    Attributes:
        scorer: By what.
        n: Answers that were asked for.
        value: The score; NaN where withheld.
        low: Lower end of its interval, from Wilson's of the shares (combined by MOVER, Zou and Donner 2008); NaN for a simulation, whose tokens are no
            independent observations.
        high: Upper end.
        unreadable: Share of the answers that could not be read.
        withheld: Why there is no score; empty where there is one.
    """

    scorer: ExplanationScorer
    n: int
    value: float
    low: float
    high: float
    unreadable: float
    withheld: str = ""


def score(
    explainer: Explainer, explanation: Explanation, evidence: Evidence, scorers: Sequence[ExplanationScorer], *, seed: int = 0
) -> list[Score]:
    """Score an explanation on a unit's held-out windows.

    Args:
        explainer: Who judges windows by it.
        explanation: The explanation, of this unit or, as a control, of another.
        evidence: The unit's windows.
        scorers: By what.
        seed: Of the order of windows, of wrong marks, and of which windows stand together.
    """
    active, silent = evidence.test, evidence.test_silent
    short = [f"{len(own)} windows in which it is {name}" for own, name in ((active, "active"), (silent, "silent")) if len(own) < FEWEST]
    if short:
        nan = float("nan")
        reason = f"too few held-out windows: {', '.join(short)}, of at least {FEWEST}"
        return [Score(each, 0, nan, nan, nan, nan, reason) for each in scorers]
    random = np.random.default_rng([seed, *evidence.unit.encode()])
    order = random.permutation(len(active) + len(silent))
    windows = [(*active, *silent)[at] for at in order]
    truth = [bool(at < len(active)) for at in order]
    found = []
    for scorer in scorers:
        match scorer:
            case "detection":
                found.append(_balanced(scorer, truth, explainer.detect(explanation, windows)))
            case "fuzzing":
                count = math.ceil(float(np.mean([len(window.active) for window in active])))
                marks = [
                    list(window.active) if right else sorted(random.permutation(len(window.ids))[:count].tolist())
                    for window, right in zip(windows, truth, strict=True)
                ]
                found.append(_balanced(scorer, truth, explainer.fuzz(explanation, windows, marks)))
            case "simulation":
                found.append(_simulated(windows, explainer.simulate(explanation, windows)))
            case "intruder":
                found.append(_intruders(explainer, explanation, active, silent, random))
    return found


def _balanced(scorer: ExplanationScorer, truth: Sequence[bool], answers: Sequence[bool | None]) -> Score:
    right = [answer is kind for answer, kind in zip(answers, truth, strict=True)]
    value, low, high = balanced_accuracy(right, truth)
    unreadable = sum(answer is None for answer in answers) / len(answers)
    return Score(scorer, len(answers), value, low, high, unreadable)


def _simulated(windows: Sequence[Window], answers: Sequence[Sequence[float] | None]) -> Score:
    nan = float("nan")
    true = np.concatenate([window.values for window in windows])
    predicted = np.concatenate([np.zeros(len(window.ids)) if one is None else one for window, one in zip(windows, answers, strict=True)])
    # what never varies tells nothing
    value = float(np.corrcoef(true, predicted)[0, 1]) if np.ptp(predicted) > 0 else 0.0
    return Score("simulation", len(windows), value, nan, nan, sum(answer is None for answer in answers) / len(answers))


def _intruders(
    explainer: Explainer, explanation: Explanation, active: Sequence[Window], silent: Sequence[Window], random: np.random.Generator
) -> Score:
    right = unreadable = 0
    for intruder in silent:
        chosen = [active[at] for at in random.permutation(len(active))[: _AMONG - 1]]
        place = int(random.integers(_AMONG))
        answer = explainer.intrude(explanation, [*chosen[:place], intruder, *chosen[place:]])
        right += answer == place
        unreadable += answer is None
    low, high = share_interval(right, len(silent))
    return Score("intruder", len(silent), right / len(silent), low, high, unreadable / len(silent))
