"""Coverage of the intervals over texts, by their number: shares of a whole, areas of curves, mean scores, mean losses and rank correlations.

The losses gained are those of a small GPT-2 (7 million parameters) fine-tuned for sixty steps to summarize, on 450 documents of three corpora: their
moments and the slope of what two of its six layers carry on the whole, corpus by corpus, are copied here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from mechscope.circuits.evaluation import Evaluated, areas
from mechscope.circuits.scores import Cost
from mechscope.stats.bootstrap import mean_interval
from mechscope.stats.inference import paired_difference, rank_correlation
from mechscope.stats.shares import share_of
from mechscope.studies.calibration.truth import Truth

SIZES = (8, 16, 32, 64)

# per corpus: documents, mean and SD of the loss gained, and slope, intercept and residual SD of what two layers carry of it
_CORPORA = ((200, 0.441, 0.199, 0.327, 0.053, 0.033), (150, 0.064, 0.102, 0.305, 0.022, 0.020), (100, 0.038, 0.079, 0.301, 0.016, 0.017))
_DOCUMENTS, _GAINS, _SPREADS, _SLOPES, _OFFSETS, _REST = (np.array(column) for column in zip(*_CORPORA, strict=True))
_WEIGHTS = _DOCUMENTS / _DOCUMENTS.sum()
# fractions of a curve, and the true faithfulness at each
_AT = np.array([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
_FAITHFUL = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0])

Drawn = tuple[np.ndarray, np.ndarray]
World = Callable[[np.random.Generator, int], Drawn]


def _measured(random: np.random.Generator, n: int) -> Drawn:
    """Return what two layers carry and the whole gain, per document of the three corpora together."""
    corpus = random.choice(len(_WEIGHTS), n, p=_WEIGHTS)
    # as skewed as measured: a gamma variable with four times as much mean as variance
    gain = _GAINS[corpus] + _SPREADS[corpus] * (random.gamma(4.0, 1.0, n) - 4.0) / 2.0
    return _OFFSETS[corpus] + _SLOPES[corpus] * gain + _REST[corpus] * random.normal(size=n), gain


_MEASURED_SHARE = float(_WEIGHTS @ (_OFFSETS + _SLOPES * _GAINS) / (_WEIGHTS @ _GAINS))


def _lognormal(random: np.random.Generator, n: int) -> Drawn:
    whole = random.lognormal(0.0, 1.0, n)
    return whole * random.beta(3, 2, n), whole


def _heavy(random: np.random.Generator, n: int) -> Drawn:
    whole = 1.0 + random.standard_t(3, n)
    return 0.6 * whole + 0.5 * random.standard_t(3, n), whole


def _logits(random: np.random.Generator, n: int) -> Drawn:
    whole = 4.0 + 2.0 * random.normal(size=n)
    return 0.8 * whole + 0.5 * random.standard_t(5, n), whole


def _inside(low: float, high: float, true: float) -> str:
    return "withheld" if np.isnan(low) or np.isnan(high) else "inside" if low <= true <= high else "outside"


def _share(seed: int, *, world: World, true: float, n: int) -> str:
    part, whole = world(np.random.default_rng(seed), n)
    share = share_of(part, whole, positive=True)
    return _inside(share.low, share.high, true)


def _area(seed: int, *, which: int, n: int) -> str:
    """Draw a curve whose sizes share their texts, so that their noise goes together."""
    random = np.random.default_rng(seed)
    whole = 2.0 * random.lognormal(0.0, 0.5, n)
    noise = 0.8 * random.normal(size=n) + 0.6 * random.normal(size=(len(_AT), n))
    noise[-1] = 0.0
    evaluated = Evaluated((_FAITHFUL[:, None] + 0.2 * noise) * whole, whole, np.zeros(n), "logit-diff", Cost(0, 0))
    area = areas(_AT, evaluated, np.zeros((0, len(_AT))))[which]
    true = np.trapezoid((_FAITHFUL, 1 - _FAITHFUL)[which], _AT) / (_AT[-1] - _AT[0])
    return _inside(area.low, area.high, float(true))


def _rouge(seed: int, *, kind: str, n: int) -> str:
    """Draw scores as ROUGE has them: ROUGE-1 nearly symmetric, ROUGE-2 with a quarter of zeros, differences of two models' ROUGE-L."""
    random = np.random.default_rng(seed)
    if kind == "ROUGE-1":
        scores, true = random.beta(4, 12, n), 0.25
    elif kind == "ROUGE-2":
        scores, true = random.beta(1.2, 12, n) * (random.random(n) > 0.25), 0.75 * 1.2 / 13.2
    else:
        shared = random.beta(3, 12, n)
        scores, true = np.clip(shared + 0.05 * random.normal(size=n), 0, 1) - shared + 0.02, 0.02
    mean = mean_interval(scores, seed=seed % 4)
    return _inside(mean.low, mean.high, true)


def _effect(seed: int, *, drawn: Callable[[np.random.Generator, int], np.ndarray], true: float, n: int) -> str:
    mean = paired_difference(drawn(np.random.default_rng(seed), n), np.zeros(n))
    return _inside(float(mean.low), float(mean.high), true)


def _correlation(seed: int, *, true: float, n: int) -> str:
    random = np.random.default_rng(seed)
    x = random.normal(size=n)
    y = true * x + np.sqrt(1 - true**2) * random.normal(size=n)
    found = rank_correlation(x, y)
    # Spearman's correlation of a normal pair
    return _inside(found.low, found.high, 6 / np.pi * np.arcsin(true / 2))


def _coverage(claim: str, world: str, unit: str, draw: Callable[..., str]) -> list[Truth]:
    return [Truth(claim=claim, world=world, kind="coverage", unit=unit, size=n, draw=partial(draw, n=n), small=60) for n in SIZES]


_SHARES: tuple[tuple[str, World, float], ...] = (
    ("measured losses of three corpora", _measured, _MEASURED_SHARE),
    ("lognormal gains, σ = 1", _lognormal, 0.6),
    ("heavy-tailed gains, t with 3 degrees of freedom", _heavy, 0.6),
    ("logit differences", _logits, 0.8),
)
_EFFECTS: tuple[tuple[str, Callable[[np.random.Generator, int], np.ndarray], float], ...] = (
    ("measured losses of three corpora", lambda random, n: _measured(random, n)[1], float(_WEIGHTS @ _GAINS)),
    ("exponential", lambda random, n: random.exponential(size=n), 1.0),
    ("log-normal with σ = .7", lambda random, n: random.lognormal(0.0, 0.7, n), float(np.exp(0.245))),
    ("t with 3 degrees of freedom", lambda random, n: random.standard_t(3, n), 0.0),
    ("normal", lambda random, n: random.normal(size=n), 0.0),
)
TRUTHS: tuple[Truth, ...] = (
    *(
        truth
        for world, drawn, true in _SHARES
        for truth in _coverage(
            "share of the gain (faithfulness)", f"{world}, share {true:.2g}", "document", partial(_share, world=drawn, true=true)
        )
    ),
    *_coverage("CPR", "faithfulness from 0 to 1, noise shared by sizes", "prompt pair", partial(_area, which=0)),
    *_coverage("CMD", "faithfulness from 0 to 1, noise shared by sizes", "prompt pair", partial(_area, which=1)),
    *_coverage("mean ROUGE", "ROUGE-1", "document", partial(_rouge, kind="ROUGE-1")),
    *_coverage("mean ROUGE", "ROUGE-2, a quarter of zeros", "document", partial(_rouge, kind="ROUGE-2")),
    *_coverage("difference in ROUGE", "paired, ROUGE-L", "document", partial(_rouge, kind="difference")),
    *(
        truth
        for world, drawn, true in _EFFECTS
        for truth in _coverage("mean effect on a metric", world, "document", partial(_effect, drawn=drawn, true=true))
    ),
    *_coverage("rank correlation", "normal pairs, .5", "head", partial(_correlation, true=0.5)),
)
