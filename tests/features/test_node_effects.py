"""Effects and edges of latents equal what a plain model with hooks says: finite differences, exact patching where it is linear, sums where theory has them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.stats import false_discovery_control
from torch import Tensor, nn

from mechscope.choices import NodeSource
from mechscope.data.metrics import pair_metric
from mechscope.data.pairs import Pairs, collate_pairs
from mechscope.errors import SettingsError
from mechscope.features import Dictionary, Place, Rule, autoencoder, transcoder
from mechscope.features.faithfulness import faithfulness
from mechscope.features.node_edges import node_edges
from mechscope.features.node_effects import NodeEffects, node_effects, quadrature_of
from mechscope.features.node_patching import patch_nodes
from mechscope.features.shift import check_judged
from mechscope.features.standing import Node, Standing, in_order
from mechscope.instrument import load, model_inputs
from mechscope.subject import Subject
from tests import families
from tests.contract.technique import texts
from tests.features import oracle

FAMILIES = ("gpt2", "llama", "gpt_neox", "qwen3")
every_family = pytest.mark.parametrize("family", FAMILIES)
W, M = families.WIDTH, 24
RULES = {"resid0": Rule("topk", 6), "a1": Rule("relu"), "m1": Rule("jumprelu"), "resid1": Rule("gated")}
OTHERS = {"m2": Rule("relu")}
POINTS = 40
# of two lengths, so that one is padded
PAIRS = texts((9, 7))


def made(place: str, width: int, rule: Rule, seed: int) -> Dictionary:
    """Return a random autoencoder of which a part of the latents is active."""
    given = oracle.dictionary(autoencoder(place, width, M, rule), scale=1.3, seed=seed)
    return Dictionary(given.layout, {name: tensor * 0.5 for name, tensor in given.tensors.items()}, given.input_maps, given.output_maps)


@cache
def exact(family: str) -> Subject:
    """Return a tiny model that computes in float64 throughout: RMS norms too, which take float32 whatever they are given."""
    model = families.build(family, torch.float64)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            epsilon, weight = module.variance_epsilon, module.weight
            module.forward = lambda x, e=epsilon, w=weight: w * x * (x.square().mean(-1, keepdim=True) + e).rsqrt()
    return load(model.requires_grad_(False))


@cache
def standing(family: str, names: tuple[str, ...] = tuple(RULES)) -> tuple[Standing, ...]:
    subject = exact(family)
    return in_order(Standing.of(made(name, W, {**RULES, **OTHERS}[name], at), subject) for at, name in enumerate(names))


@contextlib.contextmanager
def hooked(subject: Subject, changes: Mapping[Place, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Change what stands at places by plain hooks."""
    handles = []
    for place, change in changes.items():
        block = subject.anatomy.blocks[place.layer]
        module: nn.Module = {"residual": block.module, "attention_output": block.attention_write, "mlp_output": block.mlp_write}[place.site]

        def hook(_: Any, args: Any, output: Any, change: Callable[[Tensor], Tensor] = change) -> Any:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def put(value: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a change that puts a value in the place of whatever stands there."""
    return lambda x: value


def add(value: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a change that adds a value."""
    return lambda x: x + value


def metric(subject: Subject, pairs: Pairs, changes: Mapping[Place, Callable[[Tensor], Tensor]], *, corrupt: bool = False) -> Tensor:
    """Return the logit difference of every text, by the model's own forward."""
    batch = collate_pairs(pairs.pairs)
    with hooked(subject, changes):
        logits = subject.plain(**model_inputs(batch.corrupt if corrupt else batch.clean, batch.real), use_cache=False).logits
    return pair_metric("logit-diff", batch)(logits)


def seen(subject: Subject, pairs: Pairs, places: list[Place], *, corrupt: bool = False) -> dict[Place, Tensor]:
    """Return what stands at places."""
    found: dict[Place, Tensor] = {}

    def keep(place: Place) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            found[place] = x.detach().clone()
            return x

        return look

    metric(subject, pairs, {place: keep(place) for place in places}, corrupt=corrupt)
    return found


def parts(each: Standing, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return dense latents and the error."""
    flat = x.flatten(0, 1)
    (rebuilt,) = oracle.reconstruct(each.dictionary, [flat])
    return oracle.encode(each.dictionary, [flat]).view(*x.shape[:2], -1), x - rebuilt.view_as(x)


def decoders(each: Standing) -> Tensor:
    return oracle.decoder(each.dictionary.layout, each.dictionary.tensors) / each.dictionary.output_maps[0].scale


def later(pairs: Pairs) -> Tensor:
    """Mark the tokens that count: real ones but the first."""
    real = collate_pairs(pairs.pairs).real.clone()
    real[:, 0] = False
    return real[..., None]


class World:
    """A model's places as a plain model has them: values, and what nodes become."""

    def __init__(self, family: str, source: str, names: tuple[str, ...] = tuple(RULES)) -> None:
        self.subject, self.standing = exact(family), standing(family, names)
        self.places = [each.place for each in self.standing]
        self.x = seen(self.subject, PAIRS, self.places)
        other = seen(self.subject, PAIRS, self.places, corrupt=True)
        self.delta: dict[Node, Tensor] = {}  # what a node's change adds to x
        self.value: dict[Node, Tensor] = {}  # by how much the node itself changes
        self.other: dict[Place, Tensor] = {}
        for each in self.standing:
            (f, error), here = parts(each, self.x[each.place]), later(PAIRS)
            g, missed = parts(each, other[each.place]) if source == "corrupt" else (torch.zeros_like(f), torch.zeros_like(error))
            for latent in range(M):
                self.value[Node(each.place, latent)] = ((g - f) * here)[..., latent]
                self.delta[Node(each.place, latent)] = ((g - f) * here)[..., [latent]] * decoders(each)[latent]
            self.value[Node(each.place)] = self.delta[Node(each.place)] = (missed - error) * here
            self.other[each.place] = self.x[each.place] + sum(delta for node, delta in self.delta.items() if node.place == each.place)

    def derivative(self, node: Node, step: float = 1e-5) -> Tensor:
        """Return the change of the metric per share of the way, by central differences."""
        ends = [metric(self.subject, PAIRS, {node.place: add(sign * step * self.delta[node])}) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * step)


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


def every_node(family: str) -> list[Node]:
    return [node for each in standing(family) for node in (*(Node(each.place, latent) for latent in range(M)), Node(each.place))]


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
