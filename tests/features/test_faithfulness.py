"""A circuit of latents keeps what a plain model with hooks keeps: everything with all nodes, nothing without any, and by hand between."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechscope.choices import Filling
from mechscope.data.pairs import Pairs
from mechscope.features.faithfulness import _circuits, doubling, faithfulness
from mechscope.features.node_patching import node_means, patch_nodes, patch_places
from mechscope.features.places import Place
from mechscope.features.standing import Node, Standing
from tests.features.node_world import (
    PAIRS,
    World,
    decoders,
    every_family,
    every_node,
    later,
    metric,
    parts,
    put,
    seen,
    standing,
)

SOURCES = ("corrupt", "zero", "mean")


def filled(world: World, source: str) -> dict[Place, tuple[Tensor, Tensor]]:
    """Return by place the dense latents and the error that stand for what is left out."""
    found = {}
    other = seen(world.subject, PAIRS, world.places, corrupt=True)
    for each in world.standing:
        f, error = parts(each, other[each.place] if source == "corrupt" else world.x[each.place])
        if source == "mean":
            weight = later(PAIRS).double() / later(PAIRS).sum()
            f, error = ((value * weight).sum((0, 1)).expand_as(value) for value in (f, error))
        elif source == "zero":
            f, error = torch.zeros_like(f), torch.zeros_like(error)
        found[each.place] = (f, error)
    return found


def by_hand(world: World, source: str, inside: set[Node], pairs: Pairs = PAIRS) -> Tensor:
    """Return the metric with only some nodes as they are."""
    fillings = filled(world, source)

    def change(x: Tensor, each: Standing) -> Tensor:
        (f, error), (g, missed) = parts(each, x), fillings[each.place]
        kept = torch.tensor([Node(each.place, latent) in inside for latent in range(f.shape[-1])])
        bias = each.dictionary.output_maps[0].back(each.dictionary.tensors["decoder_bias"])
        made = torch.where(kept, f, g) @ decoders(each) + bias + (error if Node(each.place) in inside else missed)
        return torch.where(later(PAIRS), made, x)

    return metric(world.subject, pairs, {each.place: partial(change, each=each) for each in world.standing})


def chosen(family: str) -> list[Node]:
    """Return every third node, errors of two places among them."""
    errors = [Node(each.place) for each in standing(family)[::2]]
    return [errors[0], *every_node(family)[::3], errors[1]]


@pytest.mark.parametrize("source", SOURCES)
@every_family
def test_a_circuit_and_its_complement_are_the_plain_models(family: str, source: Filling) -> None:
    world = World(family, "corrupt")
    nodes = list(dict.fromkeys(chosen(family)))
    means = node_means(world.subject, world.standing, PAIRS) if source == "mean" else None
    table = faithfulness(world.subject, world.standing, PAIRS, nodes, sizes=[0, 7, len(nodes)], filling=source, means=means)
    whole, empty = metric(world.subject, PAIRS, {}).mean(), by_hand(world, source, set()).mean()
    every, errors = set(every_node(family)), {Node(each.place) for each in world.standing}
    for row in table.to_dict("records"):
        inside = every if row["nodes"] < 0 else set(nodes[: row["nodes"]])
        kept = {"kept": inside | errors, "removed": inside - errors, "in circuit": inside}[row["errors"]]
        assert row["value"] == pytest.approx(float(by_hand(world, source, kept).mean()), rel=1e-7, abs=1e-9)
        assert row["latents"] == sum(node.latent is not None for node in (every if row["nodes"] < 0 else nodes[: row["nodes"]]))
        assert np.isnan(row["faithfulness"])
        assert "too few texts" in row["withheld"]
    assert abs(float(whole - empty)) > 1e-3


def telling(world: World) -> Pairs:
    """Return each text twice, its answers exchanged where the clean run favours the wrong one more than the run without nodes does."""
    better = metric(world.subject, PAIRS, {}) > by_hand(world, "corrupt", set())
    turned = [
        pair if right else replace(pair, answers=pair.wrong_answers, wrong_answers=pair.answers)
        for pair, right in zip(PAIRS, better.tolist(), strict=True)
    ]
    return replace(PAIRS, pairs=(*turned, *turned))


@every_family
def test_all_nodes_keep_everything_and_none_keep_nothing(family: str) -> None:
    world = World(family, "corrupt")
    pairs, nodes = telling(world), every_node(family)
    active = {each.place: range(24) for each in world.standing}
    table = faithfulness(world.subject, world.standing, pairs, nodes, sizes=[0, 9, len(nodes)], active=active, draws=2)
    at = {(row["nodes"], row["errors"]): row for row in table.to_dict("records")}
    once = replace(pairs, pairs=pairs.pairs[: len(PAIRS)])
    whole, empty = (float(value.mean()) for value in (metric(world.subject, once, {}), by_hand(world, "corrupt", set(), once)))

    def share(inside: set[Node]) -> Any:
        return pytest.approx((float(by_hand(world, "corrupt", inside, once).mean()) - empty) / (whole - empty), rel=1e-6, abs=1e-7)

    for size, kept in ((len(nodes), 1.0), (-1, 1.0), (0, 0.0)):
        assert at[size, "in circuit"]["faithfulness"] == pytest.approx(kept, abs=1e-7)
        assert at[size, "in circuit"]["complement"] == pytest.approx(1 - kept, abs=1e-7)
    every, inside, errors = set(nodes), set(nodes[:9]), {Node(each.place) for each in world.standing}
    # with the errors kept the empty circuit still has them, and with the errors removed all latents are not all
    assert at[0, "kept"]["faithfulness"] == share(errors)
    assert at[-1, "removed"]["faithfulness"] == share(every - errors)
    assert at[9, "removed"]["complement"] == share(every - inside - errors)
    assert at[9, "kept"]["complement"] == share(every - inside)
    assert at[9, "kept"]["latents"] == 9
    assert at[9, "kept"]["random"] != at[9, "kept"]["faithfulness"]
    # random latents, as many as there are, are all latents
    assert at[len(nodes), "in circuit"]["random"] == pytest.approx(1.0, abs=1e-7)
    assert at[len(nodes), "in circuit"]["random_complement"] == pytest.approx(0.0, abs=1e-7)


def test_random_latents_are_others_than_the_circuits_as_far_as_there_are_any() -> None:
    each = standing("gpt2")[0]
    ranked = [Node(each.place, latent) for latent in (5, 3, 8)]
    order = {each.place: [3, 1, 5, 8, 2]}
    drawn = [_circuits([each], ranked, size, "kept", order)[0][each.place].latents for size in (1, 2, 3)]
    assert drawn == [(3,), (1, 8), (1, 2, 3)]


def test_random_latents_stand_where_the_circuits_would() -> None:
    world = World("gpt2", "corrupt")
    pairs, place = telling(world), world.places[0]
    once = replace(pairs, pairs=pairs.pairs[: len(PAIRS)])
    seen_active = np.flatnonzero((parts(world.standing[0], world.x[place])[0] * later(PAIRS)).abs().sum((0, 1)).numpy())
    own, others = [Node(place, int(at)) for at in seen_active[:3]], [Node(place, int(at)) for at in seen_active[3:6]]
    ranked = [own[0], Node(place), *own[1:]]
    # as many as the circuit has: each draw is all of them
    active = {place: [node.latent for node in others if node.latent is not None]}
    table = faithfulness(world.subject, world.standing, pairs, ranked, sizes=[4], active=active, draws=2).set_index(["nodes", "errors"])
    whole, empty = (float(value.mean()) for value in (metric(world.subject, once, {}), by_hand(world, "corrupt", set(), once)))
    every, errors = set(every_node("gpt2")), {Node(each.place) for each in world.standing}
    for name, kept in (("kept", errors), ("removed", set()), ("in circuit", {Node(place)})):
        for latents, column in ((own, ""), (others, "random")):
            inside = set(latents) | kept
            left = every - set(latents) - {"kept": set(), "removed": errors, "in circuit": {Node(place)}}[name]
            for nodes, of in ((inside, column or "faithfulness"), (left, f"{column}_complement" if column else "complement")):
                expected = (float(by_hand(world, "corrupt", nodes, once).mean()) - empty) / (whole - empty)
                assert table.loc[(4, name), of] == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert table.loc[(4, "kept"), "random"] != pytest.approx(table.loc[(4, "kept"), "faithfulness"], rel=1e-3)


def test_replacing_a_place_is_replacing_all_its_nodes() -> None:
    world = World("llama", "corrupt")
    unchanged = metric(world.subject, PAIRS, {})
    found = patch_places(world.subject, world.standing, PAIRS)
    for place, row in zip(world.places, found, strict=True):
        expected = metric(world.subject, PAIRS, {place: put(world.other[place])}) - unchanged
        np.testing.assert_allclose(row, expected, rtol=1e-7, atol=1e-9)
    nodes = [Node(world.places[1], 3), Node(world.places[1])]
    means = node_means(world.subject, world.standing, PAIRS)
    every = set(every_node("llama"))
    for node, row in zip(nodes, patch_nodes(world.subject, world.standing, PAIRS, nodes, filling="mean", means=means), strict=True):
        # one node filled in is the run of all others, where these stand as they would anyway
        expected = by_hand(world, "mean", every - {node}) - unchanged
        np.testing.assert_allclose(row, expected, rtol=1e-6, atol=1e-9)


def test_sizes_double_up_to_all() -> None:
    assert [doubling(most) for most in (0, 1, 11)] == [[0], [0, 1], [0, 1, 2, 4, 8, 11]]
