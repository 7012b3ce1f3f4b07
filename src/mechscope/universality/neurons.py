"""Neurons that two models share: for each the other model's neuron that fires most alike, beside a basis that means nothing.

A neuron is compared with all neurons of the other model, and the largest of many correlations is large by chance. Two things keep that out: the partner
is chosen on half of the texts and its correlation is told of the other half; and the same is done with the other model's neurons turned by a random
rotation within each layer, which hold the same information in no basis of their own. The excess is the correlation less that of the best rotated neuron.
Source: Gurnee et al. 2024, "Universal Neurons in GPT2 Language Models" (whose rotation is of Gaussian rows; this one is orthogonal).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.errors import DataError

Layers = Sequence[Float[Tensor, "row neuron"]]
# neurons of a layer that are compared at once
_BLOCK = 4096


def same_neurons(first: Layers, second: Layers, text_of: Int[np.ndarray, " row"], *, seed: int = 0) -> pd.DataFrame:
    """Find every neuron's partner in another model.

    Args:
        first: Neurons of each layer at the aligned tokens.
        second: The other model's.
        text_of: The text of every row.
        seed: Of the halves of the texts, and of the rotations.

    Returns:
        One row per neuron of the first model: `component`, `layer`, `feature` (its number), `partner`, `partner_layer`, `correlation` (of the half that did not
        choose), `rotated` (the same of the best rotated neuron) and `excess` (their difference). A neuron that never changes in a half has NaN.

    Raises:
        DataError: There are fewer than four texts.
    """
    texts = np.unique(text_of)
    if len(texts) < 4:
        raise DataError(
            f"neurons are compared on half of the texts and told of the other half: {len(texts)} texts are too few, give at least 4"
        )
    rng = np.random.default_rng(seed)
    chosen = torch.from_numpy(np.isin(text_of, rng.permutation(texts)[: len(texts) // 2]))
    turned = [layer @ _rotation(layer.shape[1], seed + at) for at, layer in enumerate(second)]
    fit = [_standard(layer[chosen]) for layer in first]
    own, random = (_best(fit, [_standard(layer[chosen]) for layer in other]) for other in (second, turned))
    told = [_standard(layer[~chosen]) for layer in first]
    correlation = _of_partners(told, [_standard(layer[~chosen]) for layer in second], own)
    rotated = _of_partners(told, [_standard(layer[~chosen]) for layer in turned], random)
    rows = []
    for layer, (partners, at, by_chance) in enumerate(zip(own, correlation, rotated, strict=True)):
        other_layer, other = partners
        rows.append(
            pd.DataFrame(
                {
                    "component": [f"m{layer}.n{neuron}" for neuron in range(len(at))],
                    "layer": layer,
                    "feature": np.arange(len(at)),
                    "partner": [f"m{a}.n{b}" for a, b in zip(other_layer, other, strict=True)],
                    "partner_layer": other_layer,
                    "correlation": at,
                    "rotated": by_chance,
                    "excess": at - by_chance,
                }
            )
        )
    return pd.concat(rows, ignore_index=True)


def _rotation(width: int, seed: int) -> Float[Tensor, "width width"]:
    """Return a random orthogonal matrix, uniform over all of them (Stewart 1980)."""
    generator = torch.Generator().manual_seed(seed)
    turn, scale = torch.linalg.qr(torch.randn(width, width, generator=generator))
    return turn * scale.diagonal().sign()


def _standard(values: Float[Tensor, "row neuron"]) -> Float[Tensor, "row neuron"]:
    """Centre columns and give them length one, so that products are correlations; a column without variation becomes NaN."""
    centred = values - values.mean(0)
    length = centred.norm(dim=0)
    # what is left of a constant is rounding
    flat = length <= 1e-6 * values.norm(dim=0)
    return (centred / length).masked_fill(flat, torch.nan)


def _best(first: Layers, second: Layers) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for every neuron of each layer the layer and number of the other model's neuron that correlates most."""
    found = []
    # a neuron that says nothing is nobody's partner
    quiet = [torch.nan_to_num(other, nan=0.0) for other in second]
    for layer in first:
        at, which = torch.full((layer.shape[1],), -torch.inf), torch.zeros(layer.shape[1], dtype=torch.long)
        where = torch.zeros_like(which)
        for number, other in enumerate(quiet):
            for begin in range(0, other.shape[1], _BLOCK):
                value, place = (torch.nan_to_num(layer, nan=0.0).T @ other[:, begin : begin + _BLOCK]).max(dim=1)
                better = value > at
                at, which = torch.where(better, value, at), torch.where(better, place + begin, which)
                where = where.masked_fill(better, number)
        found.append((where.numpy(), which.numpy()))
    return found


def _of_partners(first: Layers, second: Layers, partners: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Return the correlation of every neuron with its partner."""
    found = []
    for layer, (where, which) in zip(first, partners, strict=True):
        theirs = torch.empty_like(layer)
        for number, other in enumerate(second):
            mine = torch.from_numpy(where == number)
            theirs[:, mine] = other[:, torch.from_numpy(which)[mine]]
        found.append((layer * theirs).sum(0).numpy())
    return found
