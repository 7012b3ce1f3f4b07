"""A model in which dictionaries stand, as a plain model with hooks has it: what nodes are, and what becomes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechscope.data.metrics import pair_metric
from mechscope.data.pairs import Pairs, collate_pairs
from mechscope.features import Dictionary, Place, Rule, autoencoder
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


def every_node(family: str) -> list[Node]:
    return [node for each in standing(family) for node in (*(Node(each.place, latent) for latent in range(M)), Node(each.place))]
