"""Attribution graphs as circuit-tracer's frontend reads them: `SLUG.json` with nodes and links, and its entry in `graph-metadata.json`.

Schema version 1: a latent's `feature` is the Cantor pairing of its layer and its index, layers are texts (`E` for the embedding, the number of layers plus one
for logits), a link's weight is the edge. Errors have ids of their own (`error_3_5`): circuit-tracer writes `0_3_5`, which latent 3 of layer 0 at position 5
has as well, and whose edges the frontend would then mix up; it reads nothing off an id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mechscope.errors import RunError
from mechscope.features.graphs import AttributionGraph, Pruned
from mechscope.store.files import reading, write_text

_TYPES = {"latent": "cross layer transcoder", "error": "mlp reconstruction error", "token": "embedding", "logit": "logit"}
METADATA = "graph-metadata.json"


def write_circuit_tracer_graph(
    graph: AttributionGraph,
    left: Pruned,
    folder: str | Path,
    *,
    slug: str,
    prompt: str,
    tokens: Sequence[str],
    likeliest: Sequence[str],
    scan: str = "",
    node_share: float = 0.8,
    groups: Sequence[tuple[str, Sequence[str]]] = (),
) -> Path:
    """Write a pruned graph for circuit-tracer's frontend.

    Args:
        graph: The graph.
        left: What is left of it.
        folder: Where; an entry is added to the list of graphs that is there.
        slug: The graph's name: letters, digits, hyphens.
        prompt: The prompt as text.
        tokens: Its tokens as text.
        likeliest: The logits' tokens as text, in the order of their nodes.
        scan: What circuit-tracer calls the transcoders.
        node_share: Share of influence that was kept.
        groups: Supernodes: names with their nodes.

    Returns:
        The graph's file.

    Raises:
        RunError: The folder cannot be written, or what is there is no list of graphs.
    """
    kept = np.flatnonzero(left.nodes)
    written = iter(likeliest)
    nodes = {int(at): _node(graph, left, int(at), next(written) if graph.nodes["kind"][at] == "logit" else "") for at in kept}
    links = left.edges.tocoo()
    by_name = {graph.nodes["node"][at]: node["node_id"] for at, node in nodes.items()}
    metadata = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": list(tokens),
        "prompt": prompt,
        "node_threshold": node_share,
        "schema_version": 1,
    }
    supernodes = [[name, *(by_name[node] for node in members if node in by_name)] for name, members in groups]
    content = {
        "metadata": metadata,
        "qParams": {
            "pinnedIds": [node for group in supernodes for node in group[1:]],
            "supernodes": supernodes,
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": list(nodes.values()),
        "links": [
            {"source": nodes[int(source)]["node_id"], "target": nodes[int(target)]["node_id"], "weight": float(weight)}
            for target, source, weight in zip(links.row, links.col, links.data, strict=True)
        ],
    }
    folder = Path(folder)
    listed = _listed(folder / METADATA)
    write_text(json.dumps(content, indent=1, allow_nan=False), folder / f"{slug}.json")
    write_text(json.dumps({"graphs": [*(each for each in listed if each.get("slug") != slug), metadata]}, indent=1), folder / METADATA)
    return folder / f"{slug}.json"


def _listed(path: Path) -> list[dict[str, Any]]:
    """Return the entries of the graphs that are there already."""
    if not path.is_file():
        return []
    with reading(path):
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("graphs"), list):
        raise RunError(f"{path} holds no list of circuit-tracer's graphs: give another folder")
    return list(found["graphs"])


def _node(graph: AttributionGraph, left: Pruned, at: int, token: str) -> dict[str, Any]:
    row = graph.nodes.iloc[at]
    kind, layer, position, index = str(row["kind"]), int(row["layer"]), int(row["position"]), int(row["index"])
    top = str(graph.layers + 1)
    ids = {
        "latent": (f"{layer}_{index}_{position}", f"{layer}_{index}-0", str(layer), paired(layer, index)),
        "error": (f"error_{layer}_{position}", f"error_{layer}_{position}-0", str(layer), -1),
        "token": (f"E_{index}_{position}", f"E_{index}-{position}", "E", position),
        "logit": (f"{top}_{index}_{position}", f"L_{index}-{position}", top, index),
    }
    node_id, script_id, where, feature = ids[kind]
    probability = float(row["probability"]) if kind == "logit" else 0.0
    first = kind == "logit" and at == graph.where("logit")[0]
    return {
        "node_id": node_id,
        "feature": feature,
        "layer": where,
        "ctx_idx": position,
        "feature_type": _TYPES[kind],
        "token_prob": probability,
        "is_target_logit": bool(first),
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": script_id,
        "clerp": f'Output "{token}" (p={probability:.3f})' if kind == "logit" else "",
        # cumulative, as the frontend's slider reads it
        "influence": None if kind == "logit" else float(left.cumulative[at]),
        "activation": float(row["value"]) if kind == "latent" else None,
    }


def paired(layer: int, index: int) -> int:
    """Return the Cantor pairing of two numbers."""
    return (layer + index) * (layer + index + 1) // 2 + index
