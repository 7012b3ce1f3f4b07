"""The tables of a bake-off, from what its arms left.

Every arm is scored on the same held-out documents, so differences are paired: same document, same seed. What is said of a placement is about trainings,
so its interval is over trainings and documents at once (`mechscope.stats.crossed`), and there is none below three seeds or `MIN_DOCUMENTS`. What is said
of *these* trainings is about documents alone, in columns of its own (`mechscope.stats.bootstrap`). The untouched base has no seed; it is paired with every
seed of the other, and its own mean varies with documents only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechscope.adapt.arms import Arm
from mechscope.data.documents import Document
from mechscope.data.rouge import METRICS
from mechscope.stats.bootstrap import mean_interval
from mechscope.stats.crossed import MIN_DOCUMENTS, MIN_TRAININGS, Crossed, crossed_mean
from mechscope.stats.inference import MIN_TEXTS, too_few

SHARED = ("standard", "full", "none")  # strategies that are the same in both protocols
CIRCUITS = ("circuit", "random_circuit")  # strategies whose random control is a circuit; all others' is random layers


@dataclass(frozen=True)
class Outcome:
    """What one arm left.

    Attributes:
        arm: The arm.
        facts: trainable_parameters, trainable_share, rank, best_loss, best_step, tokens_to_best, stopped_early, converged, unconverged.
        curve: Its learning curve; for the base, which is not trained, its loss at step 0.
        rouge: One row per held-out document: id and the four metrics.
        summaries: What it wrote, in the order of the documents.
    """

    arm: Arm
    facts: dict[str, float | int | bool | str]
    curve: pd.DataFrame
    rouge: pd.DataFrame
    summaries: tuple[str, ...]


def arms_table(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Return one row per arm: what it cost, how far and how fast it got, its mean ROUGE."""
    best = {outcome.arm.seed: outcome.facts["best_loss"] for outcome in outcomes if outcome.arm.strategy == "standard"}
    rows = []
    for outcome in outcomes:
        arm, facts = outcome.arm, outcome.facts
        rows.append(
            {
                "protocol": arm.protocol,
                "strategy": arm.strategy,
                "seed": arm.seed,
                "components": arm.components,
                "rank": facts["rank"],
                "trainable_parameters": facts["trainable_parameters"],
                "trainable_share": facts["trainable_share"],
                "best_loss": facts["best_loss"],
                "best_step": facts["best_step"],
                "tokens_to_best": facts["tokens_to_best"],
                "steps_to_standard_best": steps_to(outcome.curve, float(best.get(arm.seed, math.nan))),
                "stopped_early": facts["stopped_early"],
                "converged": facts["converged"],
                "unconverged": facts["unconverged"],
                **outcome.rouge[list(METRICS)].mean().to_dict(),
                "n_documents": len(outcome.rouge),
            }
        )
    return pd.DataFrame(rows)


def steps_to(curve: pd.DataFrame, loss: float) -> float:
    """Return the first evaluated step whose validation loss is at most `loss`; NaN if there is none."""
    reached = curve.loc[curve["validation_loss"] <= loss, "step"]
    return float(reached.iloc[0]) if len(reached) else math.nan


def rouge_table(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Return one row per arm and held-out document."""
    return pd.concat([_labelled(outcome, outcome.rouge) for outcome in outcomes], ignore_index=True)


def curves_table(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Return one row per arm and evaluation, step 0 before training; losses in nats per token."""
    return pd.concat([_labelled(outcome, outcome.curve) for outcome in outcomes], ignore_index=True)


def summary_table(outcomes: Sequence[Outcome], *, seed: int = 0) -> pd.DataFrame:
    """Return one row per protocol, strategy and metric: mean, interval, and paired differences against standard and random.

    Returns:
        Fractions. `mean`, `vs_standard` and `vs_random` have 95 % intervals over trainings and documents (`_low`, `_high`), NaN below `MIN_TRAININGS` seeds
        or `MIN_DOCUMENTS` documents with the reason in `withheld`; the untouched base's `mean` has one over documents alone, NaN below `MIN_TEXTS`.
        Differences also `_sd`, how much they vary between seeds, and `_documents_low`, `_documents_high`: the interval over documents (resampled with
        `seed`) for these very trainings, which says nothing about others. A difference is this strategy minus the other;
        NaN against itself and where the other was not run (the references, outside both protocols, have a standard but no random layers to be compared
        with). `vs_random` of the circuit is against the random circuits, of all others against the random layers.
    """
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.arm.protocol, outcome.arm.strategy), []).append(outcome)
    standard = next((group for (_, strategy), group in groups.items() if strategy == "standard"), None)
    rows = []
    for (protocol, strategy), group in groups.items():
        control = "random_circuit" if strategy in CIRCUITS else "random_layers"
        against = {"standard": standard, "random": groups.get((protocol, control))}
        for metric in METRICS:
            scores = _scores(group, metric)
            mean = crossed_mean(scores) if group[0].arm.trained else _untrained(scores, seed)
            row = {"protocol": protocol, "strategy": strategy, "metric": metric, "mean": mean.value, "low": mean.low, "high": mean.high}
            row |= {"n_seeds": scores.shape[0], "n_documents": scores.shape[1]}
            for name, other in against.items():
                differences = None if other is None or other[0].arm.strategy == strategy else scores - _scores(other, metric)
                row |= _compared(f"vs_{name}", differences, seed)
            trainings = len(group) if group[0].arm.trained else len(standard or ())
            row["withheld"] = _withheld(trainings, documents=scores.shape[1])
            rows.append(row)
    return pd.DataFrame(rows)


def _untrained(scores: Float[np.ndarray, "one document"], seed: int) -> Crossed:
    """Return the mean of a model that no training made, over documents alone."""
    mean = mean_interval(scores[0], seed=seed)
    return Crossed(mean.value, mean.low, mean.high, math.nan, 0)


def _compared(name: str, differences: Float[np.ndarray, "seed document"] | None, seed: int) -> dict[str, float]:
    """Return what is known of a paired difference; all NaN where there is none."""
    if differences is None:
        ends = ("", "_low", "_high", "_sd", "_documents_low", "_documents_high")
        return {f"{name}{end}": math.nan for end in ends}
    over = crossed_mean(differences)
    these = mean_interval(differences.mean(0), seed=seed)
    return {
        name: over.value,
        f"{name}_low": over.low,
        f"{name}_high": over.high,
        f"{name}_sd": over.sd,
        f"{name}_documents_low": these.low,
        f"{name}_documents_high": these.high,
    }


def summaries_table(outcomes: Sequence[Outcome], documents: Sequence[Document]) -> pd.DataFrame:
    """Return one row per document: the reference, and what the base and each strategy's first seed wrote.

    Strategies that differ between the protocols have a column for each, such as `targeted_layers_equal_rank`.
    """
    table = {
        "id": [document.id for document in documents],
        "document": [document.document for document in documents],
        "reference": [document.summary for document in documents],
    }
    for outcome in outcomes:
        arm = outcome.arm
        name = "base" if arm.strategy == "none" else arm.strategy if arm.strategy in SHARED else f"{arm.strategy}_{arm.protocol}"
        table.setdefault(name, list(outcome.summaries))
    return pd.DataFrame(table)


def _withheld(trainings: int, *, documents: int) -> str:
    """Return why a row has no intervals over trainings and documents, over documents alone where no training is in it; empty where it has."""
    if 0 < trainings < MIN_TRAININGS:
        return too_few(trainings, "seeds", MIN_TRAININGS)
    least = MIN_DOCUMENTS if trainings else MIN_TEXTS
    return too_few(documents, "documents", least) if documents < least else ""


def _scores(group: Sequence[Outcome], metric: str) -> Float[np.ndarray, "seeds documents"]:
    return np.stack([outcome.rouge[metric].to_numpy() for outcome in sorted(group, key=lambda outcome: outcome.arm.seed)])


def _labelled(outcome: Outcome, table: pd.DataFrame) -> pd.DataFrame:
    labels = {"protocol": outcome.arm.protocol, "strategy": outcome.arm.strategy, "seed": outcome.arm.seed}
    labelled = table.copy()
    for place, (name, value) in enumerate(labels.items()):
        labelled.insert(place, name, value)
    return labelled
