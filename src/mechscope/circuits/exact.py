"""Exact edge effects: every edge closed by itself, the rest of the model clean.

    effect(u→v) = m(all edges but u→v) − m(all edges)

What attribution estimates, measured: nothing before the receiver is run again, what lies behind it runs once per edge, and many edges run side by
side. That is about half a forward pass per edge, so for large models name the edges of interest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool

from mechscope.circuits.forward import RUN, CircuitRuns
from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.scores import Cost, Scores
from mechscope.circuits.written import Source, require_source, source_name
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.progress import Progress
from mechscope.scoring import Gathered, check_fits, fetched
from mechscope.subject import Subject

# edges of one call: their sets are matrices of this many times all edges
_AT_ONCE = 512


def exact_effects(
    subject: Subject,
    pairs: Pairs,
    *,
    edges: Sequence[str] | Circuit | None = None,
    metric: str = "logit-diff",
    source: Source = "corrupt",
    tokens_per_batch: int = 512,
    progress: Progress | None = None,
) -> Scores:
    """Close edges one at a time.

    Args:
        subject: The model.
        pairs: Clean and corrupt prompts.
        edges: Which edges, by name or as a circuit; None for all.
        metric: One of `mechscope.data.metrics.METRICS`.
        source: What a closed edge carries: the corrupt run's value, `zero`, or a mean.
        tokens_per_batch: Most tokens of a batch of pairs, padding included.
        progress: Called with a label, what is done and how much there is.

    Returns:
        Scores with `per_text`; NaN for edges that were not asked for.

    Raises:
        MechscopeError: Edges, pairs or metric do not fit the model.
    """
    graph = Graph.of(subject)
    check_fits(subject, pairs)
    require_source(pairs, source)
    chosen = np.flatnonzero(_chosen(graph, edges))
    # edges into one receiver stand together: they begin at the same place
    chosen = chosen[np.argsort(graph.edges[chosen, 1], kind="stable")]
    gathered = Gathered(pairs)

    def effects(batch: PairBatch) -> dict[str, np.ndarray]:
        runs = CircuitRuns(subject, batch, metric, source=source)
        launched = []
        for start in range(0, len(chosen), _AT_ONCE):
            part = chosen[start : start + _AT_ONCE]
            sets = torch.ones(len(part), len(graph), dtype=torch.bool)
            sets[torch.arange(len(part)), torch.from_numpy(part)] = False
            launched.append(runs.launch(sets) - runs.clean)
            gathered.step(len(part))
        found = np.full((len(graph), len(batch.pairs)), np.nan)
        if launched:
            found[chosen] = fetched(torch.cat(launched), of=RUN)
        return {"effects": found}

    gathered.run(effects, tokens_per_batch, label="closing edges", progress=progress, units=len(chosen))
    per_text = gathered["effects"].T
    depth = np.array(graph.layer_of(graph.receivers))[graph.edges[chosen, 1]]
    passes = 2 + float((1 - depth / graph.n_layers).sum())
    notes = {"metric": metric, "source": source_name(source), "edges": len(chosen), "texts": pairs.hash}
    return Scores(graph, per_text.mean(0), per_text, "exact", Cost(passes, 0), notes)


def _chosen(graph: Graph, edges: Sequence[str] | Circuit | None) -> Bool[np.ndarray, " edge"]:
    if edges is None:
        return np.ones(len(graph), dtype=bool)
    return edges.edges if isinstance(edges, Circuit) else Circuit.of(graph, edges).edges
