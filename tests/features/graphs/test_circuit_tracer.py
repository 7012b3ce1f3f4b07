"""A graph that circuit-tracer's frontend is given says the same: read back as its script reads it, node by node and link by link."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mechscope.errors import RunError
from mechscope.features.formats.circuit_tracer_graph import write_circuit_tracer_graph
from mechscope.features.graphs import AttributionGraph, Pruned, attribution_graph, pruned
from mechscope.settings.graph import GraphSettings
from tests.features.graphs.made import DICTIONARIES, IDS, subject

# what its pydantic models ask for (circuit_tracer/frontend/graph_models.py at 4bb8c0e), with their types
NODE: dict[str, type] = {
    "node_id": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "token_prob": float,
    "is_target_logit": bool,
    "jsNodeId": str,
}
METADATA: dict[str, type] = {
    "slug": str,
    "scan": str,
    "transcoder_list": list,
    "prompt_tokens": list,
    "prompt": str,
    "node_threshold": float,
    "schema_version": int,
}
QUERY: dict[str, type] = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}


def made() -> tuple[AttributionGraph, Pruned]:
    graph = attribution_graph(subject("gpt2"), DICTIONARIES["transcoders"](), IDS, settings=GraphSettings(logits=3, probability=1.0))
    return graph, pruned(graph.edges, graph.weights, graph.nodes, node_share=0.95)


def unpaired(number: int) -> tuple[int, int]:
    """Invert the Cantor pairing, as `util.cantorUnpair` does."""
    w = math.floor((math.sqrt(8 * number + 1) - 1) / 2)
    y = number - w * (w + 1) // 2
    return w - y, y


def as_read(content: dict[str, Any]) -> tuple[dict[str, str], dict[tuple[str, str], float]]:
    """Return nodes and links by names of ours, from what the frontend reads: type, layer, feature and position."""
    layers = max(int(node["layer"]) for node in content["nodes"] if node["feature_type"] != "logit" and node["layer"] != "E") + 1
    names = {}
    for node in content["nodes"]:
        position, feature = node["ctx_idx"], node["feature"]
        match node["feature_type"]:
            case "cross layer transcoder":
                layer, index = unpaired(feature)
                assert str(layer) == node["layer"]
                names[node["node_id"]] = f"m{layer}.f{index}@{position}"
            case "mlp reconstruction error":
                names[node["node_id"]] = f"m{node['layer']}.error@{position}"
            case "embedding":
                assert feature == position
                names[node["node_id"]] = f"embed@{position}"
            case "logit":
                assert int(node["layer"]) == layers + 1
                names[node["node_id"]] = f"logits.t{feature}@{position}"
                # the script cuts token and probability out of the label
                assert float(node["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(node["token_prob"], abs=6e-4)
    return names, {(names[link["source"]], names[link["target"]]): link["weight"] for link in content["links"]}


def test_nodes_and_links_are_read_back_as_they_were(tmp_path: Path) -> None:
    graph, left = made()
    tokens = [f"w{token}" for token in IDS]
    best = [f"w{index}" for index in graph.nodes["index"][graph.where("logit")]]
    group = (
        "mine",
        [name for name, kind in zip(graph.nodes["node"][left.nodes], graph.nodes["kind"][left.nodes], strict=True) if kind == "latent"][:2],
    )
    file = write_circuit_tracer_graph(
        graph, left, tmp_path, slug="one", prompt=" ".join(tokens), tokens=tokens, likeliest=best, scan="mine", groups=[group]
    )
    content = json.loads(file.read_text(encoding="utf-8"))
    for part, kinds in [(content["metadata"], METADATA), (content["qParams"], QUERY), *((node, NODE) for node in content["nodes"])]:
        assert {name: type(part[name]) for name in kinds} == kinds
    names, links = as_read(content)
    assert len(names) == len(content["nodes"]) == left.nodes.sum()
    assert sorted(names.values()) == sorted(graph.nodes["node"][left.nodes])
    expected = left.edges.tocoo()
    at = graph.nodes["node"].to_numpy()
    assert links == pytest.approx(
        {(at[source], at[target]): weight for target, source, weight in zip(expected.row, expected.col, expected.data, strict=True)}
    )
    values = dict(zip(graph.nodes["node"], graph.nodes["value"], strict=True))
    for node in content["nodes"]:
        if node["feature_type"] == "cross layer transcoder":
            assert node["activation"] == pytest.approx(values[names[node["node_id"]]])
    assert [node["is_target_logit"] for node in content["nodes"] if node["feature_type"] == "logit"] == [True, False, False]
    assert [[name, *(names[node] for node in nodes)] for name, *nodes in content["qParams"]["supernodes"]] == [["mine", *group[1]]]


def test_the_list_of_graphs_keeps_the_others_and_replaces_the_same(tmp_path: Path) -> None:
    graph, left = made()
    for slug in ("one", "two", "one"):
        write_circuit_tracer_graph(graph, left, tmp_path, slug=slug, prompt="", tokens=["t"] * 14, likeliest=["a", "b", "c"])
    listed = json.loads((tmp_path / "graph-metadata.json").read_text(encoding="utf-8"))["graphs"]
    assert [each["slug"] for each in listed] == ["two", "one"]
    (tmp_path / "graph-metadata.json").write_text("[]", encoding="utf-8")
    with pytest.raises(RunError, match="holds no list of circuit-tracer's graphs"):
        write_circuit_tracer_graph(graph, left, tmp_path, slug="one", prompt="", tokens=["t"] * 14, likeliest=["a", "b", "c"])
