"""Verdicts on what carries an improvement: tuned models that are worse or no better, selections that are one random set more, and planted ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from mechscope.causal import Effects
from mechscope.stats.inference import rank_p
from mechscope.stats.shares import share_of, shares_of
from mechscope.studies.calibration.truth import Truth
from mechscope.studies.causal import layer_sets, layer_sets_table
from mechscope.studies.paper_2505_17073.circuits import SIZE, few_edges_carry_gain
from mechscope.studies.paper_2505_17073.interventions import heads_matter, layers_carry
from mechscope.studies.paper_2505_17073.judgement import Scope
from mechscope.subject import Components

_TEXTS, _SETS = 24, 40
_DECIDED = ("supported", "contradicted")
# what a claim that presupposes an improvement may not say where fine-tuning surely made the loss higher
_ANYTHING = (*_DECIDED, "undecided", "no change")


def _gained(seed: int, gain: float, more: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss that each set gains on each text, ``(set, text)``, the selected set first, and the whole gain of each text.

    Args:
        seed: Of the draw.
        gain: Mean loss gained by fine-tuning; texts differ as much as they did on measured losses.
        more: By how much of the gain the selected set carries more than the sets' mean; sets differ, a few of them much.
    """
    random = np.random.default_rng(seed)
    whole = gain + 0.25 * (random.gamma(4.0, 1.0, _TEXTS) - 4.0) / 2.0
    shares = 0.2 * random.lognormal(0.0, 0.6, _SETS + 1)
    shares[0] += more
    return shares[:, None] * whole + 0.02 * random.normal(size=(_SETS + 1, _TEXTS)), whole


def _layers(seed: int, *, gain: float, more: float) -> str:
    gains, whole = _gained(seed, gain, more)
    base = np.full(_TEXTS, 3.5)
    effects = Effects(pd.DataFrame({"component": [str(at) for at in range(len(gains))], "site": "set"}), base - gains, base)
    return layers_carry({"layer_sets": layer_sets_table(effects, base - whole)}, Scope()).verdict


def _neighbours(seed: int) -> str:
    """Judge layers of which neighbours carry more together, chosen as a long and a short run whatever they carry, as selections often are."""
    random, n_layers = np.random.default_rng(seed), 24
    _, whole = _gained(seed, 0.3, 0.0)
    places = np.sort(random.choice(20, 2, replace=False))
    chosen = [*range(places[0], places[0] + 3), *range(places[1] + 3, places[1] + 5)]
    sets = [sorted(each.layers) for each in layer_sets(Components.of_layers(chosen), n_layers, seed=seed)]
    own = 0.03 * random.lognormal(0.0, 0.6, n_layers)
    shares = np.array([own[each].sum() + 0.1 * (np.diff(each) == 1).sum() for each in sets])
    gains = shares[:, None] * whole + 0.02 * random.normal(size=(len(sets), _TEXTS))
    base = np.full(_TEXTS, 3.5)
    effects = Effects(pd.DataFrame({"component": [str(each) for each in sets], "site": "set"}), base - gains, base)
    return layers_carry({"layer_sets": layer_sets_table(effects, base - whole)}, Scope()).verdict


def _heads(seed: int, *, gain: float, more: float) -> str:
    gains, whole = _gained(seed, gain, more)
    costs = np.abs(gains.mean(1))
    more_than, less_than = rank_p(costs[0], costs[1:])
    table = pd.DataFrame({"kind": ["selected", *["random"] * _SETS], "effect": costs, "p_random": more_than, "p_less": less_than})
    table["withheld"] = share_of(whole, whole, absent="fine-tuning did not lower the loss on these summaries", positive=True).withheld
    return heads_matter({"ablation": table}, Scope()).verdict


def _edges(seed: int, *, gain: float, more: float) -> str:
    gains, whole = _gained(seed, gain, more)
    share = shares_of(gains, whole, positive=True)
    more_than, less_than = rank_p(share.value[0], share.value[1:])
    random = share.value[1:]
    row: dict[str, Any] = {
        "fraction": SIZE,
        "random_sets": _SETS,
        "withheld": share.withheld[0],
        "p_random": more_than,
        "p_less": less_than,
    }
    tuned = row | {"kind": "tuned", "share": share.value[0], "low": share.low[0], "high": share.high[0]}
    band = row | {"kind": "random", "share": random.mean(), "low": np.quantile(random, 0.025), "high": np.quantile(random, 0.975)}
    judgement = few_edges_carry_gain({"circuit_gain": pd.DataFrame([tuned, band])}, Scope())
    return "not measured" if judgement is None else judgement.verdict


_CLAIMS = {"layers_carry_improvement": _layers, "selected_heads_matter": _heads, "few_edges_carry_gain": _edges}
_NULLS: tuple[tuple[str, float, float, tuple[str, ...]], ...] = (
    ("tuned is worse than base", -0.3, 0.5, _ANYTHING),
    ("fine-tuning changed no loss, the selection is outstanding", 0.0, 2.0, _DECIDED),
    ("the selection is one random set more", 0.3, 0.0, _DECIDED),
)
TRUTHS: tuple[Truth, ...] = (
    Truth(
        claim="layers_carry_improvement",
        world="neighbouring layers carry more together, and the selection is one more set of neighbours",
        kind="null",
        draw=_neighbours,
        unit="document",
        wrong=_DECIDED,
        small=100,
    ),
    *(
        Truth(claim=claim, world=world, kind="null", draw=partial(draw, gain=gain, more=more), unit="document", wrong=wrong, small=100)
        for world, gain, more, wrong in _NULLS
        for claim, draw in _CLAIMS.items()
    ),
    *(
        Truth(
            claim=claim,
            world=f"the selection carries {more:.0%} of the gain more than others",
            kind="planted",
            draw=partial(draw, gain=0.3, more=more),
            unit="document",
            size=more,
            right=("supported",),
            small=40,
            full=500,
        )
        for more in (0.2, 0.5, 1.0)
        for claim, draw in _CLAIMS.items()
    ),
)
