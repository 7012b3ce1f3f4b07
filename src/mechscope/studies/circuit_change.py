"""What fine-tuning changed in a circuit: which edges two models share, whose scores moved, which tuned edges carry the gain, and all of it over time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import pandas as pd

from mechscope.circuits.change import FEWEST_TEXTS, edge_shift, overlap_table
from mechscope.circuits.choosing import choose
from mechscope.circuits.gain import tuned_edges
from mechscope.circuits.graph import Circuit
from mechscope.circuits.overlap import overlap
from mechscope.circuits.scores import EdgeScores
from mechscope.instrument.execution import Execution
from mechscope.studies.circuit_request import CircuitRequest
from mechscope.studies.circuits import FALLBACK
from mechscope.subject import Pair

log = logging.getLogger(__name__)

# sizes at which two models' circuits are compared and tuned edges are put into the base
OVERLAP_FRACTIONS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
GAIN_FRACTIONS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# random pairs of circuits behind each null
_DRAWS = 200
# of fewer random sets none can be beaten at a two-sided level of .05
_JUDGED_SETS = 40

Circuits = Mapping[str, tuple[EdgeScores, Circuit]]
"""Scores and circuit by label of the model."""


def compare_circuits(
    pair: Pair, circuits: Circuits, request: CircuitRequest, *, execution: Execution = Execution()
) -> dict[str, pd.DataFrame]:
    """Compare the circuits of a base and a tuned model.

    Args:
        pair: The models.
        circuits: Scores and circuits; those of `base` and `tuned` are compared.
        request: Pairs, metric and settings.
        execution: Tokens of a batch (512 by default), seed (of random sets and resampling), progress.

    Returns:
        The tables `circuit_shift` and `circuit_overlap` where edges have scores of single texts, and `circuit_gain` but for the metric `kl`.
    """
    (base, base_circuit), (tuned, tuned_circuit) = circuits["base"], circuits["tuned"]
    settings, tables = request.settings, {}
    if base.per_text is None:
        log.warning(
            "method %s keeps no scores of single texts: overlap beside exchanged models and shifts are left out",
            base.method,
            extra={
                "weakens": "circuit_overlap",
                "withheld": "what the circuits of base and tuned share beside their own noise, and whose scores shifted",
            },
        )
    else:
        tables["circuit_shift"] = edge_shift(base, tuned, base_circuit, tuned_circuit)
        if (texts := len(base.per_text)) >= FEWEST_TEXTS:
            tables["circuit_overlap"] = overlap_table(base, tuned, OVERLAP_FRACTIONS, seed=execution.seed, **request.manner)
        else:
            log.warning(
                "edges were scored on %d texts, too few to exchange models in: the overlap of circuits needs %d",
                texts,
                FEWEST_TEXTS,
                extra={"weakens": "circuit_overlap", "withheld": "what the circuits of base and tuned share beside their own noise"},
            )
    if settings.metric != "kl":
        # the size that is judged gets as many random sets as a rank among them needs, if there are to be any
        judged = max(settings.random_circuits, _JUDGED_SETS) if settings.random_circuits else 0
        sizes = {judged: [FALLBACK], settings.random_circuits: [fraction for fraction in GAIN_FRACTIONS if fraction != FALLBACK]}
        if judged == settings.random_circuits:
            sizes = {judged: list(GAIN_FRACTIONS)}
        gains = [
            tuned_edges(
                pair,
                request.judged_on,
                fractions=fractions,
                scored_on=request.scored_on,
                random=random,
                metric=settings.metric,
                execution=execution,
            )
            for random, fractions in sizes.items()
        ]
        if gains[0].note is not None:
            log.warning("the gain of fine-tuning: %s", gains[0].note, extra={"weakens": "circuit_gain"})
        together = pd.concat([gain.table for gain in gains], ignore_index=True)
        tables["circuit_gain"] = together.sort_values("fraction", kind="stable", ignore_index=True)
    return tables


def circuits_over_time(
    circuits: Circuits, summary: pd.DataFrame, request: CircuitRequest, *, order: Sequence[str], seed: int
) -> pd.DataFrame:
    """Follow the circuit over checkpoints.

    Circuits of different sizes overlap less the more their sizes differ, so overlaps are of circuits chosen at one share of all edges: the given one,
    else 5 %. Faithfulness is that of each model's own circuit.

    Args:
        circuits: Scores and circuits.
        summary: The table `circuit_summary` of the same models.
        request: Settings.
        order: Labels, the first model first.
        seed: Of random circuits.

    Returns:
        One row per model in order: `model`, `order`, `edges` and `faithfulness` with `low`, `high` (of its own circuit); `fraction` at which circuits are
        compared, and Jaccard indices of edges and nodes with the base's and with the model's before: `jaccard_base`, `jaccard_previous`, `nodes_base`,
        `nodes_previous`, each with `_null`, what layer-matched random circuits of these sizes share.
    """
    fraction = request.share_of(circuits[order[0]][0].graph) or FALLBACK
    chosen = {label: choose(circuits[label][0], fraction=fraction, **request.manner) for label in order}
    rows = []
    for place, label in enumerate(order):
        own = summary[(summary["model"] == label) & (summary["measure"] == "faithfulness")].iloc[0]
        row = {
            "model": label,
            "order": place,
            "edges": len(circuits[label][1]),
            **own[["value", "low", "high"]].rename({"value": "faithfulness"}),
        }
        row["fraction"] = fraction
        for name, other in (("base", order[0]), ("previous", order[max(0, place - 1)])):
            table = overlap(chosen[label], chosen[other], draws=_DRAWS, seed=seed).table
            matched = table[table["null"] == "layer-matched"].set_index("of")
            for of, column in (("edges", f"jaccard_{name}"), ("nodes", f"nodes_{name}")):
                row |= {column: matched.loc[of, "jaccard"], f"{column}_null": matched.loc[of, "expected"]}
        rows.append(row)
    return pd.DataFrame(rows)
