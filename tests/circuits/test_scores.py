"""Scores come with intervals, and circuits travel in the JSON of MIB and EAP-IG: out and back, and from their own files."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.scores import Cost, EdgeScores, from_json, to_json
from mechscope.errors import DataError
from tests.stats.skewed import mean_test

GRAPH, PARALLEL = Graph(2, 2), Graph(2, 2, parallel=True)


def some_scores(graph: Graph = GRAPH, texts: int = 6, dtype: Any = np.float64) -> EdgeScores:
    per_text = np.random.default_rng(0).normal(size=(texts, len(graph))).astype(dtype)
    return EdgeScores(graph, per_text.mean(0, dtype=np.float64), per_text, "eap-ig", Cost(7, 5))


def some_circuit(graph: Graph = GRAPH) -> Circuit:
    return Circuit(graph, np.random.default_rng(1).random(len(graph)) < 0.4)


def written(folder: Path, content: Any) -> Path:
    file = folder / "circuit.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def ours(name: str) -> str:
    """Return what an edge of a file is called here."""
    return name.replace("input->", "embed->")


def theirs() -> dict[str, Any]:
    """A circuit as EAP-IG writes it: one layer, two heads; the head a0.h1 reads the input and writes to the logits, past the MLP."""
    nodes = {"input": True, "a0.h0": False, "a0.h1": True, "m0": False, "logits": True}
    readers = [f"a0.h{head}<{part}>" for head, part in product(range(2), "qkv")]
    names = [f"input->{name}" for name in [*readers, "m0", "logits"]] + [
        "a0.h0->m0",
        "a0.h1->m0",
        "a0.h0->logits",
        "a0.h1->logits",
        "m0->logits",
    ]
    inside = {"input->a0.h1<q>", "input->a0.h1<v>", "a0.h1->logits"}
    return {
        "cfg": {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8},
        "nodes": {name: {"in_graph": here} | ({} if name == "logits" else {"score": 0.5}) for name, here in nodes.items()},
        "edges": {name: {"score": 0.25 * at - 1.0, "in_graph": name in inside} for at, name in enumerate(names)},
    }


# tables


def test_an_edges_interval_and_p_are_those_of_its_mean_over_texts() -> None:
    scores = some_scores()
    assert scores.per_text is not None
    table = scores.table()
    low, high, p = mean_test(scores.per_text)
    for name, values in (
        ("score", scores.per_text.mean(0)),
        ("se", stats.sem(scores.per_text)),
        ("low", low),
        ("high", high),
        ("p", p),
        ("q", stats.false_discovery_control(p)),
    ):
        np.testing.assert_allclose(table[name], values, rtol=0, atol=1e-12)
    assert (table["n"] == 6).all()


def test_a_nodes_interval_is_that_of_the_sum_of_its_outgoing_edges() -> None:
    scores = some_scores()
    assert scores.per_text is not None
    table = scores.node_table().set_index("node")
    for node in GRAPH.senders:
        leaving = [at for at, name in enumerate(GRAPH.names) if name.startswith(f"{node}->")]
        sums = scores.per_text[:, leaving].sum(1)
        low, high, p = mean_test(sums)
        row = table.loc[node]
        np.testing.assert_allclose([row["score"], row["low"], row["high"]], [sums.mean(), low, high], rtol=0, atol=1e-12)
        assert row["p"] == pytest.approx(p, abs=1e-12)
    assert table["layer"].tolist() == [-1, 0, 0, 0, 1, 1, 1]


def test_a_row_says_where_its_edge_begins_and_ends() -> None:
    row = some_scores().table().set_index("edge").loc["a0.h1->a1.h0<k>"]
    assert (row["sender"], row["receiver"], row["sender_layer"], row["receiver_layer"]) == ("a0.h1", "a1.h0<k>", 0, 1)
    assert row["score"] == some_scores()["a0.h1->a1.h0<k>"]


def test_edges_that_were_not_scored_have_no_score_no_interval_and_do_not_count_as_tests() -> None:
    scores = some_scores()
    assert scores.per_text is not None
    chosen = some_circuit().edges
    per_text = np.where(chosen, scores.per_text, np.nan)
    table = EdgeScores(GRAPH, np.where(chosen, scores.mean, np.nan), per_text, "exact", Cost(1, 0)).table()
    assert table[~chosen][["score", "se", "low", "high", "p", "q"]].isna().all().all()
    assert table["n"].tolist() == np.where(chosen, 6, 0).tolist()
    *_, p = mean_test(scores.per_text[:, chosen])
    np.testing.assert_allclose(table["q"][chosen], stats.false_discovery_control(p), rtol=0, atol=1e-12)


def test_a_node_with_an_edge_that_was_not_scored_has_no_sum() -> None:
    mean = np.ones(len(GRAPH))
    mean[GRAPH.index("m0->logits")] = np.nan
    table = EdgeScores(GRAPH, mean, mean[None].repeat(3, 0), "exact", Cost(1, 0)).node_table().set_index("node")
    assert table["score"].isna().tolist() == [node == "m0" for node in GRAPH.senders]


def test_without_scores_of_single_texts_a_table_has_no_intervals() -> None:
    scores = some_scores()
    bare = EdgeScores(GRAPH, scores.mean, None, "acdc", Cost(1, 0))
    for table in (bare.table(), bare.node_table()):
        assert (table["n"] == 0).all()
        assert not {"se", "low", "high", "p", "q"} & set(table.columns)


def test_a_cost_reads_as_a_sentence() -> None:
    assert str(Cost(7, 5)) == "7 forward, 5 backward passes"
    assert str(Cost(16.5, 0)) == "16.5 forward, 0 backward passes"


# out and back


@pytest.mark.parametrize("graph", [GRAPH, PARALLEL])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_circuit_comes_back_with_every_edge_and_every_bit_of_its_scores(tmp_path: Path, graph: Graph, dtype: Any) -> None:
    circuit, scores = some_circuit(graph), some_scores(graph, dtype=dtype)
    file = written(tmp_path, to_json(circuit, scores, d_model=32, model="some/model", fingerprint="abc"))
    found, values = from_json(file, graph, fingerprint="abc")
    assert found == circuit
    np.testing.assert_array_equal(values, scores.mean)


def test_without_scores_and_for_edges_not_scored_zeros_are_written(tmp_path: Path) -> None:
    circuit, scores = some_circuit(), some_scores()
    _, values = from_json(written(tmp_path, to_json(circuit)), GRAPH)
    assert not values.any()
    mean = np.where(circuit.edges, scores.mean, np.nan)
    text = to_json(circuit, EdgeScores(GRAPH, mean, None, "exact", Cost(1, 0)))
    assert "NaN" not in text  # which is no JSON
    np.testing.assert_array_equal(from_json(written(tmp_path, text), GRAPH)[1], np.where(circuit.edges, scores.mean, 0.0))


@pytest.mark.parametrize("graph", [GRAPH, PARALLEL])
def test_a_file_has_what_the_reader_of_eap_ig_asks_for(graph: Graph) -> None:
    scores, circuit = some_scores(graph), some_circuit(graph)
    held = json.loads(to_json(circuit, scores, d_model=32))
    assert held["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": graph.parallel, "d_model": 32}
    # it looks every node and edge up by name in the graph it builds from cfg, and sets a node's score as it stands
    assert list(held["nodes"]) == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1", "logits"]
    assert all(isinstance(node["in_graph"], bool) for node in held["nodes"].values())
    assert all(isinstance(held["nodes"][name]["score"], float) for name in ("input", *graph.senders[1:]))
    stream, expected = ["input"], []
    for layer in range(2):
        heads = [f"a{layer}.h{head}" for head in range(2)]
        expected += [f"{sender}->{head}<{part}>" for sender, head, part in product(stream, heads, "qkv")]
        expected += [f"{sender}->m{layer}" for sender in (stream if graph.parallel else stream + heads)]
        stream = [*stream, *heads, f"m{layer}"]
    expected += [f"{sender}->logits" for sender in stream]
    assert set(held["edges"]) == set(expected)
    for name, edge in held["edges"].items():
        assert edge == {"score": scores[ours(name)], "in_graph": ours(name) in circuit.names}


# their files


def test_a_file_of_eap_ig_is_read(tmp_path: Path) -> None:
    held = theirs()
    circuit, values = from_json(written(tmp_path, held), Graph(1, 2))
    assert set(circuit.names) == {"embed->a0.h1<q>", "embed->a0.h1<v>", "a0.h1->logits"}
    for at, name in enumerate(held["edges"]):  # their order is not ours
        assert values[Graph(1, 2).index(ours(name))] == 0.25 * at - 1.0


def test_edges_a_file_does_not_name_are_outside_and_null_is_no_score(tmp_path: Path) -> None:
    held = theirs()
    del held["edges"]["input->logits"]
    held["edges"]["m0->logits"]["score"] = None
    del held["edges"]["a0.h0->m0"]["score"]
    circuit, values = from_json(written(tmp_path, held), Graph(1, 2))
    for name in ("embed->logits", "m0->logits", "a0.h0->m0"):
        assert values[Graph(1, 2).index(name)] == 0
        assert name not in circuit.names


def changed(**parts: Any) -> dict[str, Any]:
    return {**theirs(), **parts}


def with_edge(name: str, entry: Any) -> dict[str, Any]:
    return changed(edges={**theirs()["edges"], name: entry})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{'cfg': 1}", "cannot be read"),
        ("", "cannot be read"),
        ([], "is not in the format of MIB/EAP-IG: it needs 'cfg', 'nodes' and 'edges'"),
        ({"cfg": {}, "nodes": {}}, "it needs 'cfg', 'nodes' and 'edges'"),
        (changed(edges=[]), "it needs 'cfg', 'nodes' and 'edges'"),
        (changed(cfg={"n_layers": 1}), "'cfg' needs n_layers, n_heads, parallel_attn_mlp, it lacks n_heads"),
        (changed(cfg={**theirs()["cfg"], "n_layers": 2}), "is of another model: n_layers is 2 there and 1 here"),
        (changed(cfg={**theirs()["cfg"], "n_heads": 12}), "is of another model: n_heads is 12 there and 2 here"),
        (changed(cfg={**theirs()["cfg"], "parallel_attn_mlp": True}), "parallel_attn_mlp is True there and False here"),
        (with_edge("a0.h0->a0.h1<q>", {"score": 1.0, "in_graph": True}), "names edge 'a0.h0->a0.h1<q>', which this model does not have"),
        (with_edge("m0->logits", {"score": 1.0}), "edge 'm0->logits' says nothing of 'in_graph'"),
        (with_edge("m0->logits", True), "edge 'm0->logits' says nothing of 'in_graph'"),
        (with_edge("m0->logits", {"score": "high", "in_graph": True}), "the score of edge 'm0->logits' is 'high', not a number"),
        (with_edge("m0->logits", {"score": [1.0], "in_graph": True}), "the score of edge 'm0->logits' is .*, not a number"),
        (
            changed(nodes={**theirs()["nodes"], "m0": {"in_graph": True, "neurons": [True, False]}}),
            "takes single neurons of 'm0'",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name_and_reason(tmp_path: Path, content: Any, says: str) -> None:
    file = written(tmp_path, content)
    with pytest.raises(DataError, match=says) as caught:
        from_json(file, Graph(1, 2))
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_not_text_or_a_directory_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "circuit.json"
    binary.write_bytes(b"\xff\xfe{}")
    for file in (tmp_path / "none.json", binary, tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            from_json(file, GRAPH)


def test_a_file_whose_neurons_are_all_in_is_of_whole_nodes(tmp_path: Path) -> None:
    held = theirs()
    held["nodes"]["m0"]["neurons"] = [True] * 8
    assert len(from_json(written(tmp_path, held), Graph(1, 2))[0]) == 3


def test_a_circuit_of_other_weights_is_refused_only_where_both_say_whose_they_are(tmp_path: Path) -> None:
    circuit = some_circuit()
    named = written(tmp_path, to_json(circuit, model="some/model", fingerprint="1234567890abcdef"))
    with pytest.raises(DataError, match=r"was made of some/model with other weights .1234567890ab…, this model is fedcba098765…"):
        from_json(named, GRAPH, fingerprint="fedcba0987654321")
    assert from_json(named, GRAPH)[0] == circuit
    odd: tuple[Any, ...] = (None, [], {"fingerprint": 5})
    for about in odd:
        file = written(tmp_path, {**json.loads(to_json(circuit)), "mechscope": about})
        assert from_json(file, GRAPH)[0] == circuit
    with pytest.raises(DataError, match=r"another model with other weights .5…"):
        from_json(file, GRAPH, fingerprint="abc")
    assert from_json(written(tmp_path, to_json(circuit)), GRAPH, fingerprint="abc")[0] == circuit


def test_scores_without_a_sign_are_not_tested_against_zero_which_they_exceed_in_every_text() -> None:
    scores = some_scores()
    assert scores.per_text is not None
    unsigned = EdgeScores(GRAPH, np.abs(scores.mean), np.abs(scores.per_text), "flow-routes", Cost(1, 0))
    for table in (unsigned.table(), unsigned.node_table()):
        assert {"se", "low", "high"} <= set(table.columns)
        assert not {"p", "q"} & set(table.columns)
