"""Effects and edges of latents equal what a plain model with hooks says: finite differences, exact patching where it is linear, sums where theory has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

from mechscope.choices import NodeSource
from mechscope.errors import SettingsError
from mechscope.features import Place, Rule, transcoder
from mechscope.features.faithfulness import faithfulness
from mechscope.features.node_edges import node_edges
from mechscope.features.node_effects import NodeEffects, node_effects
from mechscope.features.node_patching import patch_nodes
from mechscope.features.shift import check_judged
from mechscope.features.standing import Node, Standing, in_order
from mechscope.instrument import load
from tests import families
from tests.features import oracle
from tests.features.node_world import (
    PAIRS,
    POINTS,
    M,
    W,
    World,
    add,
    every_family,
    exact,
    made,
    metric,
    put,
    standing,
)


@pytest.mark.parametrize("source", ["corrupt", "zero"])
@every_family
def test_attribution_is_the_derivative_of_the_metric_on_the_way(family: str, source: NodeSource) -> None:
    world = World(family, source)
    found = node_effects(world.subject, world.standing, PAIRS, method="attribution", source=source)
    np.testing.assert_allclose(found.unchanged, metric(world.subject, PAIRS, {}), rtol=1e-9)
    checked = 0
    for each in world.standing:
        dense = found.latents[each.place].toarray()
        for latent in range(0, M, 3):
            node = Node(each.place, latent)
            np.testing.assert_allclose(dense[:, latent], world.derivative(node), rtol=1e-5, atol=1e-7)
            checked += int(abs(dense[:, latent]).max() > 1e-4)
        np.testing.assert_allclose(found.errors[each.place], world.derivative(Node(each.place)), rtol=1e-5, atol=1e-7)
    assert checked > 8


@every_family
def test_integrated_gradients_add_up_to_what_replacing_the_place_does(family: str) -> None:
    # to nothing at all the way is longer, and leads by where norms are small
    ways: tuple[tuple[NodeSource, int], ...] = (("corrupt", POINTS), ("zero", 2 * POINTS))
    for source, points in ways:
        world = World(family, source)
        found = node_effects(world.subject, world.standing, PAIRS, points=points, source=source)
        for place in world.places:
            whole = metric(world.subject, PAIRS, {place: put(world.other[place])}) - metric(world.subject, PAIRS, {})
            assert whole.abs().max() > 1e-2
            total = found.latents[place].sum(1) + found.errors[place]
            np.testing.assert_allclose(total, whole, rtol=1e-3, atol=1e-3)


def test_the_middles_of_steps_miss_the_whole_less_and_less() -> None:
    world = World("gpt2", "corrupt", ("resid1",))
    (place,) = world.places
    whole = metric(world.subject, PAIRS, {place: put(world.other[place])}) - metric(world.subject, PAIRS, {})
    missed = []
    for points in (8, 16, 32):
        found = node_effects(world.subject, world.standing, PAIRS, points=points, quadrature="midpoint")
        missed.append(float(np.abs(found.latents[place].sum(1) + found.errors[place] - whole.numpy()).max()))
    # with the square of the number of points; the left ends of steps would halve it
    assert missed[2] < missed[1] / 3 < missed[0] / 9


@every_family
def test_exact_patching_is_the_plain_models(family: str) -> None:
    world = World(family, "corrupt")
    nodes = [*(Node(place, latent) for place in world.places for latent in (1, 5)), *map(Node, world.places)]
    found = patch_nodes(world.subject, world.standing, PAIRS, nodes)
    unchanged = metric(world.subject, PAIRS, {})
    for row, node in zip(found, nodes, strict=True):
        expected = metric(world.subject, PAIRS, {node.place: add(world.delta[node])}) - unchanged
        np.testing.assert_allclose(row, expected, rtol=1e-7, atol=1e-9)
    assert (abs(found).max(1) > 1e-6).sum() > 4


def test_where_the_metric_is_linear_estimates_are_exact() -> None:
    model = families.build("gpt2", torch.float64)
    model.transformer.ln_f = nn.Identity()
    with torch.no_grad():
        for part in (model.transformer.h[2].attn.c_proj, model.transformer.h[2].mlp.c_proj):
            part.weight.zero_()
    subject = load(model)
    own = in_order([Standing.of(made("resid1", W, Rule("topk", 6), 0), subject)])
    estimates = {method: node_effects(subject, own, PAIRS, method=method, points=1) for method in ("attribution", "integrated-gradients")}
    nodes = [*(Node(own[0].place, latent) for latent in range(M)), Node(own[0].place)]
    truth = patch_nodes(subject, own, PAIRS, nodes)
    assert (abs(truth).max(1) > 1e-3).sum() > 5
    for found in estimates.values():
        estimate = np.vstack([found.latents[own[0].place].toarray().T, found.errors[own[0].place]])
        np.testing.assert_allclose(estimate, truth, rtol=1e-9, atol=1e-12)


def test_the_largest_effects_are_those_of_either_sign_from_the_threshold_on() -> None:
    place = Place.parse("resid0")
    dense = np.array([[1.0, -1.5, 0.0, 0.2, 0.0], [0.0, -0.5, 0.0, 0.0, 0.0]])
    found = NodeEffects({place: sparse.csr_array(dense)}, {place: np.array([0.25, 0.25])}, np.zeros(2), "logit-diff")
    effects = found.table.set_index("component")["effect"].to_dict()
    # latents that are silent on all texts are no rows
    assert effects == pytest.approx({"resid0.f0": 0.5, "resid0.f1": -1.0, "resid0.f3": 0.1, "resid0.error": 0.25})
    assert [node.name for node in found.largest(0.0, 9)] == ["resid0.f1", "resid0.f0", "resid0.error", "resid0.f3"]
    assert [node.name for node in found.largest(0.25, 9)] == ["resid0.f1", "resid0.f0", "resid0.error"]
    assert [node.name for node in found.largest(0.0, 2)] == ["resid0.f1", "resid0.f0"]


def test_what_does_not_fit_is_refused() -> None:
    subject = exact("gpt2")
    with pytest.raises(SettingsError, match=r"reads m1\.in and writes m1 has no latents that are components"):
        Standing.of(oracle.dictionary(transcoder(1, W, M, Rule("relu"))), subject)
    with pytest.raises(SettingsError, match="two dictionaries stand at a1"):
        in_order([*standing("gpt2"), standing("gpt2")[1]])
    with pytest.raises(SettingsError, match="there is no dictionary"):
        in_order([])
    with pytest.raises(SettingsError, match="'kl' has no gradient"):
        node_effects(subject, standing("gpt2"), PAIRS, metric="kl")
    with pytest.raises(SettingsError, match="at 0 points"):
        node_effects(subject, standing("gpt2"), PAIRS, points=0)
    with pytest.raises(SettingsError, match=r"resid2\.f1 belongs to no dictionary"):
        node_edges(subject, standing("gpt2"), PAIRS, [Node.parse("resid2.f1")])
    with pytest.raises(SettingsError, match=r"latent a1\.f24 does not exist: the dictionary has 24 there"):
        node_edges(subject, standing("gpt2"), PAIRS, [Node.parse("a1.f24")])
    nowhere = [
        (Node(Place.parse("a1"), -1), r"latent a1\.f-1 does not exist"),
        (Node.parse("resid2.error"), r"resid2\.error belongs to no dictionary"),
    ]
    for node, told in nowhere:
        for refusing in (node_edges, patch_nodes, faithfulness):
            with pytest.raises(SettingsError, match=told):
                refusing(subject, standing("gpt2"), PAIRS, [node])
    with pytest.raises(SettingsError, match=r"latent a1\.f-1 does not exist"):
        check_judged(standing("gpt2"), [Node(Place.parse("a1"), -1)])
    assert [Node.parse(name).name for name in ("resid6.f10", "a3.z.error")] == ["resid6.f10", "a3.z.error"]
