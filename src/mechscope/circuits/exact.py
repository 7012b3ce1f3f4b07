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
from mechscope.circuits.scores import Cost, EdgeScores
from mechscope.circuits.sender_outputs import Source, require_source, source_name
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, check_fits, fetched
from mechscope.instrument.execution import Execution
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
    execution: Execution = Execution(),
) -> EdgeScores:
    """Close edges one at a time.

    Args:
        subject: The model.
        pairs: Clean and corrupt prompts.
        edges: Which edges, by name or as a circuit; None for all.
        metric: One of `mechscope.data.metrics.METRICS`.
        source: What a closed edge carries: the corrupt run's value, `zero`, or a mean.
        execution: Tokens of a batch (512 by default), progress.

    Returns:
        Scores with `per_text`; NaN for edges that were not chosen.

    Raises:
        MechscopeError: Edges, pairs or metric do not fit the model.
    """
    graph = Graph.of(subject)
    check_fits(subject, pairs)
    require_source(pairs, source)
    chosen = np.flatnonzero(_chosen(graph, edges))
    # edges into one receiver stand together: they begin at the same place
    chosen = chosen[np.argsort(graph.edges[chosen, 1], kind="stable")]
    gathered = PerText(pairs)

    def effects(batch: PairBatch) -> dict[str, np.ndarray]:
        runs = CircuitRuns(subject, batch, metric, source=source)
        launched = []
        for start in range(0, len(chosen), _AT_ONCE):
            part = chosen[start : start + _AT_ONCE]
            sets = torch.ones(len(part), len(graph), dtype=torch.bool)
            sets[torch.arange(len(part)), torch.from_numpy(part)] = False
            launched.append(runs.launch(sets) - runs.clean)
            gathered.step(len(part))
        values = np.full((len(graph), len(batch.pairs)), np.nan)
        if launched:
            values[chosen] = fetched(torch.cat(launched), of=RUN)
        return {"effects": values}

    gathered.run(effects, execution, tokens=512, label="closing edges", units=len(chosen))
    per_text = gathered["effects"].T
    depth = np.array(graph.layer_of(graph.receivers))[graph.edges[chosen, 1]]
    passes = 2 + float((1 - depth / graph.n_layers).sum())
    notes = {"metric": metric, "source": source_name(source), "edges": len(chosen), "texts": pairs.hash}
    return EdgeScores(graph, per_text.mean(0), per_text, "exact", Cost(passes, 0), notes)


def _chosen(graph: Graph, edges: Sequence[str] | Circuit | None) -> Bool[np.ndarray, " edge"]:
    if edges is None:
        return np.ones(len(graph), dtype=bool)
    return edges.edges if isinstance(edges, Circuit) else Circuit.of(graph, edges).edges
