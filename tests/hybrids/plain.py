"""Tiny hybrid models of four kinds, beside plain copies that Hugging Face runs on one unpadded text at a time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.instrument import load
from mechscope.subject import Pair, Subject, pair
from tests.matrix.configs import VOCABULARY
from tests.matrix.plain import build

# short convolutions; state-space models, of two kinds, the second with a factor on what blocks add; linear attention beside gated heads
FAMILIES = ("lfm2", "jamba", "granitemoehybrid", "qwen3_next")
# of the three layers one attends
ATTENDS, MIXES = 1, (0, 2)
# where each family keeps what mixes tokens, by the module's name in its block
MIXERS = {"lfm2": "conv", "jamba": "mamba", "granitemoehybrid": "mamba", "qwen3_next": "linear_attn"}
FACTORS = {"granitemoehybrid": 0.5}


@lru_cache(maxsize=8)
def model(family: str, seed: int = 0) -> Any:
    """Return a plain model, whose attention gives its maps out."""
    made = build(family, seed, torch.float64)
    if family in FACTORS:
        made.config.residual_multiplier = FACTORS[family]
        for block in made.model.layers:
            block.residual_multiplier = FACTORS[family]
    made.set_attn_implementation("eager")
    return made


@lru_cache(maxsize=8)
def subject(family: str, seed: int = 0) -> Subject:
    """Return the same model as mechscope loads it."""
    made = copy.deepcopy(model(family, seed))
    made.set_attn_implementation("sdpa")
    return load(made)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """See that values are equal but for the rounding of float32, in which norms and recurrences of these families compute whatever the model's type.

    That it is rounding and nothing of padding is seen where their code is made to compute in float64: there the largest deviation is 1e-14.
    """
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=2e-5 * float(expected.abs().max()))


def both(family: str) -> Pair:
    """Return two models of a family."""
    return pair(subject(family, 0), subject(family, 1))


def texts(lengths: tuple[int, ...] = (12, 9, 7, 12)) -> Pairs:
    """Return random texts of several lengths, each with a corrupt version, answers and a target."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for number, length in enumerate(lengths):
        clean = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        corrupt = [token if at % 3 else 3 + (token + 11) % (VOCABULARY - 3) for at, token in enumerate(clean)]
        made.append(PromptPair(str(number), tuple(clean), tuple(corrupt), (5 + number,), (40 + number,), (length - 3, length)))
    return Pairs(tuple(made), "made for tests")


def mixer(plain: Any, family: str, layer: int) -> Any:
    """Return the module that mixes a layer's tokens."""
    return getattr(plain.model.layers[layer], MIXERS[family])


@contextlib.contextmanager
def giving(module: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module of a plain model give something else."""
    handle = module.register_forward_hook(lambda _, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a change to a value, whatever stood there."""
    return lambda _: value


def shifted(by: Tensor, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Return a change that multiplies, and adds something."""
    return lambda x: x * scale + by


@torch.no_grad()
def outputs(plain: Any, module: Any, ids: tuple[int, ...]) -> Tensor:
    """Return what a module gives on one text, ``(token, d_model)``."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    try:
        plain(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def logits(plain: Any, ids: tuple[int, ...]) -> Tensor:
    """Return one text's logits, ``(token, vocabulary)``."""
    found: Tensor = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return found


def difference(plain: Any, one: PromptPair) -> float:
    """Return the logit difference after the last token of the clean text."""
    last = logits(plain, one.clean)[-1]
    return float(last[list(one.answers)].mean() - last[list(one.wrong_answers)].mean())


@torch.no_grad()
def attention(plain: Any, ids: tuple[int, ...]) -> Tensor:
    """Return the map of the one layer that attends, ``(head, query, key)``."""
    (found,) = [one for one in plain(input_ids=torch.tensor([ids]), use_cache=False, output_attentions=True).attentions if one is not None]
    return found[0].double()
