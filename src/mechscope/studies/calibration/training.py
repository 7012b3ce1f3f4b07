"""Verdicts on placements of LoRA: bake-offs whose arms differ by their seeds alone, by documents, at the margin, and by planted effects."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd

from mechscope.adapt.arms import Arm
from mechscope.adapt.comparison import Outcome, steps_to, summary_table
from mechscope.choices import Strategy
from mechscope.data.rouge import METRICS
from mechscope.stats.crossed import MIN_DOCUMENTS
from mechscope.studies.calibration.truth import Truth
from mechscope.studies.paper_2505_17073.judgement import Scope
from mechscope.studies.paper_2505_17073.training import fewer_steps, versus_random, versus_standard

SEEDS = (2, 3, 4, 5, 8, 12)
_PROTOCOL: Literal["equal_rank"] = "equal_rank"
_DECIDED = ("supported", "contradicted")
_ARMS: tuple[Strategy, ...] = ("targeted_layers", "standard", "random_layers")
# as many as a bake-off summarises by default
_DOCUMENTS = 100
# how much arms' means differ between seeds, how much a document's score does within an arm, and how ill a placement may suit a document
_BETWEEN, _WITHIN, _BY_DOCUMENT = 0.004, 0.05, 0.04

# what a placement does to a document, beside its mean effect, in units of its spread
_EFFECTS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "t": lambda random, n: random.standard_t(4, n),
    "exponential": lambda random, n: random.exponential(size=n) - 1,
    "log-normal with σ = 1": lambda random, n: (random.lognormal(0.0, 1.0, n) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e),
    "t with 3 degrees of freedom": lambda random, n: random.standard_t(3, n) / np.sqrt(3),
    "on one document in ten": lambda random, n: _rare(random, n, 0.1),
    "on one document in twenty": lambda random, n: _rare(random, n, 0.05),
    "exponential on one document in ten": lambda random, n: (random.exponential(size=n) * (random.random(n) < 0.1) - 0.1) / np.sqrt(0.19),
    "unequal": lambda random, n: np.zeros(n),
}


def _rare(random: np.random.Generator, n: int, share: float) -> np.ndarray:
    """Return effects that a share of the documents has, all alike, centred and in units of their spread."""
    return ((random.random(n) < share) - share) / np.sqrt(share * (1 - share))


# those that only one placement has
_SKEWED = tuple(shape for shape in _EFFECTS if shape not in ("t", "unequal"))


def _bakeoff(seed: int, seeds: int, better: float, by_document: float, shape: str = "t", n: int = _DOCUMENTS) -> pd.DataFrame:
    """Return the summary of a bake-off in which targeted layers are better by `better`."""
    random = np.random.default_rng(seed)
    documents = random.beta(4, 12, n)
    outcomes = []
    for strategy in _ARMS:
        targeted = strategy == "targeted_layers"
        # only one placement suits a few documents very well, so that differences are skewed
        effects = _EFFECTS[shape](random, n) if shape == "t" or targeted else 0.0
        suits = by_document * effects + (better if targeted else 0.0)
        noisier = 4.0 if shape == "unequal" and targeted else 1.0
        for at in range(seeds):
            scores = documents + suits + noisier * (_BETWEEN * random.normal() + _WITHIN * random.normal(size=n))
            rouge = pd.DataFrame(dict.fromkeys(METRICS, scores))
            outcomes.append(Outcome(Arm(_PROTOCOL, strategy, at, "", None), {}, pd.DataFrame(), rouge, ()))
    return summary_table(outcomes)


def _rouge(
    seed: int, *, against: str, seeds: int, better: float, by_document: float = 0.0, shape: str = "t", documents: int = _DOCUMENTS
) -> str:
    tables = {"bakeoff_summary": _bakeoff(seed, seeds, better, by_document, shape, documents)}
    judge = versus_standard if against == "standard" else versus_random
    return judge(tables, Scope(), protocol=_PROTOCOL).verdict


def _steps(seed: int, *, seeds: int, faster: float, worse: float) -> str:
    """Judge steps by learning curves that fall exponentially, rise again by overfitting, and differ by seed in level and pace."""
    random, steps = np.random.default_rng(seed), np.arange(0, 201, 10)
    curves: list[pd.DataFrame] = []
    arms: list[dict[str, Any]] = []
    for at in range(seeds):
        own = {}
        for strategy in ("standard", "targeted_layers"):
            targeted = strategy == "targeted_layers"
            pace = 40 * np.exp(0.2 * random.normal()) / (faster if targeted else 1.0)
            overfit = 0.0004 * np.maximum(steps - 120 * np.exp(0.3 * random.normal()), 0)
            level = 3 + 0.005 * random.normal() + (worse if targeted else 0.0)
            losses = level + np.exp(-steps / pace) + overfit + 0.001 * random.normal(size=len(steps))
            own[strategy] = pd.DataFrame(
                {"protocol": _PROTOCOL, "strategy": strategy, "seed": at, "step": steps, "validation_loss": losses}
            )
        goal = float(own["standard"]["validation_loss"].min())
        for strategy, curve in own.items():
            best = int(curve["validation_loss"].to_numpy().argmin())
            arm: dict[str, Any] = {"protocol": _PROTOCOL, "strategy": strategy, "seed": at, "best_loss": curve["validation_loss"].min()}
            arms.append(arm | {"best_step": steps[best], "steps_to_standard_best": steps_to(curve, goal), "converged": True})
        curves += own.values()
    tables = {"bakeoff": pd.DataFrame(arms), "learning_curves": pd.concat(curves)}
    return fewer_steps(tables, Scope(), protocol=_PROTOCOL).verdict


def _truth(claim: str, world: str, draw: partial[str], **known: Any) -> Truth:
    return Truth(claim=f"{claim}.{_PROTOCOL}", world=world, draw=draw, unit="training", small=30, full=1000, **known)


TRUTHS: tuple[Truth, ...] = (
    *(
        _truth(
            "targeted_vs_random",
            f"arms differ by seed alone, {n} seeds",
            partial(_rouge, against="random", seeds=n, better=0.0),
            kind="null",
            wrong=_DECIDED,
        )
        for n in SEEDS
    ),
    *(
        _truth(
            "targeted_vs_random",
            f"placements suit documents differently, none better, {n} seeds",
            partial(_rouge, against="random", seeds=n, better=0.0, by_document=_BY_DOCUMENT),
            kind="null",
            wrong=_DECIDED,
        )
        for n in (3, 5, 12)
    ),
    *(
        _truth(
            "targeted_vs_random",
            f"one placement suits some documents better and is no better, effects {shape}, {documents} documents, {n} seeds",
            partial(_rouge, against="random", seeds=n, better=0.0, by_document=2 * _BY_DOCUMENT, shape=shape, documents=documents),
            kind="null",
            wrong=_DECIDED,
        )
        for shape in _SKEWED
        for documents in (MIN_DOCUMENTS, _DOCUMENTS)
        for n in (3, 12)
    ),
    *(
        _truth(
            "targeted_vs_random",
            f"one placement varies four times as much over seeds and documents, {n} seeds",
            partial(_rouge, against="random", seeds=n, better=0.0, shape="unequal"),
            kind="null",
            wrong=_DECIDED,
        )
        for n in (3, 5)
    ),
    *(
        _truth(
            "targeted_vs_standard",
            f"worse by exactly the margin, {n} seeds",
            partial(_rouge, against="standard", seeds=n, better=-Scope().margin),
            kind="null",
            wrong=_DECIDED,
        )
        for n in (2, 3, 5)
    ),
    *(
        _truth(
            "fewer_steps",
            f"arms differ by seed alone, {n} seeds",
            partial(_steps, seeds=n, faster=1.0, worse=0.0),
            kind="null",
            wrong=_DECIDED,
        )
        for n in (2, 3, 5, 8)
    ),
    *(
        _truth(
            "targeted_vs_random",
            f"better by {100 * better:g} points, {n} seeds",
            partial(_rouge, against="random", seeds=n, better=better),
            kind="planted",
            size=better,
            right=("supported",),
        )
        for better in (0.01, 0.02)
        for n in (3, 5)
    ),
    *(
        _truth(
            "fewer_steps",
            f"twice as fast, {n} seeds",
            partial(_steps, seeds=n, faster=2.0, worse=-0.02),
            kind="planted",
            size=2.0,
            right=("supported",),
        )
        for n in (3, 5)
    ),
    _truth(
        "fewer_steps",
        "ends at a higher loss, 3 seeds",
        partial(_steps, seeds=3, faster=1.0, worse=0.05),
        kind="planted",
        size=0.05,
        right=("contradicted",),
    ),
)
