"""What a discovery method says of every edge, and the JSON format that circuits are exchanged in (MIB, EAP-IG).

A score is the estimated change of the metric when the edge carries the other run's value instead of the clean one; it is negative where the edge
holds the metric up. Per-text scores are kept where memory allows, so that intervals and resampled circuits cost no further run.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechscope.choices import UnsignedMethod
from mechscope.circuits.graph import Circuit, Graph, sums_by_node
from mechscope.errors import DataError
from mechscope.stats.inference import benjamini_hochberg, paired_difference


@dataclass(frozen=True)
class Cost:
    """What a method computed, in passes over all texts.

    Attributes:
        forward: Forward passes.
        backward: Backward passes.
    """

    forward: float
    backward: float

    def __str__(self) -> str:
        return f"{self.forward:g} forward, {self.backward:g} backward passes"


# methods whose scores say how important an edge is but not which way it moves the metric
UNSIGNED: tuple[str, ...] = get_args(UnsignedMethod)


@dataclass(frozen=True)
class EdgeScores:
    """The scores of all edges by one method.

    Attributes:
        graph: The edges.
        mean: Mean over texts; NaN where an edge was not scored.
        per_text: Score of every text, or None where they were too many to keep or the method has none.
        method: Which method.
        cost: What it computed.
        notes: What a reader should know of the run.
    """

    graph: Graph
    mean: Float[np.ndarray, " edge"]
    per_text: Float[np.ndarray, "text edge"] | None
    method: str
    cost: Cost
    notes: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        texts = "" if self.per_text is None else f" over {len(self.per_text):,} texts"
        scored = np.flatnonzero(~np.isnan(self.mean))
        largest = scored[np.abs(self.mean[scored]).argsort(kind="stable")[::-1][:3]]
        names = ", ".join(f"{self.graph.names[edge]} {self.mean[edge]:+.3g}" for edge in largest)
        return f"EdgeScores({self.method}: {len(scored):,} of {len(self.graph):,} edges{texts}, {self.cost}; largest: {names or 'none'})"

    @property
    def signed(self) -> bool:
        """Whether a score's sign says if the edge holds the metric up (negative) or down; otherwise large means important."""
        return self.method not in UNSIGNED

    def __getitem__(self, edge: str) -> float:
        """Return the score of a named edge."""
        return float(self.mean[self.graph.index(edge)])

    def table(self) -> pd.DataFrame:
        """Return one row per edge: `edge`, `sender`, `receiver`, their layers, `score` and, with scores per text, `se`, `low`, `high`.

        Where scores have a sign also `p` and `q` of "the score is zero"; a score that is never negative cannot be zero but in every text.
        """
        graph = self.graph
        senders, receivers = graph.edges.T
        table = pd.DataFrame({"edge": graph.names})
        table["sender"] = np.array(graph.senders, dtype=object)[senders]
        table["receiver"] = np.array(graph.receivers, dtype=object)[receivers]
        table["sender_layer"] = np.array(graph.layer_of(graph.senders))[senders]
        table["receiver_layer"] = np.array(graph.layer_of(graph.receivers))[receivers]
        table["score"] = self.mean
        return _with_intervals(table, self.per_text, tested=self.signed)

    def node_table(self) -> pd.DataFrame:
        """Return one row per sender: `node`, `layer`, `score` (sum of its outgoing edges) and intervals as in `table`."""
        graph = self.graph
        table = pd.DataFrame({"node": graph.senders, "layer": graph.layer_of(graph.senders)})
        table["score"] = sums_by_node(graph, self.mean)
        return _with_intervals(table, None if self.per_text is None else sums_by_node(graph, self.per_text), tested=self.signed)


def _with_intervals(table: pd.DataFrame, per_text: np.ndarray | None, *, tested: bool) -> pd.DataFrame:
    table["n"] = 0
    if per_text is not None:
        estimate = paired_difference(per_text.astype(np.float64), np.zeros_like(per_text, dtype=np.float64))
        table["n"] = estimate.n.astype(int)
        table["se"], table["low"], table["high"] = estimate.standard_error, estimate.low, estimate.high
        if tested:
            table["p"], table["q"] = estimate.p, benjamini_hochberg(estimate.p)
    return table


def to_json(
    circuit: Circuit,
    scores: EdgeScores | None = None,
    *,
    d_model: int | None = None,
    model: str | None = None,
    fingerprint: str | None = None,
) -> str:
    """Write a circuit in the format of MIB and EAP-IG.

    Args:
        circuit: Which edges.
        scores: The scores of all edges; 0 without, and for edges that were not scored.
        d_model: Width of the residual stream; EAP-IG's own reader does not read a file without it.
        model: Where the model came from; kept under `mechscope`, which other readers ignore.
        fingerprint: The model's hash, so that the file is not taken for another model's.
    """
    graph = circuit.graph
    values = np.zeros(len(graph)) if scores is None else np.nan_to_num(scores.mean.astype(np.float64))
    by_node = sums_by_node(graph, values)
    nodes: dict[str, dict[str, Any]] = {
        _in_file(name): {"in_graph": bool(inside), "score": float(by_node[place])}
        for place, (name, inside) in enumerate(zip(graph.senders, circuit.nodes, strict=True))
    }
    nodes["logits"] = {"in_graph": bool(circuit.edges[graph.edges[:, 1] == len(graph.receivers) - 1].any())}
    edges = {
        _in_file(name): {"score": float(value), "in_graph": bool(inside)}
        for name, value, inside in zip(graph.names, values, circuit.edges, strict=True)
    }
    cfg = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel}
    if d_model is not None:
        cfg["d_model"] = d_model
    about = {"model": model, "fingerprint": fingerprint, "method": None if scores is None else scores.method}
    return json.dumps({"cfg": cfg, "nodes": nodes, "edges": edges, "mechscope": about})


def _in_file(name: str) -> str:
    """Return what the format calls a node, or an edge by its nodes: the sender before the first block is `input` there."""
    return re.sub(r"^embed\b", "input", name)


def from_json(source: str | Path, graph: Graph, *, fingerprint: str | None = None) -> tuple[Circuit, Float[np.ndarray, " edge"]]:
    """Read a circuit of a model from a file in the format of MIB and EAP-IG.

    Args:
        source: The file.
        graph: The model's graph.
        fingerprint: The model's hash; a file that says it belongs to another one is refused.

    Returns:
        The circuit, and the scores of all edges (0 for edges the file does not name).

    Raises:
        DataError: The file cannot be read, is not of this format, belongs to another model, or takes single neurons.
    """
    try:
        held = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"circuit file {str(source)!r} cannot be read: {error}") from error
    if not isinstance(held, dict) or not all(isinstance(held.get(part), dict) for part in ("cfg", "nodes", "edges")):
        raise DataError(f"circuit file {str(source)!r} is not in the format of MIB/EAP-IG: it needs 'cfg', 'nodes' and 'edges'")
    cfg = held["cfg"]
    own = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel}
    for name, expected in own.items():
        if name not in cfg:
            raise DataError(
                f"circuit file {str(source)!r} does not say of which model it is: 'cfg' needs {', '.join(own)}, it lacks {name}"
            )
        if cfg[name] != expected:
            raise DataError(f"circuit file {str(source)!r} is of another model: {name} is {cfg[name]} there and {expected} here")
    about = held["mechscope"] if isinstance(held.get("mechscope"), dict) else {}
    if fingerprint and about.get("fingerprint") and about["fingerprint"] != fingerprint:
        raise DataError(
            f"circuit file {str(source)!r} was made of {about.get('model') or 'another model'} with other weights "
            f"({str(about['fingerprint'])[:12]}…, this model is {fingerprint[:12]}…): discover the circuit of this model, or read without a fingerprint"
        )
    for name, node in held["nodes"].items():
        if isinstance(node, dict) and not all(node.get("neurons") or ()):
            raise DataError(
                f"circuit file {str(source)!r} takes single neurons of {name!r}: only circuits of whole heads and MLPs can be read"
            )
    edges, scores = np.zeros(len(graph), dtype=bool), np.zeros(len(graph))
    places = {_in_file(name): place for place, name in enumerate(graph.names)}
    for name, entry in held["edges"].items():
        if name not in places:
            raise DataError(f"circuit file {str(source)!r} names edge {name!r}, which this model does not have")
        if not isinstance(entry, dict) or not isinstance(entry.get("in_graph"), bool | int):
            raise DataError(f"circuit file {str(source)!r}: edge {name!r} says nothing of 'in_graph'")
        score = entry.get("score")
        if score is not None and not isinstance(score, float | int):
            raise DataError(f"circuit file {str(source)!r}: the score of edge {name!r} is {score!r}, not a number")
        edges[places[name]] = bool(entry["in_graph"])
        scores[places[name]] = float(score or 0.0)
    return Circuit(graph, edges), scores
