"""Circuits of one or several models: scores of all edges, the chosen circuit, and what is measured of it on pairs that it was not found on.

Edges are scored on one part of the pairs and circuits are judged on the other (`held_out`): a circuit that was found on the texts it is judged on looks
better than it is. Its size is chosen on the pairs that edges are scored on: the smallest of several sizes that is faithful on some texts looks better
on these than it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from mechscope.circuits.cards import component_cards
from mechscope.circuits.choosing import choose
from mechscope.circuits.criteria import Minimality, completeness, minimality
from mechscope.circuits.discovery import discover
from mechscope.circuits.evaluation import Area, Curve, evaluate, faithfulness_curve
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.overlap import compare_seeds, robustness
from mechscope.circuits.scores import Cost, EdgeScores, to_json
from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.report.theme import model_name
from mechscope.settings.discovery import DiscoverySettings
from mechscope.store.run import RunFolder
from mechscope.store.stage import Stage
from mechscope.studies.circuit_request import FEWEST, CircuitRequest
from mechscope.studies.roles import named_roles
from mechscope.studies.runner import plain
from mechscope.subject import Subject

log = logging.getLogger(__name__)

# size where no size is faithful or nothing can be said of it
FALLBACK = 0.05
# of methods that learn
CONVERGED = "learning converged (1: yes)"
# below it a component is said to be needed
_LEVEL = 0.05


@dataclass(frozen=True)
class CircuitReport:
    """A model's circuit with everything that was measured of it.

    Attributes:
        scores: The scores of all edges.
        circuit: The chosen circuit.
        fraction: Its size before dead ends were removed, as a share of all edges (or of all heads and MLPs, where nodes are chosen).
        tables: Tables by name, without the column that names the model.
    """

    scores: EdgeScores
    circuit: Circuit
    fraction: float
    tables: dict[str, pd.DataFrame]


def check_size(settings: DiscoverySettings, graph: Graph) -> None:
    """Refuse a circuit larger than the model.

    Raises:
        SettingsError: There are not as many edges, or edge pruning would have none to leave out.
    """
    most = len(graph) - (settings.method == "edge-pruning")
    if settings.circuit_edges is not None and settings.circuit_edges > most:
        raise SettingsError(f"a circuit of {settings.circuit_edges:,} edges: this model has {len(graph):,}, give 1 to {most:,}")


def score_edges(subject: Subject, request: CircuitRequest, *, execution: Execution = Execution()) -> EdgeScores:
    """Score a model's edges on the pairs for it.

    Args:
        subject: The model.
        request: Pairs, metric and method.
        execution: Tokens of a batch (256 by default), seed (of methods that draw), progress.
    """
    settings = request.settings
    return discover(
        subject,
        request.scored_on,
        method=settings.method,
        steps=settings.steps,
        pruning_steps=settings.pruning_steps,
        points=settings.points,
        source=request.source(subject, execution=execution),
        fraction=request.share_of(Graph.of(subject)) or FALLBACK,
        metric=settings.metric,
        execution=execution,
    )


def write_scores(stage: Stage, label: str, scores: EdgeScores) -> None:
    """Keep a model's scores as tensors of a run: `circuit_scores_<label>`."""
    kept = {"mean": torch.from_numpy(scores.mean)}
    if scores.per_text is not None:
        kept["per_text"] = torch.from_numpy(np.ascontiguousarray(scores.per_text))
    graph = scores.graph
    about = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel": graph.parallel}
    cost = {"forward": scores.cost.forward, "backward": scores.cost.backward}
    stage.write_tensors(_tensors(label), kept, meta={"graph": about, "method": scores.method, "cost": cost, "notes": scores.notes})


def read_scores(folder: RunFolder, label: str) -> EdgeScores:
    """Read what `write_scores` kept."""
    tensors, meta = folder.tensors(_tensors(label))
    per_text = tensors["per_text"].numpy() if "per_text" in tensors else None
    return EdgeScores(Graph(**meta["graph"]), tensors["mean"].numpy(), per_text, meta["method"], Cost(**meta["cost"]), meta["notes"])


def _tensors(label: str) -> str:
    return f"circuit_scores_{plain(label)}"


def read_circuits(folder: RunFolder, labels: list[str]) -> dict[str, tuple[EdgeScores, Circuit]]:
    """Read scores and circuit of each model from a run that has them: from `write_scores` and the table `circuit_edges`."""
    edges, circuits = folder.table("circuit_edges"), {}
    for label in labels:
        scores = read_scores(folder, label)
        circuits[label] = (scores, Circuit(scores.graph, edges.loc[edges["model"] == label, "in_circuit"].to_numpy(bool)))
    return circuits


def circuit_tables(reports: Mapping[str, CircuitReport], *, roles: pd.DataFrame | None = None) -> dict[str, pd.DataFrame]:
    """Put the tables of several models together, with a column `model`.

    Args:
        reports: By label of the model.
        roles: The table `head_roles` of the same models, to name what the heads of the circuit are; None leaves them without.
    """
    tables = {}
    for name in ("circuit_edges", "circuit_nodes", "circuit_curve", "circuit_summary", "circuit_components"):
        parts = []
        for label, report in reports.items():
            table = report.tables[name]
            if name == "circuit_components":
                table = table.assign(role=table["component"].map(named_roles(roles, label)).fillna(""))
            parts.append(table.assign(model=label))
        tables[name] = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    return tables


def circuit_file(subject: Subject, report: CircuitReport) -> str:
    """Return a circuit in the JSON format that circuits are exchanged in."""
    anatomy = subject.anatomy
    return to_json(report.circuit, report.scores, model=subject.source, fingerprint=subject.fingerprint, d_model=anatomy.d_model)


def judge_circuit(
    subject: Subject,
    scores: EdgeScores,
    request: CircuitRequest,
    *,
    other_seed: EdgeScores | None = None,
    execution: Execution = Execution(),
) -> CircuitReport:
    """Choose a circuit by its scores and measure it on the pairs that judge.

    Args:
        subject: The model.
        scores: The scores of its edges.
        request: Pairs, metric and settings.
        other_seed: What the same method said with another seed, for methods that draw.
        execution: Tokens of a batch, seed (of random circuits, resampling and knockouts), progress.
    """
    settings, graph = request.settings, scores.graph
    options: dict[str, Any] = {
        "metric": settings.metric,
        "source": request.source(subject, execution=execution),
        "execution": execution,
    }
    told = {**request.manner, **options}
    curve = faithfulness_curve(subject, request.judged_on, scores, random=settings.random_circuits, **told)
    fraction = request.share_of(graph)
    if fraction is None:
        same = request.scored_on is request.judged_on
        searched = curve if same else faithfulness_curve(subject, request.scored_on, scores, random=0, **told)
        fraction = _smallest(searched, settings.faithful, model=model_name(subject.source))
    circuit = choose(scores, fraction=fraction, **request.manner)
    if not len(circuit):
        log.warning(
            "in %s no path of the %.3g %% strongest edges leads from the input to the logits: its circuit is empty",
            model_name(subject.source),
            100 * fraction,
            extra={"weakens": "circuit_edges"},
        )
    own = evaluate(subject, request.judged_on, [circuit], **options)
    share = own.faithfulness()
    summary = [
        _measure("edges", len(circuit)),
        _measure("edges of the model", len(graph)),
        _measure("nodes", int(circuit.nodes.sum())),
        _measure("metric of the model", own.clean.mean()),
        _measure("metric without edges", own.empty.mean()),
        _measure("metric of the circuit", own.values[0].mean()),
        _measure("faithfulness", share.value[0], share.low[0], share.high[0], withheld=str(share.withheld[0])),
        _area("CPR", curve.cpr, curve.notes["faithfulness"]),
        _area("CMD", curve.cmd, curve.notes["faithfulness"]),
    ]
    needed: Minimality | None = None
    if settings.criteria and circuit.components():
        whole = completeness(subject, request.judged_on, circuit, **options).table
        summary.append(_measure("incompleteness, mean over knockouts", whole["normalised"].mean()))
        if whole["normalised"].notna().any():
            worst = whole.sort_values("normalised", ascending=False).to_dict("records")[0]
            ends = (worst["normalised_low"], worst["normalised_high"])
            summary.append(_measure("incompleteness, worst knockout", worst["normalised"], *ends))
        needed = minimality(subject, request.judged_on, circuit, **options)
        summary.append(_needed(needed))
    if scores.per_text is not None and len(scores.per_text) >= FEWEST:
        resamples = settings.circuit_resamples
        stable = robustness(scores, fraction=fraction, resamples=resamples, seed=execution.seed, **request.manner).table
        for row in stable.to_dict("records"):
            name = f"Jaccard of {row['of']}, {row['comparison']}"
            summary.append(_measure(name, row["mean"], row["low"], row["high"], random=row["null"]))
    if other_seed is not None:
        summary += _seeds(circuit, choose(other_seed, fraction=fraction, **request.manner))
    if "converged" in scores.notes:
        converged, why = bool(scores.notes["converged"]), str(scores.notes["unconverged"])
        summary.append(_measure(CONVERGED, float(converged), withheld="" if converged else f"the search had not converged: {why}"))
    summary += [_measure("forward passes to score", scores.cost.forward), _measure("backward passes to score", scores.cost.backward)]
    cards = component_cards(subject, request.judged_on, circuit, **options)
    tables = {
        "circuit_edges": scores.table().assign(in_circuit=circuit.edges),
        "circuit_nodes": scores.node_table().assign(in_circuit=circuit.nodes),
        "circuit_curve": curve.table,
        "circuit_summary": pd.DataFrame(summary),
        "circuit_components": _components(cards, scores, needed),
    }
    return CircuitReport(scores, circuit, fraction, tables)


def _smallest(curve: Curve, faithful: float, *, model: str) -> float:
    """Return the smallest size at which a circuit is near enough to the model: neither too little nor too much of its effect."""
    if curve.table["faithfulness"].isna().all():
        log.warning(
            "in %s %s; its circuit is the %g %% strongest edges",
            model,
            curve.notes["faithfulness"],
            100 * FALLBACK,
            extra={"weakens": "circuit_summary"},
        )
        return FALLBACK
    enough = curve.table.loc[(1 - curve.table["faithfulness"]).abs() <= 1 - faithful, "fraction"]
    return float(enough.iloc[0]) if len(enough) else 1.0


def _needed(minimal: Minimality) -> dict[str, Any]:
    """Count the components that a circuit needs, beside how many would seem to be needed if all were superfluous."""
    name, p, parts = f"components that are needed (p < {_LEVEL})", minimal.table["p"], len(minimal.controls)
    if not parts:
        return _measure(name, np.nan)
    # p is a rank among the parts: each of parts + 1 values is equally likely for one more of them
    small = np.count_nonzero(np.arange(1, parts + 2) / (parts + 1) < _LEVEL)
    return _measure(name, int((p < _LEVEL).sum()), random=len(p) * small / (parts + 1))


def _seeds(circuit: Circuit, other: Circuit) -> list[dict[str, Any]]:
    compared = compare_seeds([circuit, other]).iloc[0]
    return [
        _measure(f"Jaccard of {of}, other seed of the method", compared[of], random=compared[f"{of}_null"]) for of in ("edges", "nodes")
    ]


def _measure(
    name: str, value: float, low: float = np.nan, high: float = np.nan, *, random: float = np.nan, withheld: str = ""
) -> dict[str, Any]:
    measured = {"measure": name, "value": float(value), "low": low, "high": high}
    return {**measured, "random": random, "random_low": np.nan, "random_high": np.nan, "withheld": withheld}


def _area(name: str, area: Area, note: str | None) -> dict[str, Any]:
    row = _measure(name, area.value, area.low, area.high, random=area.random, withheld=note or "")
    return {**row, "random_low": area.random_low, "random_high": area.random_high}


def _components(cards: pd.DataFrame, scores: EdgeScores, needed: Minimality | None) -> pd.DataFrame:
    nodes = scores.node_table().rename(columns={"node": "component"})
    columns = [name for name in ("component", "score", "low", "high") if name in nodes]
    table = cards.merge(nodes[columns], on="component", how="left")
    if needed is not None:
        tested = needed.table[["component", "normalised", "p", "q"]]
        tested = tested.rename(columns={"normalised": "minimality", "p": "minimality_p", "q": "minimality_q"})
        table = table.merge(tested, on="component", how="left")
    return table.sort_values("score", key=np.abs, ascending=False, kind="stable").reset_index(drop=True)
