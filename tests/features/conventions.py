"""What other libraries' conventions are written down with: raw arrays, and whether a dictionary gives what they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechscope.features.dictionary import Dictionary
from tests.features.oracle import TOKENS, D

Arrays = Mapping[str, np.ndarray]
K = 4
X = np.random.default_rng(9).normal(size=(TOKENS, D)) * 2


def arrays(seed: int = 0, /, **shapes: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def top(x: np.ndarray, k: int = K) -> np.ndarray:
    kept = np.zeros_like(x)
    for row, values in enumerate(x):
        best = np.argsort(-values)[:k]
        kept[row, best] = values[best]
    return relu(kept)


def equal(given: Dictionary, f: np.ndarray, out: np.ndarray, x: np.ndarray = X) -> None:
    values = [torch.from_numpy(x)]
    given = given.to(torch.float64)
    assert 0 < (f != 0).sum() < f.size
    np.testing.assert_allclose(given.encode(values).dense(), f, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(given(values)[0], out, rtol=1e-6, atol=1e-6)


def doubles(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}
