"""The graph has the edges a transformer has, its orders and names agree, and circuits are sets of them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from mechscope.circuits.graph import Circuit, Graph, edges_at, sums_by_node
from mechscope.errors import SettingsError
from tests import families

PLAIN, PARALLEL = Graph(3, 2), Graph(3, 2, parallel=True)
GRAPHS = [PLAIN, PARALLEL, Graph(1, 1), Graph(2, 5), Graph(4, 1, parallel=True)]


def place(node: str) -> tuple[int, int]:
    """Return when a node computes: its layer, and 0 for heads or 1 for the MLP."""
    if node in ("embed", "logits"):
        return (-1, 0) if node == "embed" else (10**6, 0)
    return (int(node[1:].partition(".")[0]), int(node[0] == "m"))


def reads(sender: str, receiver: str, *, parallel: bool) -> bool:
    """Tell whether a receiver reads a sender, from the picture of a transformer."""
    (one, kind), (two, other) = place(sender), place(receiver.partition("<")[0])
    return one < two or (one == two and (kind, other) == (0, 1) and not parallel)


def paths(circuit: Circuit) -> set[str]:
    """Return the edges on any path from input to logits, by walking every path."""
    following: dict[str, list[str]] = {}
    for name in circuit.names:
        following.setdefault(name.partition("->")[0], []).append(name)
    found: set[str] = set()

    def walk(node: str, taken: tuple[str, ...]) -> None:
        if node == "logits":
            found.update(taken)
        for edge in following.get(node, ()):
            walk(edge.partition("->")[2].partition("<")[0], (*taken, edge))

    walk("embed", ())
    return found


def random_circuits(graph: Graph, n: int = 30) -> list[Circuit]:
    generator = np.random.default_rng(0)
    return [Circuit(graph, generator.random(len(graph)) < generator.uniform(0.02, 0.3)) for _ in range(n)]


# edges


@pytest.mark.parametrize("graph", GRAPHS)
def test_there_is_an_edge_exactly_where_a_part_reads_what_was_written_before_it(graph: Graph) -> None:
    every = [(sender, receiver) for sender in graph.senders for receiver in graph.receivers]
    expected = {f"{sender}->{receiver}" for sender, receiver in every if reads(sender, receiver, parallel=graph.parallel)}
    assert len(graph.names) == len(set(graph.names))
    assert set(graph.names) == expected


@pytest.mark.parametrize(("layers", "heads", "parallel", "count"), [(12, 12, False, 32_491), (12, 12, True, 32_347), (1, 1, False, 8)])
def test_gpt2_small_has_as_many_edges_as_the_literature_says(layers: int, heads: int, parallel: bool, count: int) -> None:
    graph = Graph(layers, heads, parallel)
    # before layer l there are 1 + l (h + 1) senders: 3 h queries, keys and values and an MLP read them, then the logits read all
    before = [1 + layer * (heads + 1) for layer in range(layers + 1)]
    formula = sum(n * (3 * heads + 1) + (0 if parallel else heads) for n in before[:-1]) + before[-1]
    assert len(graph) == formula == count


def test_a_parallel_model_lacks_only_the_edges_from_heads_to_the_mlp_beside_them() -> None:
    missing = set(PLAIN.names) - set(PARALLEL.names)
    assert missing == {f"a{layer}.h{head}->m{layer}" for layer in range(3) for head in range(2)}
    assert set(PARALLEL.names) < set(PLAIN.names)


def test_names_are_those_of_the_published_format() -> None:
    assert PLAIN.senders == ("embed", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1", "a2.h0", "a2.h1", "m2")
    assert PLAIN.receivers[:8] == ("a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0", "a1.h0<q>")
    assert PLAIN.receivers[-2:] == ("m2", "logits")
    assert {"embed->a0.h0<q>", "m0->logits", "a0.h1->m0", "m1->a2.h0<v>", "embed->logits"} <= set(PLAIN.names)


@pytest.mark.parametrize("graph", GRAPHS)
def test_names_indices_and_matrices_speak_of_the_same_edges(graph: Graph) -> None:
    assert [graph.index(name) for name in graph.names] == list(range(len(graph)))
    values = np.random.default_rng(1).random((2, 3, len(graph)))
    laid = graph.matrix(values, fill=np.nan)
    np.testing.assert_array_equal(graph.flat(laid), values)
    assert np.isnan(laid).sum() == 6 * (len(graph.senders) * len(graph.receivers) - len(graph))
    for at, name in enumerate(graph.names):
        sender, _, receiver = name.partition("->")
        assert laid[1, 2, graph.senders.index(sender), graph.receivers.index(receiver)] == values[1, 2, at]


@pytest.mark.parametrize("graph", GRAPHS)
def test_senders_and_receivers_stand_in_topological_order(graph: Graph) -> None:
    for sender, receiver in graph.edges:
        assert sender < graph.owner[receiver]
    # what a receiver belongs to writes only after everything it reads
    for receiver, owner in enumerate(graph.owner[:-1]):
        assert graph.receivers[receiver].partition("<")[0] == graph.senders[owner]
    assert graph.owner[-1] == len(graph.senders)
    assert (np.diff(graph.edges[:, 0]) >= 0).all()


@pytest.mark.parametrize("graph", GRAPHS)
def test_slices_of_a_layer_are_that_layers(graph: Graph) -> None:
    for layer in range(graph.n_layers):
        assert graph.senders[graph.heads_of(layer)] == tuple(f"a{layer}.h{head}" for head in range(graph.n_heads))
        assert graph.senders[graph.mlp_sender(layer)] == graph.receivers[graph.mlp_reader(layer)] == f"m{layer}"
        assert all(name.startswith(f"a{layer}.") for name in graph.receivers[graph.readers_of(layer)])
        assert graph.before_mlp(layer) == graph.real[:, graph.mlp_reader(layer)].sum()
    assert graph.layer_of(["embed", "a0.h0", "m0", "a0.h0<k>", "logits"]) == [-1, 0, 0, 0, graph.n_layers]


def test_layers_and_heads_of_two_digits_are_told_apart() -> None:
    graph = Graph(12, 12)
    assert graph.layer_of(["a11.h10<v>", "a1.h11", "m11", "m1"]) == [11, 1, 11, 1]
    assert Circuit.of(graph, ["a1.h11->m11"]).components().heads == ((1, 11),)


@pytest.mark.parametrize(("family", "parallel"), [("gpt2", False), ("gpt_neox", True), ("llama", False), ("phi", True)])
def test_the_graph_of_a_model_has_its_query_heads_and_its_kind_of_block(family: str, parallel: bool) -> None:
    assert Graph.of(families.subject(family)) == Graph(families.LAYERS, families.HEADS, parallel)


@pytest.mark.parametrize(
    ("graph", "edge", "says"),
    [
        (PLAIN, "m1->a0.h0<q>", "does not exist: a part reads only what was written before it"),
        (PLAIN, "m1->m1", "a part reads only what was written before it"),
        (PLAIN, "a1.h0->a1.h1<k>", "a part reads only what was written before it"),
        (PARALLEL, "a1.h0->m1", "the MLP of a parallel block does not read its heads"),
        (PARALLEL, "m1->a0.h0<q>", "a part reads only what was written before it"),
        (PARALLEL, "a2.h0->m1", "a part reads only what was written before it"),
        (PLAIN, "a3.h0->logits", r"'a3.h0' is not one of this graph's .* layers 0-2 with heads 0-1"),
        (PLAIN, "embed->a0.h0", "'a0.h0' is not one of this graph's"),
        (PLAIN, "logits->m0", "'logits' is not one of this graph's"),
        (PLAIN, "embed, m0", "is not understood: write a0.h3->m5"),
    ],
)
def test_an_edge_that_does_not_exist_is_refused_with_the_reason(graph: Graph, edge: str, says: str) -> None:
    for ask in (graph.index, lambda name: Circuit.of(graph, [name])):
        with pytest.raises(SettingsError, match=says) as caught:
            ask(edge)
        assert edge in str(caught.value)


# circuits


@pytest.mark.parametrize("graph", [PLAIN, PARALLEL])
def test_pruning_leaves_exactly_the_edges_on_paths_from_input_to_logits(graph: Graph) -> None:
    sizes = []
    for circuit in random_circuits(graph):
        pruned = circuit.pruned()
        assert set(pruned.names) == paths(circuit)
        assert pruned.pruned() == pruned
        sizes.append((len(circuit), len(pruned)))
    assert any(0 < after < before for before, after in sizes)  # or the search had nothing to do
    assert Circuit.full(graph).pruned() == Circuit.full(graph)
    assert len(Circuit.empty(graph).pruned()) == 0


def test_a_path_goes_through_a_head_by_its_query_key_or_value() -> None:
    for part in "qkv":
        kept = Circuit.of(PLAIN, [f"embed->a0.h1<{part}>", "a0.h1->m2", "m2->logits"])
        assert kept.pruned() == kept
        broken = Circuit.of(PLAIN, [f"embed->a0.h0<{part}>", "a0.h1->m2", "m2->logits"])
        assert len(broken.pruned()) == 0


@pytest.mark.parametrize("graph", [PLAIN, PARALLEL])
def test_without_a_node_no_edge_touches_it_and_all_others_stay(graph: Graph) -> None:
    def ends(name: str) -> set[str]:
        sender, _, receiver = name.partition("->")
        return {sender, receiver.partition("<")[0]}

    for circuit in random_circuits(graph, 5):
        for nodes in combinations(graph.senders, 2):
            assert set(circuit.without(nodes).names) == {name for name in circuit.names if not ends(name) & set(nodes)}
    for node in ("logits", "a0.h0<q>", "m3"):
        with pytest.raises(SettingsError, match=f"node '{node}' is not one of this graph's"):
            edges_at(graph, [node])


def test_circuits_combine_like_sets_of_names() -> None:
    one, two = random_circuits(PLAIN)[-2:]
    assert set(one.names) & set(two.names)
    for found, expected in (
        (one | two, set(one.names) | set(two.names)),
        (one & two, set(one.names) & set(two.names)),
        (one - two, set(one.names) - set(two.names)),
    ):
        assert set(found.names) == expected
        assert len(found) == len(expected)
    assert Circuit.of(PLAIN, one.names) == one != two
    assert Circuit.of(PLAIN, []) == Circuit.empty(PLAIN)
    assert len(Circuit.full(PLAIN)) == len(PLAIN)


@pytest.mark.parametrize("other", [Graph(3, 3), PARALLEL])
def test_circuits_of_different_models_are_neither_equal_nor_combined(other: Graph) -> None:
    one, two = Circuit.full(PLAIN), Circuit.full(other)
    assert one != two
    for combine in (Circuit.__or__, Circuit.__and__, Circuit.__sub__):
        with pytest.raises(SettingsError, match=f"circuits of different models .* {len(PLAIN)} edges .* {len(other)}"):
            combine(one, two)


def test_a_set_of_edges_of_another_size_or_kind_is_refused() -> None:
    for edges in (np.ones(len(PLAIN) - 1, dtype=bool), np.ones(len(PLAIN)), np.ones((1, len(PLAIN)), dtype=bool)):
        with pytest.raises(SettingsError, match=f"a circuit of this model has {len(PLAIN)} edges as true or false"):
            Circuit(PLAIN, edges)


def test_the_parts_of_a_circuit_are_what_its_edges_begin_or_end_at() -> None:
    circuit = Circuit.of(PLAIN, ["embed->a0.h1<k>", "a1.h0->m1", "m2->logits"])
    assert {name for name, inside in zip(PLAIN.senders, circuit.nodes, strict=True) if inside} == {"embed", "a0.h1", "a1.h0", "m1", "m2"}
    found = circuit.components()
    assert found.heads == ((0, 1), (1, 0))
    assert found.mlps == (1, 2)
    assert not Circuit.empty(PLAIN).nodes.any()


def test_a_nodes_sum_is_over_the_edges_that_leave_it() -> None:
    values = np.random.default_rng(2).normal(size=(4, len(PLAIN)))
    found = sums_by_node(PLAIN, values)
    for place_, sender in enumerate(PLAIN.senders):
        leaving = [at for at, name in enumerate(PLAIN.names) if name.startswith(f"{sender}->")]
        np.testing.assert_allclose(found[:, place_], values[:, leaving].sum(1), rtol=0, atol=1e-12)
