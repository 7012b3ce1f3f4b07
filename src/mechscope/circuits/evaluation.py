"""How much of a model a circuit is: the metric of any edge sets, faithfulness, its curve over circuit sizes, and edge AUROC.

m(C) is the metric when the circuit's edges carry clean values and all others the other run's; M is the whole model, ∅ no edge. Faithfulness is
f(C) = (m(C) − m(∅)) / (m(M) − m(∅)), a ratio of means over texts (Wang et al. 2022; Hanna et al. 2024), so it does not matter whether a metric
counts up or down.

CPR and CMD (MIB, Mueller et al. 2025) are the areas under f and under |1 − f| along the fraction of edges, a linear axis, by trapezoids between
the fractions given. They are divided by the width of that axis here, so a circuit that is as good as the model at every size has CPR 1 and CMD 0;
with MIB's fractions (0.1 % to 100 %) MIB's own numbers are these times 0.999.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.metrics import roc_auc_score

from mechscope.circuits.choosing import MIB_FRACTIONS, fractions_curve
from mechscope.circuits.forward import RUN, CircuitRuns
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.overlap import random_like
from mechscope.circuits.scores import Cost, EdgeScores
from mechscope.circuits.sender_outputs import Source
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, check_fits, fetched
from mechscope.errors import DataError, ModelError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.shapes import by_shape
from mechscope.stats.shares import Shares, shares_of
from mechscope.subject import Subject

# circuits handed to `CircuitRuns` between two calls of `progress`; it bounds its memory itself
_AT_ONCE = 64
_ENDS = (0.025, 0.975)


@dataclass(frozen=True)
class Evaluated:
    """The metric of circuits, per text in the order of the pairs.

    Attributes:
        values: m(C) of every circuit.
        clean: m(M).
        empty: m(∅).
        metric: Which metric.
        cost: Passes that were made, over all texts; equal circuits are run once.
    """

    values: Float[np.ndarray, "circuit text"]
    clean: Float[np.ndarray, " text"]
    empty: Float[np.ndarray, " text"]
    metric: str
    cost: Cost

    __repr__ = by_shape

    def faithfulness(self) -> Shares:
        """Return f(C) of every circuit."""
        return of_span(self.values - self.empty, self.clean, self.empty)


@dataclass(frozen=True)
class Area:
    """An area over the fractions, divided by their width.

    Attributes:
        value: Of the curve.
        low: Lower end of its interval over texts.
        high: Upper end.
        random: Mean over the curves of random circuits; NaN without any. `random_low` and `random_high` are their 2.5 % and 97.5 % quantiles.
    """

    value: float
    low: float
    high: float
    random: float
    random_low: float
    random_high: float


@dataclass(frozen=True)
class Curve:
    """Faithfulness over circuit sizes.

    Attributes:
        table: One row per fraction: `fraction`, `edges` (in the circuit after choosing), `metric`, `n` (texts), `value` (mean metric), `faithfulness` with
            `low`, `high` (over texts) and `withheld` (why these are NaN), and `random`, `random_low`, `random_high`: mean and 2.5 % and 97.5 % quantiles of
            the faithfulness of layer-matched random circuits with as many edges (not pruned, so at small sizes most of theirs are dead ends).
        cpr: Area under the faithfulness. It can exceed 1.
        cmd: Area of |1 − faithfulness|, 0 at best. It is bounded below, so texts' noise moves it up.
        circuits: The circuit of each fraction.
        evaluated: Their metric per text.
        random: ``(draw, fraction)``: faithfulness of the random circuits.
        cost: Passes that were made for everything.
        notes: How it was made; under `faithfulness` why values or intervals are NaN, or None.
    """

    table: pd.DataFrame
    cpr: Area
    cmd: Area
    circuits: tuple[Circuit, ...]
    evaluated: Evaluated
    random: Float[np.ndarray, "draw fraction"]
    cost: Cost
    notes: dict[str, Any] = field(default_factory=dict)

    __repr__ = by_shape


@torch.no_grad()
def evaluate(
    subject: Subject,
    pairs: Pairs,
    circuits: Sequence[Circuit],
    *,
    metric: str = "logit-diff",
    source: Source = "corrupt",
    execution: Execution = Execution(),
) -> Evaluated:
    """Run the model with only the edges of each circuit.

    Args:
        subject: The model.
        pairs: Clean and corrupt texts.
        circuits: Edge sets of this model's graph.
        metric: `logit-diff`, `probability`, `loss` or `kl`.
        source: What closed edges carry: values of the `corrupt` run, `zero`, means (`SenderOutputs.mean_over`), or another model's clean run.
        execution: Tokens of a batch (512 by default), progress.

    Raises:
        MechscopeError: There is no circuit, one is of another graph, texts do not fit the model or the metric, or values are not finite.
    """
    if not circuits:
        raise SettingsError("there are no circuits to evaluate: give at least one")
    check_fits(subject, pairs)
    graph = Graph.of(subject)
    for circuit in circuits:
        if circuit.graph != graph:
            raise SettingsError(f"a circuit of {circuit.graph} does not belong to this model, which is {graph}")
    # equal circuits, as the whole model often is several times, cost once
    packed = np.stack([np.packbits(circuit.edges) for circuit in circuits])
    _, first, place = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    distinct = np.stack([circuits[index].edges for index in first])
    gathered = PerText(pairs)

    def evaluated(batch: PairBatch) -> dict[str, np.ndarray]:
        runs = CircuitRuns(subject, batch, metric, source=source)
        launched = []
        for edges in torch.from_numpy(distinct).split(_AT_ONCE):
            launched.append(runs.launch(edges))
            gathered.step(len(edges))
        clean, empty = (values.double().cpu().numpy() for values in (runs.clean, runs.corrupt))
        return {"values": fetched(torch.cat(launched), of=RUN), "clean": clean, "empty": empty}

    gathered.run(evaluated, execution, tokens=512, label="evaluating circuits", units=len(distinct))
    clean, empty = gathered["clean"], gathered["empty"]
    if not (np.isfinite(clean).all() and np.isfinite(empty).all()):
        raise ModelError("the model gave values that are NaN or infinite: its type is too narrow for it, try dtype float32")
    return Evaluated(gathered["values"][place.reshape(-1)], clean, empty, metric, Cost(forward=len(distinct) + 2, backward=0))


def of_span(values: Float[np.ndarray, "row text"], clean: Float[np.ndarray, " text"], empty: Float[np.ndarray, " text"]) -> Shares:
    """Return mean(values) / mean(clean − empty) with Fieller's intervals (`mechscope.stats.shares`).

    Args:
        values: Differences of the metric.
        clean: m(M).
        empty: m(∅).

    Returns:
        Withheld, with the reason, where the texts do not show that the whole model and the empty circuit differ, and of fewer than six texts.
    """
    return shares_of(values, clean - empty, absent="the whole model and the empty circuit do not differ in the metric")


def faithfulness_curve(
    subject: Subject,
    pairs: Pairs,
    scores: EdgeScores,
    *,
    fractions: Sequence[float] = MIB_FRACTIONS,
    random: int = 10,
    metric: str = "logit-diff",
    source: Source = "corrupt",
    execution: Execution = Execution(),
    **choice: Any,
) -> Curve:
    """Choose circuits of several sizes by scores and see how much of the model each is.

    Args:
        subject: The model.
        pairs: The texts to judge on; best not those the scores were made from.
        scores: What a discovery method says of every edge.
        fractions: Sizes as fractions of all edges, rising.
        random: Random circuits per size, by `random_like`.
        metric: `logit-diff`, `probability`, `loss` or `kl`.
        source: What closed edges carry: values of the `corrupt` run, `zero`, means (`SenderOutputs.mean_over`), or another model's clean run.
        choice: How edges are chosen: `rule`, `by`, `sign` and the other options of `fractions_curve`.
        execution: Tokens of a batch (512 by default), seed (of the random circuits), progress.

    Raises:
        MechscopeError: Fractions do not rise within 0 to 1, options of the choice contradict each other, or texts do not fit the model or the metric.
    """
    at = np.asarray(fractions, dtype=np.float64)
    if len(at) < 2 or (np.diff(at) <= 0).any() or at[0] <= 0 or at[-1] > 1 or random < 0:
        what = f"fractions {tuple(fractions)} and {random} random circuits"
        raise SettingsError(
            f"{what} are not usable: give at least two fractions, rising, above 0 and up to 1, and 0 or more random circuits"
        )
    circuits = fractions_curve(scores, at.tolist(), **choice)
    drawn = [random_like(circuit, number=random, seed=execution.seed + place) for place, circuit in enumerate(circuits)]
    everything = [*circuits, *(circuit for of_size in zip(*drawn, strict=True) for circuit in of_size)]
    every = evaluate(subject, pairs, everything, metric=metric, source=source, execution=execution)
    share = every.faithfulness()
    by_chance = share.value[len(at) :].reshape(random, len(at))
    own = slice(len(at))
    table = pd.DataFrame({"fraction": at, "edges": [len(circuit) for circuit in circuits], "metric": metric, "n": len(pairs)})
    table["value"] = every.values[own].mean(1)
    table["faithfulness"], table["low"], table["high"] = (each[own] for each in (share.value, share.low, share.high))
    table["withheld"] = share.withheld[own]
    table["random"], table["random_low"], table["random_high"] = _band(by_chance)
    judged = replace(every, values=every.values[own])
    cpr, cmd = areas(at, judged, by_chance)
    notes = {"method": scores.method, **choice, "random": random, "seed": execution.seed, "faithfulness": share.note}
    return Curve(table, cpr, cmd, tuple(circuits), judged, by_chance, every.cost, notes)


def areas(at: Float[np.ndarray, " fraction"], evaluated: Evaluated, by_chance: Float[np.ndarray, "draw fraction"]) -> tuple[Area, Area]:
    """Return CPR and CMD of a curve.

    Args:
        at: The fractions of edges, rising.
        evaluated: The circuit of each.
        by_chance: Faithfulness of random circuits at each; empty without any.
    """
    return _cpr(at, evaluated, by_chance), _cmd(at, evaluated, by_chance)


def _cpr(at: np.ndarray, evaluated: Evaluated, by_chance: np.ndarray) -> Area:
    """Return the area under the faithfulness: a ratio of means itself, of each text's area and the whole."""
    weights = _weights(at)
    part = (weights @ (evaluated.values - evaluated.empty))[None]
    area = of_span(part, evaluated.clean, evaluated.empty)[0]
    return Area(area.value, area.low, area.high, *(float(each) for each in _band(by_chance @ weights)))


def _cmd(at: np.ndarray, evaluated: Evaluated, by_chance: np.ndarray) -> Area:
    """Return the area of |1 − faithfulness|.

    It is a ratio of means where the sign of 1 − f is known at every size. Where it is not, the interval is the hull over its being positive, negative,
    zero and as it is measured at all such sizes: simulated, that covers .95 to .99, where the sign as measured alone covers .86 where all circuits are as
    good as the model, since |1 − f| is never below zero.
    """
    weights = _weights(at)
    missing = evaluated.clean - evaluated.values
    short = of_span(missing, evaluated.clean, evaluated.empty)
    sign = np.sign(short.value)
    unsure = (short.low <= 0) & (short.high >= 0)
    signs = np.stack([sign, *(np.where(unsure, each, sign) for each in (0.0, 1.0, -1.0))])
    areas = of_span((signs * weights) @ missing, evaluated.clean, evaluated.empty)
    chance = np.abs(1 - by_chance) @ weights
    return Area(
        float(areas.value[0]), float(np.maximum(0.0, areas.low.min())), float(areas.high.max()), *(float(each) for each in _band(chance))
    )


def _weights(at: np.ndarray) -> Float[np.ndarray, " fraction"]:
    """Return what each fraction counts in an area by trapezoids, divided by the width."""
    gaps = np.diff(at) / (at[-1] - at[0])
    return (np.append(gaps, 0.0) + np.append(0.0, gaps)) / 2


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = values if len(values) else np.full((1, *values.shape[1:]), np.nan)
    return values.mean(0), *np.quantile(values, _ENDS, axis=0)


def auroc(scores: EdgeScores, truth: Circuit) -> float:
    """Return the probability that an edge of the true circuit has a larger |score| than one outside it, ties counting half.

    Args:
        scores: What a method says; edges it did not score (NaN) are left out.
        truth: The edges that are known to matter.

    Raises:
        DataError: The two are of different graphs, or the scored edges are all in or all outside the true circuit.
    """
    if scores.graph != truth.graph:
        raise DataError(f"scores of {scores.graph} cannot be compared with a circuit of {truth.graph}: use the same model")
    inside = truth.edges[scored := ~np.isnan(scores.mean)]
    if inside.all() or not inside.any():
        raise DataError(f"of {len(inside):,} scored edges {inside.sum():,} are in the true circuit: AUROC needs some inside, some outside")
    return float(roc_auc_score(inside, np.abs(scores.mean[scored])))
