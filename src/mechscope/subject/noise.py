"""A control for fine-tuning: the base with Gaussian noise as large, matrix by matrix, as what fine-tuning changed.

Whatever changes a model's weights changes its attention, in some layers more than in others. What fine-tuning did is told from that by a model whose
every matrix differs from the base's by as much (the Frobenius norm of ΔW), in a random direction. Query, key and value count as matrices of their own
where a family keeps them in one map. Random directions of matched norm are the control of Li et al. (2018), "Visualizing the loss landscape of neural
nets", who match filter by filter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mechscope.errors import ModelError
from mechscope.store.hashing import hash_json
from mechscope.subject.discovery import discover
from mechscope.subject.linear import is_conv1d
from mechscope.subject.load import Subject
from mechscope.subject.pair import Pair

# rounds in which noise is enlarged until it keeps its norm after rounding to a type of few digits
_ROUNDS = 12
_TOLERANCE = 0.01


@dataclass(frozen=True)
class Change:
    """How much one matrix changed.

    Attributes:
        axis: The axis along which a stored parameter is cut into matrices.
        index: Where this one lies along it; None for all of it.
        norm: Frobenius norm of its change.
    """

    axis: int
    index: Tensor | None
    norm: float


def noise_pairs(pair: Pair, draws: int, *, seed: int = 0) -> Iterator[Pair]:
    """Yield the base beside itself with noise of the size of fine-tuning, one draw after the other; nothing where fine-tuning changed nothing.

    All draws share one copy of the base's weights, which the next one overwrites: use each before the next is taken. Base and tuned model are not touched.
    A draw depends on its number, the seed and the names of parameters only, not on the device.

    Args:
        pair: The base, and the tuned model whose change is imitated; of an adapter the change is the merged one.
        draws: How many.
        seed: Seed of the noise.

    Raises:
        ModelError: The base's weights are not all in memory, or the two models do not have the same parameters.
    """
    if not draws:
        return
    for side in (pair.base, pair.tuned):
        side.require_in_memory("a control of noise")
    changes = weight_changes(pair)
    if not any(change.norm for of_one in changes.values() for change in of_one):
        return
    model = plain_copy(pair.base)
    anatomy = discover(model)
    parameters = dict(model.named_parameters())
    for draw in range(draws):
        for name, base in pair.base.weights():
            with torch.no_grad():
                parameters[name].copy_(_noisy(base, changes[name], _generator(seed, draw, name)))
        source = f"{pair.base.source} + noise {draw}"
        noisy = Subject(model, pair.base.tokenizer, anatomy, source, adds=pair.base.adds, heads_write=pair.base.heads_write)
        yield Pair(pair.base, noisy, pair.vocab_size)


@torch.no_grad()
def weight_changes(pair: Pair) -> dict[str, list[Change]]:
    """Return how much each matrix changed, by the name of the parameter that stores it; in float64 and by the tokens that both models have.

    Raises:
        ModelError: The two models do not have the same parameters.
    """
    tuned = dict(pair.tuned.weights())
    changes = {}
    for name, base in pair.base.weights():
        if name not in tuned:
            raise ModelError(
                f"parameter {name} of {pair.base.source!r} is not in {pair.tuned.source!r}: are the embeddings untied in one only?"
            )
        shared = min(len(base), len(tuned[name])) if base.ndim else 0
        other = tuned[name].to(base.device)
        difference = other[:shared].double() - base[:shared].double() if base.ndim else other.double() - base.double()
        changes[name] = [
            Change(axis, index, float((difference if index is None else difference.index_select(axis, index)).norm()))
            for axis, index in _cuts(pair.base, name, base, shared)
        ]
    return changes


def plain_copy(subject: Subject) -> torch.nn.Module:
    """Return a copy of a model with plain weights: without an adapter that is off, with one that is on merged into them."""
    model = copy.deepcopy(subject.model)
    if subject.is_adapter:
        model = model.merge_and_unload() if subject.adapted else model.unload()
    return model.eval().requires_grad_(False)


def _cuts(subject: Subject, name: str, weight: Tensor, shared: int) -> list[tuple[int, Tensor | None]]:
    """Say how a stored parameter is cut into query, key and value (and gate): not at all where it is one matrix, but for tokens that one model lacks."""
    module, _, _ = name.rpartition(".")
    blocks = (subject.anatomy.blocks[layer] for layer in subject.anatomy.attending)
    readers = [where for block in blocks for part, where in block.own_heads.slices.items() if part != "output" and where.name == module]
    if len(readers) < 2:
        return [(0, None if not weight.ndim or shared == len(weight) else torch.arange(shared, device=weight.device))]
    axis = 1 if weight.ndim == 2 and is_conv1d(subject.plain.get_submodule(module)) else 0
    return [(axis, where.all_features.to(weight.device)) for where in readers]


def _noisy(base: Tensor, changes: list[Change], generator: torch.Generator) -> Tensor:
    """Return a parameter with noise of the given norms, as it is after rounding to its type."""
    noise = torch.randn(base.shape, generator=generator).to(base.device, torch.promote_types(base.dtype, torch.float32))
    noisy = base.clone()
    for change in changes:
        own = base if change.index is None else base.index_select(change.axis, change.index)
        drawn = noise if change.index is None else noise.index_select(change.axis, change.index)
        made = _of_norm(own, drawn, change.norm)
        noisy = made if change.index is None else noisy.index_copy(change.axis, change.index, made)
    return noisy


def _of_norm(base: Tensor, noise: Tensor, norm: float) -> Tensor:
    """Return base + noise whose rounded difference from the base has the norm, as nearly as its type allows."""
    if norm == 0:
        return base
    scale = norm / float(noise.double().norm())
    for _ in range(_ROUNDS):
        noisy = (base + scale * noise).to(base.dtype)
        made = float((noisy.double() - base.double()).norm())
        if abs(made - norm) <= _TOLERANCE * norm:
            break
        # noise below half a unit in the last place is rounded away
        scale *= norm / made if made > 0 else 2.0
    return noisy


def _generator(seed: int, draw: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(hash_json([seed, draw, name])[:15], 16))
