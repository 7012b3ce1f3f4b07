"""Methods of circuit discovery, judged by models whose circuit is known.

A method ranks edges by |score|. Judged are the ranking (AUROC: how often a true edge stands above another; precision among as many edges as the circuit has,
which is also the recall there) and how well circuits of rising size keep the behaviour (CPR and CMD of MIB, Mueller et al. 2025), on texts that edges
were not scored on. Edges of equal score are in random order: the expectation over these is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from mechscope.circuits import Circuit, auroc, discover, faithfulness_curve
from mechscope.data.pairs import Pairs
from mechscope.groundtruth.programs import GroundTruth
from mechscope.instrument import Execution, load

# among few edges each is more than a thousandth of all: sizes from a fiftieth on
_FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_LEAST = 0.01


def benchmark_methods(
    truths: Mapping[str, GroundTruth],
    methods: Sequence[str],
    *,
    pairs: int = 40,
    steps: int = 5,
    pruning_steps: int = 200,
    draws: int = 1000,
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Score the edges of every model by every method and compare them with the known circuit.

    Args:
        truths: Models by what a table calls them.
        methods: Of `mechscope.circuits.discovery.DISCOVERIES`.
        pairs: Prompt pairs that edges are scored on; as many others judge faithfulness.
        steps: Points of integrated gradients.
        pruning_steps: Steps of edge pruning, which keeps as many edges as the circuit has.
        draws: Random orders of the edges, for what chance reaches.
        execution: Tokens of a batch, seed (of texts, random orders and methods that draw), progress.

    Returns:
        One row per model and method: `program`, `method`, `circuit` (edges of the known circuit), `edges` (of the model), `n` (pairs scored on), `auroc`,
        `auroc_chance` (97.5 % quantile over random orders), `precision`, `found` (the precision is 1), `cpr`, `cmd`, and `forward`, `backward` (passes).
    """
    rows: list[dict[str, Any]] = []
    for model, truth in truths.items():
        subject, texts = load(truth.program.model(), tokenizer=truth.tokenizer()), truth.pairs(2 * pairs, seed=execution.seed)
        scored_on, judged_on = texts.first(pairs), Pairs(texts.pairs[pairs:], texts.source)
        circuit = truth.program.circuit
        chance = chance_auroc(circuit, draws, seed=execution.seed)
        for method in methods:
            execution.told("judging methods", len(rows), len(truths) * len(methods))
            # the sweep is over models and methods: what one of them does would jump back and forth
            quiet = replace(execution, progress=None)
            scores = discover(
                subject,
                scored_on,
                method=method,
                steps=steps,
                pruning_steps=pruning_steps,
                fraction=max(_LEAST, float(circuit.edges.mean())),
                execution=quiet,
            )
            curve = faithfulness_curve(subject, judged_on, scores, fractions=_FRACTIONS, random=0, execution=quiet)
            precision = precision_at_size(np.abs(scores.mean), circuit.edges)
            rows.append(
                {
                    "program": model,
                    "method": method,
                    "circuit": len(circuit),
                    "edges": len(circuit.graph),
                    "n": len(scored_on),
                    "auroc": auroc(scores, circuit),
                    "auroc_chance": chance,
                    "precision": precision,
                    "found": precision == 1,
                    "cpr": curve.cpr.value,
                    "cmd": curve.cmd.value,
                    "forward": scores.cost.forward,
                    "backward": scores.cost.backward,
                }
            )
    return pd.DataFrame(rows)


def precision_at_size(strength: Float[np.ndarray, " edge"], truth: Bool[np.ndarray, " edge"]) -> float:
    """Return the share of true edges among the strongest, as many as there are true ones; of equal ones the expectation over their orders.

    Args:
        strength: |score| of every edge; NaN, where it was not scored, is weakest.
        truth: The edges that are known to matter.
    """
    strength, size = np.where(np.isnan(strength), -1.0, strength), int(truth.sum())
    last = np.sort(strength)[::-1][size - 1]
    above, level = strength > last, strength == last
    hits = (truth & above).sum() + (size - above.sum()) * truth[level].mean()
    return float(hits / size)


def chance_auroc(circuit: Circuit, draws: int, *, seed: int = 0) -> float:
    """Return the AUROC that one random order of the edges in forty exceeds."""
    rng, inside = np.random.default_rng(seed), int(circuit.edges.sum())
    others = len(circuit.edges) - inside
    ranks = np.stack([rankdata(rng.random(inside + others))[:inside].sum() for _ in range(draws)])
    return float(np.quantile((ranks - inside * (inside + 1) / 2) / (inside * others), 0.975))
