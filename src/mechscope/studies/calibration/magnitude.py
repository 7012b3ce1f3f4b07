"""Verdicts by size: changed, negligible or undecided, where the size is known.

Two kinds of worlds. In *drawn documents* the values of 48 heads are drawn with known means around the smallest effect δ, skewed as divergences are:
one head is at the boundary, in the company where the correction over heads protects it least. In *models* a tiny random transformer is compared with
itself, with itself in bfloat16, with weights moved by less than
bfloat16 rounds them, and with one output projection changed; documents are random tokens and δ is the product's own default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mechscope.studies.calibration.truth import Truth

if TYPE_CHECKING:
    from torch.nn import Module

_HEADS = 48
_DELTA = 1.0
# what a sample of documents looks like: (spread over documents as σ of a log-normal, in words)
_SKEWS = (
    (0.25, "values a quarter of their mean apart"),
    (0.5, "skewed values half of their mean apart"),
    (1.0, "very skewed values farther apart than their mean"),
)
_LAYERS, _WIDTH, _PARTS, _WORDS = 2, 32, 4, 97
_PLANTED = (1, 2)


def _drawn(seed: int, *, size: float, company: float, n: int, skew: float, signed: bool = False) -> str:
    """Return the verdict on one head whose true mean is `size` times δ, among heads of `company` times δ."""
    from mechscope.stats.skewness import ThirdMoments
    from mechscope.stats.verdicts import verdicts

    means = np.full(_HEADS, company * _DELTA)
    means[0] = size * _DELTA
    values = means * _documents(np.random.default_rng(seed), n, skew)
    moments = ThirdMoments((_HEADS,))
    moments.update_many(-values if signed else values)
    return str(verdicts(moments, _DELTA, signed=signed)[0])


def _documents(random: np.random.Generator, n: int, skew: float) -> np.ndarray:
    """Return values of mean 1 of every head over documents, which are long or short, hard or easy, for all heads alike."""
    shared, own = random.normal(size=(n, 1)), random.normal(size=(n, _HEADS))
    return np.exp(skew * (0.6 * shared + 0.8 * own) - skew**2 / 2)


def _any_drawn(seed: int, *, n: int, skew: float, shape: str) -> str:
    """Return a verdict that some head of 48 has, all of which are exactly at δ."""
    from mechscope.stats.skewness import ThirdMoments
    from mechscope.stats.verdicts import verdicts

    random = np.random.default_rng(seed)
    if shape == "lone":
        # one head is skewed, the others are far below δ and are not
        values = 0.05 * (1 + 0.2 * random.normal(size=(n, _HEADS)))
        values[:, 0] = _documents(random, n, skew)[:, 0]
    else:
        values = {"right": 1.0, "left": -1.0, "far": 3.0}[shape] * (_documents(random, n, skew) - 1) + 1
    moments = ThirdMoments((_HEADS,))
    moments.update_many(_DELTA * values)
    found = verdicts(moments, _DELTA, signed=shape != "right")
    if shape == "lone":
        return str(found[0])
    return next((verdict for verdict in ("changed", "negligible") if (found == verdict).any()), "undecided")


def _world(seed: int) -> Module:
    """Return a tiny random GPT-2 with patterns far from uniform."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=_LAYERS, n_head=_PARTS, n_embd=_WIDTH, n_positions=64, vocab_size=_WORDS)
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.5 * noise / min(parameter.shape) ** 0.5 if parameter.ndim == 2 else parameter + 0.3 * noise)
    return model


def _same(model: Module, seed: int) -> Module:
    return model


def _bfloat16(model: Module, seed: int) -> Module:
    import torch

    return model.to(torch.bfloat16)


def _slightly_moved(model: Module, seed: int) -> Module:
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            # bfloat16 rounds a weight by up to 2⁻⁹ of itself
            parameter.mul_(1 + 2**-11 * torch.randn(parameter.shape, generator=generator))
    return model


def _one_head_moved(model: Module, seed: int, size: float) -> Module:
    import torch

    layer, head = 1, _PLANTED[1]
    width = _WIDTH // _PARTS
    weight = model.get_parameter(f"transformer.h.{layer}.attn.c_proj.weight")
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        own = weight[head * width : (head + 1) * width]
        noise = torch.randn(own.shape, generator=generator)
        own.add_(size * noise * own.norm() / noise.norm())
    return model


def _judged(seed: int, change: Callable[[Module, int], Module]) -> Iterator[tuple[str, str]]:
    """Yield every part with its verdicts, of a random model and what `change` makes of it."""
    import copy

    from mechscope.data.prompt import Encoded, Example
    from mechscope.difference import difference, smallest_effects
    from mechscope.instrument import Execution
    from mechscope.subject import pair
    from mechscope.subject.load import load

    random = np.random.default_rng(seed)
    base = _world(seed)
    models = pair(load(base), load(change(copy.deepcopy(base), seed)))
    examples = []
    for number in range(16):
        length = int(random.integers(16, 32))
        tokens = tuple(int(token) for token in random.integers(3, _WORDS, length))
        examples.append(Example(f"{seed}.{number}", tokens, (0, length - 6), (length - 6, length), False))
    smallest = smallest_effects(models.base, examples, seed=seed)
    found = difference(models, Encoded(tuple(examples), {}), replicates=2, smallest=smallest, execution=Execution(tokens_per_batch=4096))
    for name, table in (("heads", found.heads), ("layers", found.layers), ("outputs", found.outputs)):
        rows = table[table["rows"] == "all"]
        parts = rows["component"] if name == "heads" else [f"{name}{at}" for at in range(len(rows))]
        for column in rows.filter(like="_verdict"):
            yield from ((f"{part} {column}", str(verdict)) for part, verdict in zip(parts, rows[column], strict=True))


def _any_changed(seed: int, change: Callable[[Module, int], Module]) -> str:
    found = {verdict for _, verdict in _judged(seed, change)}
    return next(verdict for verdict in ("changed", "undecided", "negligible", "not measured") if verdict in found)


def _planted(seed: int, size: float) -> str:
    """Return the verdict on what the changed head writes, or that another head was named."""
    found = dict(_judged(seed, partial(_one_head_moved, size=size)))
    writes = {part: verdict for part, verdict in found.items() if part.startswith("a") and part.endswith(" write_change_verdict")}
    own = f"a{_PLANTED[0]}.h{_PLANTED[1]} write_change_verdict"
    others = [part for part, verdict in writes.items() if verdict == "changed" and part != own]
    return "another head changed" if others else writes[own]


def _boundary() -> Iterator[Truth]:
    for n in (12, 16, 32, 100):
        for skew, words in _SKEWS:
            # with a sign the same draws are mirrored: once is enough
            for signed in (False, True) if n == 32 else (False,):
                kind = "a quantity with a sign" if signed else "a quantity that cannot be negative"
                for verdict, others, company in (("negligible", "below", 0.05), ("changed", "above", 20.0)):
                    yield Truth(
                        claim=f"part {verdict}",
                        world=f"{kind}, exactly the smallest effect, n = {n}, {words}; 47 other heads far {others} it",
                        kind="null",
                        unit="document",
                        draw=partial(_drawn, size=1.0, company=company, n=n, skew=skew, signed=signed),
                        wrong=(verdict,),
                        small=200,
                        full=4000,
                    )


def _families() -> Iterator[Truth]:
    worlds = (
        ("right", "48 heads exactly at the smallest effect"),
        ("left", "48 heads exactly at the smallest effect, skewed to the left"),
        ("far", "48 heads exactly at the smallest effect, with a sign and three times as far spread"),
        ("lone", "one head exactly at the smallest effect, 47 far below it and symmetric"),
    )
    for n in (12, 32, 100):
        for skew in (0.5, 0.7, 1.0):
            for shape, words in worlds:
                yield Truth(
                    claim="part changed or negligible" if shape == "lone" else "any part changed or negligible",
                    world=f"{words}, n = {n}, log-normal with σ = {skew:g}",
                    kind="null",
                    unit="document",
                    draw=partial(_any_drawn, n=n, skew=skew, shape=shape),
                    wrong=("changed", "negligible"),
                    small=60,
                )


def _power() -> Iterator[Truth]:
    for n in (12, 32, 100):
        for size in (1.25, 1.5, 2.0, 0.75, 0.5, 0.25):
            right = "changed" if size > 1 else "negligible"
            yield Truth(
                claim=f"part {right}",
                world=f"{size:g} times the smallest effect, n = {n}, {_SKEWS[0][1]}; 47 other heads at half of it",
                kind="planted",
                unit="document",
                size=size,
                draw=partial(_drawn, size=size, company=0.5, n=n, skew=_SKEWS[0][0]),
                right=(right,),
            )


def _models() -> Iterator[Truth]:
    worlds: tuple[tuple[str, Callable[[Module, int], Module]], ...] = (
        ("the same model twice", _same),
        ("the same model in bfloat16", _bfloat16),
        ("weights moved by a quarter of what bfloat16 rounds", _slightly_moved),
    )
    for world, change in worlds:
        yield Truth(
            claim="any part changed",
            world=world,
            kind="null",
            unit="document",
            draw=partial(_any_changed, change=change),
            wrong=("changed",),
            small=8,
            full=300,
        )
    for size in (0.01, 0.05, 0.2):
        yield Truth(
            claim="part changed",
            world="noise on the output projection of one head, a share of its norm",
            kind="planted",
            unit="document",
            size=size,
            draw=partial(_planted, size=size),
            wrong=("another head changed",),
            right=("changed",),
            small=8,
            full=200,
        )


TRUTHS: tuple[Truth, ...] = (*_boundary(), *_families(), *_power(), *_models())
