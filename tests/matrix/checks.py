"""What mechscope says of a model beside what plain Hugging Face says of it: one text at a time, unpadded, by the family's own attention.

Every check returns how far off mechscope is, relative to the size of the values. Nothing here reads mechscope's own idea of a model for the side it is compared
with, but for where a module stands: hooks are put on the plain model's modules.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mechscope.circuits.attribution import attribute_edges
from mechscope.data.pairs import Pairs, PromptPair
from mechscope.instrument import (
    AttentionCall,
    CachedRun,
    Edit,
    Reading,
    Walk,
    compare,
    describe,
    intervene,
    load,
    model_inputs,
    observed,
    record,
    unembed,
)
from mechscope.instrument.edits import EditSite
from mechscope.instrument.wiring import Wiring
from mechscope.subject.load import Subject
from tests import families
from tests.matrix.configs import VOCABULARY
from tests.matrix.plain import build, head_off
from tests.matrix.world import LENGTHS, NotSaid, World, off

PADDINGS = ("none", "left", "right")
# of finite differences: of five points, so that steps may be large enough for norms that compute in float32 whatever the type; a smaller one where
# the larger crosses a kink, or sends a token to another expert
_STEPS = (1e-2, 1e-3, 1e-4)


def _batches(world: World) -> Iterator[tuple[families.Texts, list[int]]]:
    for side in PADDINGS:
        chosen = [0] if side == "none" else [0, 1]
        yield families.padded(world.texts, side), chosen


@torch.no_grad()
def logits(world: World) -> float:
    """Compare logits of observed, padded batches."""
    worst = 0.0
    for batch, chosen in _batches(world):
        with observed(world.subject):
            found = world.subject.model(**model_inputs(batch.ids, batch.real), use_cache=False).logits
        walk = Walk(world.subject, batch.ids, batch.real)
        with observed(world.subject):
            walked = walk.logits(walk.run())
        for row in chosen:
            expected = world.alone(world.plain, world.texts[row]).logits[0]
            worst = max(worst, off(batch.rows(found, row), expected), off(batch.rows(walked, row), expected))
    return worst


def _calls(subject: Subject, batch: families.Texts) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    with torch.no_grad(), observed(subject, calls.append):
        subject.model(**model_inputs(batch.ids, batch.real), use_cache=False)
    return calls


def _maps(world: World, model: Any, row: int) -> list[Tensor]:
    """Return the maps of the layers that attend."""
    given = world.alone(model, world.texts[row], output_attentions=True).attentions
    anatomy = world.subject.anatomy
    if len(given) == anatomy.n_layers:  # some families give weights of their linear attention out as maps
        given = [given[layer] for layer in anatomy.attending]
    return [one[0].double() for one in given if one is not None]


def _xlogx(p: Tensor) -> Tensor:
    return torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0.0)


def _entropy_of(p: Tensor) -> Tensor:
    """Return the entropy of maps over their keys; rows with a learned sink do not sum to one."""
    p = p / p.sum(-1, keepdim=True)
    return -_xlogx(p).sum(-1)


def _has_sink(p: Tensor) -> bool:
    return float((1 - p.sum(-1)).max()) > 1e-4


def _divergence_of(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p‖q); what a row lacks to one is on a learned sink, which counts as one more key."""
    if _has_sink(p):
        p, q = (torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp(min=0)], dim=-1) for x in (p, q))
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0).sum(-1)


@torch.no_grad()
def entropy(world: World) -> float:
    """Compare entropies in nats, and the mass on learned sinks, with those of the maps."""
    worst = 0.0
    for batch, chosen in _batches(world):
        calls = _calls(world.subject, batch)
        for row in chosen:
            maps = _maps(world, world.plain, row)
            if len(maps) != len(calls):
                return float("inf")
            for call, p in zip(calls, maps, strict=True):
                found = describe(call, batch.real)
                worst = max(worst, _apart(_row(found.entropy, batch, row), _entropy_of(p)))
                if found.learned_sink is not None and _has_sink(p):
                    worst = max(worst, _apart(_row(found.learned_sink, batch, row), 1 - p.sum(-1)))
    return worst


@torch.no_grad()
def divergence(world: World) -> float:
    """Compare KL(P‖Q) between two models' patterns with that of the maps."""
    worst = 0.0
    for batch, chosen in _batches(world):
        ones, others = _calls(world.subject, batch), _calls(world.second, batch)
        for row in chosen:
            if ones[0].sinks is not None and not _has_sink(_maps(world, world.plain, row)[0]):
                raise NotSaid("its maps are normalised without the learned sink, which the divergence counts")
            for one, other, p, q in zip(ones, others, _maps(world, world.plain, row), _maps(world, world.other, row), strict=True):
                worst = max(worst, _apart(_row(compare(one, other, batch.real).kl_base_tuned, batch, row), _divergence_of(p, q)))
    return worst


def _row(values: Tensor, batch: families.Texts, row: int) -> Tensor:
    """Return one text's real rows of ``(batch, head, query)``."""
    return values[row].T[batch.real[row]].T


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max().nan_to_num(torch.inf))


@torch.no_grad()
def residuals(world: World) -> float:
    """Compare the residual streams with the hidden states."""
    worst = 0.0
    for batch, chosen in _batches(world):
        with record(world.subject, "residual", "embedding") as recording:
            world.subject.model(**model_inputs(batch.ids, batch.real), use_cache=False)
        for row in chosen:
            seen = _streams(world, world.texts[row])
            for layer in range(world.subject.anatomy.n_layers):
                worst = max(worst, off(batch.rows(recording["residual", layer], row), seen[layer]))
    return worst


def _blocks(world: World) -> list[Any]:
    """The plain copy's blocks, by the paths of the subject's."""
    return [world.plain.get_submodule(block.name) for block in world.subject.anatomy.blocks]


@contextlib.contextmanager
def _hooked(*hooks: tuple[Any, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _streams(world: World, text: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    keep = lambda _, args, output: seen.append((output[0] if isinstance(output, tuple) else output)[0])  # noqa: E731
    with _hooked(*((block, keep) for block in _blocks(world))):
        world.alone(world.plain, text)
    return seen


@torch.no_grad()
def ablation(world: World) -> float:
    """Compare a head's ablation in every layer that attends with the plain model whose own attention has that head's output at zero; elsewhere the mixer's."""
    worst, head = 0.0, 1
    for layer in world.subject.anatomy.attending:
        with head_off(world.plain, layer, head):
            expected = [world.alone(world.plain, text).logits[0] for text in world.texts]
        for batch, chosen in _batches(world):
            with intervene(world.subject, Edit("z", layer, 0.0, heads=(head,))):
                found = world.subject.model(**model_inputs(batch.ids, batch.real), use_cache=False).logits
            for row in chosen:
                worst = max(worst, off(batch.rows(found, row), expected[row]))
            again = CachedRun(world.subject, batch.ids, batch.real, sites=("z",))
            ((_, rows),) = again.rerun([[Edit("z", layer, 0.0, heads=(head,))]], Reading.of(batch.real))
            worst = max(worst, off(unembed(world.subject, rows[0]), torch.cat([expected[row] for row in chosen])))
    return max(worst, _mixers_off(world))


def _mixers_off(world: World) -> float:
    """Compare a mixer's ablation with the plain model in which a hook lets it give zeros."""
    worst = 0.0

    def nothing(_: Any, args: Any, output: Any) -> Any:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    names = {id(module): name for name, module in world.subject.plain.named_modules()}
    for layer in world.subject.anatomy.mixing:
        plain = world.plain.get_submodule(names[id(world.subject.anatomy.blocks[layer].mixing.write)])
        with _hooked((plain, nothing)):
            expected = [world.alone(world.plain, text).logits[0] for text in world.texts]
        for batch, chosen in _batches(world):
            with intervene(world.subject, Edit("mixer_output", layer, 0.0)):
                found = world.subject.model(**model_inputs(batch.ids, batch.real), use_cache=False).logits
            for row in chosen:
                worst = max(worst, off(batch.rows(found, row), expected[row]))
    return worst


@torch.no_grad()
def resumed(world: World) -> float:
    """Compare reruns from the middle of the model with hooks on the plain one: a changed residual stream, MLP output, and what attention or a mixer adds."""
    layers = {world.subject.anatomy.n_layers // 2, *world.subject.anatomy.mixing[:1]}
    return max(_resumed(world, layer) for layer in layers)


def _resumed(world: World, layer: int) -> float:
    worst = 0.0
    anatomy = world.subject.anatomy
    generator = torch.Generator().manual_seed(3)
    shift = torch.randn(anatomy.d_model, generator=generator).to(world.subject.dtype)
    block = anatomy.blocks[layer]
    places: dict[EditSite, Any] = {"residual": block.module, "mlp_output": block.mlp_write, block.mixing_site: block.mixing.write}
    names = {id(module): name for name, module in world.subject.plain.named_modules()}
    for site, module in places.items():
        if site != "residual" and not world.subject.adds:
            continue
        plain, factor = world.plain.get_submodule(names[id(module)]), 1.0 if site == "residual" else block.multiplier

        def hook(_: Any, args: Any, output: Any, own: Tensor = shift / factor) -> Any:
            return (output[0] + own, *output[1:]) if isinstance(output, tuple) else output + own

        for batch, chosen in _batches(world):
            run = CachedRun(world.subject, batch.ids, batch.real, sites=(site,))
            ((_, rows),) = run.rerun([[Edit(site, layer, lambda x: x + shift)]], Reading.of(batch.real))
            found = unembed(world.subject, rows[0])
            with _hooked((plain, hook)):
                expected = [world.alone(world.plain, world.texts[row]).logits[0] for row in chosen]
            worst = max(worst, off(found, torch.cat(expected)))
    return worst


def edges(world: World) -> float:
    """Compare attribution scores of edges out of the embedding and a head with finite differences in the plain model."""
    anatomy = world.subject.anatomy
    text = world.texts[0]
    corrupt = text.clone()
    corrupt[2], corrupt[5] = (corrupt[2] + 11) % (VOCABULARY - 3) + 3, (corrupt[5] + 7) % (VOCABULARY - 3) + 3
    pair = PromptPair("pair", tuple(text.tolist()), tuple(corrupt.tolist()), answers=(5, 6), wrong_answers=(20,))
    scores = attribute_edges(world.subject, Pairs((pair,), "matrix"), method="eap")
    graph = scores.graph
    matrix = graph.matrix(scores.mean)
    wiring = Wiring(world.subject)
    names = {id(module): name for name, module in world.subject.plain.named_modules()}

    def plain_of(module: Any) -> Any:
        return world.plain.get_submodule(names[id(module)])

    blocks = _blocks(world)
    streams: list[Tensor] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    handle = blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        world.plain(input_ids=text[None], use_cache=False)
        world.plain(input_ids=corrupt[None], use_cache=False)
    handle.remove()
    change = streams[1] - streams[0]

    @torch.no_grad()
    def metric(module: Any, factor: float) -> float:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return ((args[0] + factor * change, *args[1:]), kwargs)
            key = next(name for name in ("hidden_states", "x") if name in kwargs)
            return (args, {**kwargs, key: kwargs[key] + factor * change})

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
        try:
            last = world.plain(input_ids=text[None], use_cache=False).logits[0, -1]
        finally:
            handle.remove()
        return float(last[[5, 6]].mean() - last[20])

    worst, scale = 0.0, float(abs(matrix[0]).max())
    for layer in range(anatomy.n_layers):
        readers = graph.readers_of(layer)
        norm, mlp_norm = wiring.attention_norm(layer), wiring.mlp_norm(layer)
        block = anatomy.blocks[layer]
        places = {}
        if norm is not None and mlp_norm is not None and norm.module is mlp_norm.module:
            places[plain_of(norm.module)] = float(matrix[0, readers].sum() + matrix[0, graph.mlp_reader(layer)])
        else:
            places[plain_of(block.attention if norm is None else norm.module)] = float(matrix[0, readers].sum())
            places[plain_of(block.mlp_read if mlp_norm is None else mlp_norm.module)] = float(matrix[0, graph.mlp_reader(layer)])
        for module, expected in places.items():
            each = []
            for step in _STEPS:
                near, far = (metric(module, size) - metric(module, -size) for size in (step, 2 * step))
                each.append(abs((8 * near - far) / (12 * step) - expected) / scale)
            worst = max(worst, min(each))
    return worst


@torch.no_grad()
def half(family: str) -> float:
    """Compare bfloat16 logits of padded, observed texts with the plain model's in the same type: the median token, as a rounding may choose another expert."""
    model = build(family, 0, torch.bfloat16)
    plain = copy.deepcopy(model)
    subject = load(model)
    texts = families.documents(VOCABULARY, seed=1, lengths=LENGTHS)
    worst = []
    for side in PADDINGS[1:]:
        batch = families.padded(texts, side)
        with observed(subject):
            found = subject.model(**model_inputs(batch.ids, batch.real), use_cache=False).logits.float()
        for row, text in enumerate(texts):
            expected = plain(input_ids=text[None], use_cache=False).logits[0].float()
            worst += ((batch.rows(found, row) - expected).abs().amax(-1) / expected.abs().max()).tolist()
    return float(torch.tensor(worst).median())


Check = Callable[[], float]
CHECKS: dict[str, Callable[[World], float]] = {
    "logits": logits,
    "entropy": entropy,
    "KL": divergence,
    "residual stream": residuals,
    "head ablation": ablation,
    "resumed forward": resumed,
    "edge attribution": edges,
}
