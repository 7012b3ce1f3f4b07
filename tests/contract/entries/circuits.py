"""The contract of circuits."""

from __future__ import annotations

from typing import Any

import numpy as np

from mechscope import circuits
from mechscope.circuits import Circuit, EdgeScores, Graph
from mechscope.circuits.scores import Cost
from mechscope.instrument import Execution
from tests.contract.technique import Case, Result, Technique, columns, numbers


def per_text(scores: EdgeScores) -> Result:
    """Return the scores of edges, on every text and their mean."""
    return {"mean": scores.mean} | ({} if scores.per_text is None else {"per text": scores.per_text})


def some_edges(case: Case, every: int) -> list[str]:
    """Return one in so many of a model's edges."""
    return list(Graph.of(case.subject).names[::every])


def three(case: Case) -> list[Circuit]:
    """Return a random half of the edges, one that ends before the last layer, and the whole model."""
    graph = Graph.of(case.subject)
    half = np.random.default_rng(0).random(len(graph)) < 0.5
    return [Circuit(graph, mask) for mask in (half, np.arange(len(graph)) < len(graph) // 2, np.ones(len(graph), dtype=bool))]


def scored(method: Any, **options: Any) -> Technique:
    """Make the technique of attributing to edges."""

    def run(case: Case, execution: Execution) -> Result:
        return per_text(circuits.attribute_edges(case.subject, case.pairs, method=method, execution=execution, **options))

    return run


def from_the_other_model(case: Case, execution: Execution) -> Result:
    """Attribute to edges what the tuned model does otherwise."""
    return per_text(circuits.attribute_edges(case.subject, case.pairs, method="eap", source=case.pair.tuned, execution=execution))


def evaluated(**options: Any) -> Technique:
    """Make the technique of running circuits."""

    def run(case: Case, execution: Execution) -> Result:
        return numbers(circuits.evaluate(case.subject, case.pairs, three(case), execution=execution, **options))

    return run


def evaluate_with_means(case: Case, execution: Execution) -> Result:
    """Run circuits, with means in place of all other edges."""
    written = circuits.SenderOutputs.mean_over(case.subject, case.pairs, execution=execution)
    values = circuits.evaluate(case.subject, case.pairs, three(case), source=written, execution=execution).values
    return {"values": values} | numbers(written.parts, "means")


def curve(case: Case, execution: Execution) -> Result:
    """Run the circuits of a ranking of edges."""
    graph = Graph.of(case.subject)
    scores = EdgeScores(graph, np.random.default_rng(1).normal(size=len(graph)), None, "random", Cost(0, 0))
    result = circuits.faithfulness_curve(case.subject, case.pairs, scores, fractions=(0.2, 1.0), random=1, execution=execution)
    return numbers(result)


def acdc(case: Case, execution: Execution) -> Result:
    """Search greedily."""
    result = circuits.acdc(case.subject, case.pairs, thresholds=(0.01, 0.1), edges=some_edges(case, 40), execution=execution)
    return {
        "circuits": np.stack([circuit.edges for circuit in result.circuits]),
        "values": result.values,
        "clean": np.array(result.clean),
        "scores": result.scores.mean,
    }


def prune(case: Case, execution: Execution) -> Result:
    """Learn a mask over edges."""
    result = circuits.prune_edges(case.subject, case.pairs, n_edges=50, steps=3, execution=execution)
    return {"scores": result.scores.mean, "circuit": result.circuit.edges} | numbers(result.history, "history")


def tuned_edges(case: Case, execution: Execution) -> Result:
    """Bring a part of the tuned model's edges into the base."""
    return numbers(circuits.tuned_edges(case.pair, case.pairs, fractions=[0.2, 1.0], random=1, execution=execution))


def completeness(case: Case, execution: Execution) -> Result:
    """Take sets of nodes from a circuit and from the model."""
    options: dict[str, Any] = {"random": 2, "greedy": 1, "steps": 2, "candidates": 2}
    return numbers(circuits.completeness(case.subject, case.pairs, three(case)[0], execution=execution, **options))


def minimality(case: Case, execution: Execution) -> Result:
    """Take each node from a circuit; beside which set is left to rounding where a node's removal changes nothing."""
    result = circuits.minimality(case.subject, case.pairs, three(case)[0], random=1, controls=2, execution=execution)
    return numbers(result.table.drop(columns="beside"), "table") | {"changes": result.changes, "controls": result.controls}


TECHNIQUES: dict[str, Technique] = {
    "eap": scored("eap"),
    "eap-ig": scored("eap-ig", steps=2),
    "eap-ig by activations": scored("eap-ig-activations", steps=2),
    "eap from the other model": from_the_other_model,
    "exact edges": lambda case, execution: per_text(
        circuits.exact_effects(case.subject, case.pairs, edges=some_edges(case, 20), execution=execution)
    ),
    "routes": lambda case, execution: per_text(circuits.flow_routes(case.subject, case.pairs, execution=execution)),
    "discover": lambda case, execution: per_text(circuits.discover(case.subject, case.pairs, steps=1, execution=execution)),
    "evaluate": evaluated(),
    "evaluate to zero": evaluated(source="zero", metric="kl"),
    "evaluate with means": evaluate_with_means,
    "faithfulness": curve,
    "cards": lambda case, execution: columns(circuits.component_cards(case.subject, case.pairs, three(case)[0], execution=execution)),
    "acdc": acdc,
    "prune": prune,
    "tuned edges": tuned_edges,
    "completeness": completeness,
    "minimality": minimality,
}
