"""Subjects on one and on two devices, texts for them, and what "equal results" means."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import accelerate
import numpy as np
import pandas as pd
import torch
from torch import nn

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.data.prompt import Batch, Encoded, Example, collate
from mechscope.subject.discovery import discover
from mechscope.subject.load import Subject, load
from mechscope.subject.pair import Pair, pair
from tests import families
from tests.pretend import pretended

# one of each way to store projections, norms, positions and unembeddings
FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "qwen3")


def device_map(model: nn.Module, *, first: int = 1) -> dict[str, str]:
    """Map a model over two devices: the embedding and its first blocks on one, the rest on the other; an unembedding that is tied stays with the embedding.

    Args:
        model: The Hugging Face model.
        first: Blocks on the first device.
    """
    where = discover(model)
    names = {module: name for name, module in model.named_modules()}
    found = {names[block.module]: f"cuda:{int(layer >= first)}" for layer, block in enumerate(where.blocks)}
    found[names[where.embedding]] = "cuda:0"
    tied = where.unembedding.weight is where.embedding.weight
    found[names[where.unembedding]] = "cuda:0" if tied else "cuda:1"
    for name, module in model.named_modules():
        placed = [other for other in found if other == name or other.startswith(f"{name}.") or name.startswith(f"{other}.")]
        if not placed and name:
            # what is added to token embeddings beside them, all else (final norm, rotary angles) at the end as accelerate would put it
            found[name] = "cuda:0" if type(module) in (nn.Embedding, type(where.embedding)) or "position" in name else "cuda:1"
    return found


def spread(model: Any, *, first: int = 1) -> Any:
    """Put a model on two pretended devices with accelerate's own hooks; inside `pretended`."""
    return accelerate.dispatch_model(model, device_map(model, first=first))


class Both(NamedTuple):
    """The same two models on the CPU and over two pretended devices; the tuned one is cut elsewhere than the base."""

    single: Pair
    spread: Pair


@lru_cache(maxsize=8)
def both(family: str, dtype: torch.dtype = torch.float32) -> Both:
    """Build a base and a tuned model of a family on one and on two devices."""
    tokenizer = families.tokenizer()
    single = [load(families.build(family, dtype, seed), tokenizer=tokenizer) for seed in (0, 1)]
    with pretended():
        over_two = [load(spread(families.build(family, dtype, seed), first=seed + 1), tokenizer=tokenizer) for seed in (0, 1)]
    return Both(pair(*single), pair(*over_two))


def prompts(seed: int = 0, lengths: tuple[int, ...] = (9, 7, 9)) -> Pairs:
    """Return pairs with answers, a target, and the segments subject, document and summary."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, length in enumerate(lengths):
        clean = torch.randint(3, families.VOCABULARY, (length,), generator=generator).tolist()
        corrupt = [*clean[:2], (clean[2] + 8) % (families.VOCABULARY - 3) + 3, *clean[3:]]
        right, wrong = (torch.randperm(families.VOCABULARY - 3, generator=generator)[:2] + 3).tolist()
        segments = {"subject": ((1, 4),), "document": ((0, 4),), "summary": ((4, length),)}
        found.append(PromptPair(f"{seed}.{number}", tuple(clean), tuple(corrupt), (right,), (wrong,), (4, length), segments))
    return Pairs(tuple(found), "made for tests")


def encoded() -> Encoded:
    """Return documents with summaries as tokens."""
    texts = families.documents(seed=3, lengths=(14, 9, 11, 12))
    return Encoded(tuple(Example(str(row), tuple(text.tolist()), (1, 6), (6, len(text)), False) for row, text in enumerate(texts)), {})


def batch(padding: Any = "left") -> Batch:
    """Return these documents as one batch."""
    return collate(encoded().examples, pad_id=0, padding=padding)


def assert_same(found: Any, expected: Any, *, tolerance: float = 1e-6, where: str = "result") -> None:
    """See that two results are equal throughout, up to a tolerance relative to the largest value of each array (at least 1)."""
    found, expected = _plain(found), _plain(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_same(found[name], value, tolerance=tolerance, where=f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, tolerance=tolerance, where=f"{where}[{index}]")
    elif isinstance(expected, np.ndarray) and expected.dtype.kind == "f":
        assert found.shape == expected.shape, where
        scale = max(1.0, float(np.nanmax(np.abs(expected), initial=0.0)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale, err_msg=where)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected, err_msg=where)
    else:
        assert found == expected, where


def _plain(value: Any) -> Any:
    """Turn a result into arrays, lists and dictionaries of them."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return value.double().numpy() if value.is_floating_point() else value.numpy()
    if isinstance(value, pd.DataFrame):
        return {str(name): value[name].to_numpy() for name in value.columns}
    if isinstance(value, float):
        return np.array(value)
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, dict):
        return {str(name): inner for name, inner in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in fields(value)}
    # objects of other kinds hold models and tokenizers: tests compare the tables made of them
    return value


def subjects(pairs: Both) -> tuple[Subject, Subject]:
    """Return the base on one device and over two."""
    return pairs.single.base, pairs.spread.base
