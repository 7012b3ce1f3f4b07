"""One name for every way to score edges, so that methods can be compared by changing a word.

eap, eap-ig, eap-ig-activations, clean-corrupted    gradients (`attribution`): a few passes for all edges
exact                                               every edge closed by itself (`exact`): about half a pass per edge
acdc                                                a threshold sweep (`acdc`): one pass per edge and circuit it has come to
edge-pruning                                        learned gates (`pruning`): a forward and a backward pass per step
flow-routes                                         what flows where (`routes`): one pass; no corrupt text, no metric
"""

from __future__ import annotations

from mechscope.circuits.acdc import acdc
from mechscope.circuits.attribution import METHODS as GRADIENTS
from mechscope.circuits.attribution import Points, attribute_edges
from mechscope.circuits.exact import exact_effects
from mechscope.circuits.graph import Graph
from mechscope.circuits.pruning import prune_edges
from mechscope.circuits.routes import flow_routes
from mechscope.circuits.scores import Scores
from mechscope.circuits.written import Source
from mechscope.data.pairs import Pairs
from mechscope.errors import SettingsError
from mechscope.progress import Progress
from mechscope.subject import Subject

DISCOVERIES: tuple[str, ...] = (*GRADIENTS, "exact", "acdc", "edge-pruning", "flow-routes")
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
    points: Points = "left",
    metric: str = "logit-diff",
    source: Source = "corrupt",
    thresholds: tuple[float, ...] = _LEVELS,
    fraction: float = 0.05,
    pruning_steps: int = 500,
    tokens_per_batch: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Score every edge of a model by some method.

    Args:
        subject: The model.
        pairs: Clean and corrupt prompts.
        method: One of `DISCOVERIES`.
        steps: Points of integrated gradients.
        points: Where they lie, as for `attribute_edges`.
        metric: One of `mechscope.data.metrics.METRICS`; not used by `flow-routes`.
        source: What closed edges carry.
        thresholds: Of `acdc`, in the metric's unit.
        fraction: Of all edges, that `edge-pruning` keeps.
        pruning_steps: Steps of `edge-pruning`.
        tokens_per_batch: Most tokens of a batch of pairs, padding included.
        seed: Seed of `edge-pruning`; the other methods use none.
        progress: Called with a label, what is done and how much there is.

    Raises:
        MechscopeError: The method is not known, or does not fit the other arguments.
    """
    if method in GRADIENTS:
        return attribute_edges(
            subject,
            pairs,
            method=method,
            steps=steps,
            points=points,
            metric=metric,
            source=source,
            tokens_per_batch=tokens_per_batch,
            progress=progress,
        )
    match method:
        case "exact":
            return exact_effects(subject, pairs, metric=metric, source=source, tokens_per_batch=tokens_per_batch, progress=progress)
        case "acdc":
            return acdc(
                subject, pairs, thresholds=thresholds, metric=metric, source=source, tokens_per_batch=tokens_per_batch, progress=progress
            ).scores
        case "edge-pruning":
            number = max(1, round(fraction * len(Graph.of(subject))))
            return prune_edges(
                subject,
                pairs,
                n_edges=number,
                steps=pruning_steps,
                metric=metric,
                source=source,
                tokens_per_batch=tokens_per_batch,
                seed=seed,
                progress=progress,
            ).scores
        case "flow-routes":
            return flow_routes(subject, pairs, tokens_per_batch=tokens_per_batch, progress=progress)
    raise SettingsError(f"method {method!r} is not known: use one of {', '.join(DISCOVERIES)}")
