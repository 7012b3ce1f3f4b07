"""One name for every way to score edges, so that methods can be compared by changing a word.

eap, eap-ig, eap-ig-activations, clean-corrupted    gradients (`attribution`): a few passes for all edges
exact                                               every edge closed by itself (`exact`): about half a pass per edge
acdc                                                a threshold sweep (`acdc`): one pass per edge and circuit it has come to
edge-pruning                                        learned gates (`pruning`): a forward and a backward pass per step
flow-routes                                         what flows where (`routes`): one pass; no corrupt text, no metric
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from mechscope.choices import DiscoveryMethod, PathPoints
from mechscope.circuits.acdc import acdc
from mechscope.circuits.attribution import METHODS as GRADIENTS
from mechscope.circuits.attribution import attribute_edges
from mechscope.circuits.exact import exact_effects
from mechscope.circuits.graph import Graph
from mechscope.circuits.pruning import prune_edges
from mechscope.circuits.routes import flow_routes
from mechscope.circuits.scores import EdgeScores
from mechscope.circuits.sender_outputs import Source
from mechscope.data.pairs import Pairs
from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.subject import Subject

DISCOVERIES: tuple[str, ...] = get_args(DiscoveryMethod)
# those whose scores depend on the seed
SEEDED = ("edge-pruning",)
# nats or logits: a sweep that ranks edges
_LEVELS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


def discover(
    subject: Subject,
    pairs: Pairs,
    *,
    method: str = "eap-ig",
    steps: int = 5,
    points: PathPoints = "left",
    metric: str = "logit-diff",
    source: Source = "corrupt",
    thresholds: tuple[float, ...] = _LEVELS,
    fraction: float = 0.05,
    pruning_steps: int = 1000,
    execution: Execution = Execution(),
) -> EdgeScores:
    """Score every edge of a model by some method.

    Args:
        subject: The model.
        pairs: Clean and corrupt prompts.
        method: One of `DISCOVERIES`.
        steps: Points of integrated gradients.
        points: Where they lie: `left` (k/m from the corrupt end, k = 0 … m − 1) or `midpoint` ((k + ½)/m).
        metric: One of `mechscope.data.metrics.METRICS`; not used by `flow-routes`.
        source: What closed edges carry.
        thresholds: Of `acdc`, in the metric's unit.
        fraction: Of all edges, that `edge-pruning` keeps.
        pruning_steps: Steps of `edge-pruning`.
        execution: Tokens of a batch (256 by default), seed (of `edge-pruning`; the other methods use none), progress.

    Raises:
        MechscopeError: The method is not known, or does not fit the other arguments.
    """
    # of one size for all methods, so that they can be compared
    execution = replace(execution, tokens_per_batch=execution.tokens(256))
    if method in GRADIENTS:
        return attribute_edges(subject, pairs, method=method, steps=steps, points=points, metric=metric, source=source, execution=execution)
    match method:
        case "exact":
            return exact_effects(subject, pairs, metric=metric, source=source, execution=execution)
        case "acdc":
            return acdc(subject, pairs, thresholds=thresholds, metric=metric, source=source, execution=execution).scores
        case "edge-pruning":
            number = max(1, round(fraction * len(Graph.of(subject))))
            return prune_edges(
                subject, pairs, n_edges=number, steps=pruning_steps, metric=metric, source=source, execution=execution
            ).scores
        case "flow-routes":
            return flow_routes(subject, pairs, execution=execution)
    raise SettingsError(f"method {method!r} is not known: use one of {', '.join(DISCOVERIES)}")
