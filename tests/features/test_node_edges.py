"""Edges between latents equal what a plain model with hooks says: brute-force differences, and sums where theory has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import false_discovery_control
from torch import Tensor

from mechscope.features import Place
from mechscope.features.node_edges import node_edges
from mechscope.features.node_effects import node_effects, quadrature_of
from mechscope.features.standing import Node
from tests.features.node_world import (
    PAIRS,
    POINTS,
    M,
    W,
    World,
    decoders,
    every_family,
    every_node,
    later,
    metric,
    parts,
)


@every_family
def test_by_attribution_a_nodes_effect_is_the_sum_of_its_edges(family: str) -> None:
    world, nodes = World(family, "corrupt"), every_node(family)
    table = node_edges(world.subject, world.standing, PAIRS, nodes, method="attribution")
    effects = node_effects(world.subject, world.standing, PAIRS, method="attribution").table.set_index("component")["effect"]
    sums = table.groupby("sender")["effect"].sum().reindex(effects.index, fill_value=0.0)
    np.testing.assert_allclose(sums, effects, rtol=1e-7, atol=1e-10)
    assert (table["receiver"] != "logits").sum() > 50


def arrivals(world: World, changed: dict[Place, Tensor]) -> dict[Place, Tensor]:
    """Return what arrives at every place when all of them are held: at what is given, or as they are."""
    found: dict[Place, Tensor] = {}

    def hold(place: Place) -> Callable[[Tensor], Tensor]:
        def put(x: Tensor) -> Tensor:
            found[place] = x
            return changed.get(place, world.x[place])

        return put

    metric(world.subject, PAIRS, {place: hold(place) for place in world.places})
    return found


def node_value(world: World, node: Node, arrived: dict[Place, Tensor]) -> Tensor:
    f, error = parts(next(each for each in world.standing if each.place == node.place), arrived[node.place])
    return (error if node.latent is None else f[..., node.latent, None]) * later(PAIRS)


def gradient(world: World, node: Node, x: Tensor | None = None) -> Tensor:
    """Return the derivative of the metric by a node's value at every token, where the model is or where x stands in its place."""
    each = next(one for one in world.standing if one.place == node.place)
    rows = torch.eye(W, dtype=torch.float64) if node.latent is None else decoders(each)[[node.latent]]
    value = torch.zeros(*world.x[node.place].shape[:2], len(rows), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        found = metric(world.subject, PAIRS, {node.place: lambda now: (now if x is None else x) + value @ rows})
        return torch.autograd.grad(found.sum(), value)[0]


@every_family
def test_edges_by_attribution_are_brute_force_differences(family: str) -> None:
    world = World(family, "corrupt")
    table = node_edges(world.subject, world.standing, PAIRS, every_node(family), method="attribution").set_index("edge")["effect"]
    step = 1e-5
    largest = table[[not edge.endswith("logits") for edge in table.index]].abs().sort_values(ascending=False).index
    into_errors = [edge for edge in largest if edge.endswith("error")][:2]
    for edge in (*largest[:4], *largest[40:44], *into_errors):
        sender, receiver = (Node.parse(part) for part in edge.split("->"))
        ends = [arrivals(world, {sender.place: world.x[sender.place] + sign * step * world.delta[sender]}) for sign in (1, -1)]
        moved = (node_value(world, receiver, ends[0]) - node_value(world, receiver, ends[1])) / (2 * step)
        expected = (gradient(world, receiver) * moved).sum((1, 2)).mean()
        np.testing.assert_allclose(table[edge], float(expected), rtol=1e-3, atol=1e-8)


def test_edges_that_are_zero_on_every_text_are_neither_rows_nor_tests() -> None:
    world = World("gpt2", "corrupt")
    # twice as many texts, as there are no tests of three
    table = node_edges(world.subject, world.standing, replace(PAIRS, pairs=PAIRS.pairs * 2), every_node("gpt2")[::3], method="attribution")
    silent = {node.name for node in every_node("gpt2") if not world.value[node].any()}
    assert silent & {node.name for node in every_node("gpt2")[::3]}
    assert not silent & set(table["sender"])
    assert not ((table["effect"] == 0) & (table["se"] == 0)).any()
    np.testing.assert_allclose(table["q"], false_discovery_control(table["p"]), rtol=1e-9)


def test_integrated_edges_of_a_place_add_up_to_what_it_does_to_a_node() -> None:
    # of rules without a jump: what leaves or enters by a jump has no derivative there
    world = World("llama", "corrupt", ("resid0", "a1", "m2"))
    receivers = [Node(Place.parse("m2"), latent) for latent in range(8)]
    senders = [node for each in world.standing[:2] for node in (*(Node(each.place, latent) for latent in range(M)), Node(each.place))]
    table = node_edges(world.subject, world.standing, PAIRS, [*senders, *receivers], points=POINTS)
    totals = table.assign(place=[Node.parse(name).place.name for name in table["sender"]]).groupby(["place", "receiver"])["effect"].sum()
    before, found, expected = arrivals(world, {}), [], []
    for sender in ("resid0", "a1"):
        after = arrivals(world, {Place.parse(sender): world.other[Place.parse(sender)]})
        for node in receivers:
            moved = (node_value(world, node, after) - node_value(world, node, before))[..., 0]
            start, end = world.x[node.place], world.other[node.place]
            way = [(start + at * (end - start), weight) for at, weight in quadrature_of("gauss", 20)]
            mean = torch.stack([weight * gradient(world, node, x)[..., 0] for x, weight in way]).sum(0)
            expected.append(float((mean * moved).sum(1).mean()))
            found.append(totals.get((sender, node.name), 0.0))
    assert (np.abs(expected) > 0.005).sum() > 5
    # a kink of a latent lies between two points
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02 * np.abs(expected).max())
