"""Toy models of superposition: more features than dimensions, and what becomes of them (Elhage et al. 2022, "Toy Models of Superposition").

x̂ = ReLU(Wᵀ W x + b) with n features in m < n dimensions. Each feature is zero with probability S and else uniform in [0, 1]; the loss weighs feature i
with its importance. Dense features (S = 0) leave room for m of them; sparse ones share dimensions, as they seldom meet. Known answers: two features in
one dimension are an antipodal pair, five in two dimensions a pentagon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.features import Rule, autoencoder, train
from mechscope.features.activations import Block
from mechscope.features.affine import Affine, moments_of
from mechscope.features.places import Place, places
from mechscope.features.trainer import Plan
from mechscope.instrument import Execution
from mechscope.settings.features import FeatureTraining, Objective
from mechscope.shapes import by_shape

# steps between two reports
_REPORTED = 100
# rows of a block that a dictionary is trained on, and blocks of a round
_ROWS, _BLOCKS = 4096, 8


@dataclass(frozen=True)
class Toys:
    """Trained toy models, side by side.

    Attributes:
        weights: ``(model, dimension, feature)``: W.
        bias: ``(model, feature)``: b.
        sparsity: ``(model)``: the probability S that a feature is zero.
        importance: ``(model, feature)``: its weight in the loss.
        loss: ``(model)``: mean weighted squared error of fresh data, summed over features.
    """

    weights: Float[Tensor, "model dimension feature"]
    bias: Float[Tensor, "model feature"]
    sparsity: Float[Tensor, " model"]
    importance: Float[Tensor, "model feature"]
    loss: Float[Tensor, " model"]

    __repr__ = by_shape

    @property
    def norms(self) -> Float[Tensor, "model feature"]:
        """How strongly each feature is represented: 0 not at all, about 1 fully."""
        return self.weights.norm(dim=1)

    @property
    def dimensionality(self) -> Float[Tensor, "model feature"]:
        """The share of a dimension that each feature has to itself: ‖W_i‖² / Σ_j (Ŵ_i · W_j)²; 0 for one that is not represented."""
        unit = torch.nn.functional.normalize(self.weights, dim=1)
        shared = torch.einsum("mdi,mdj->mij", unit, self.weights).square().sum(2)
        # what training left of a feature is not a representation
        return torch.where(self.norms > 1e-2, self.norms.square() / shared.clamp(min=1e-12), 0.0)

    @property
    def linear_loss(self) -> Float[Tensor, " model"]:
        """The loss of a model that keeps the most important features, one in each dimension, and predicts the mean of all others."""
        kept = self.weights.shape[1]
        # of a feature that is x with probability 1 − S and uniform there
        variance = (1 - self.sparsity) / 3 - ((1 - self.sparsity) / 2).square()
        return self.importance.sort(dim=1, descending=True).values[:, kept:].sum(1) * variance


def train_toys(
    sparsity: Float[Tensor, " model"],
    importance: Float[Tensor, "model feature"],
    dimensions: int,
    *,
    steps: int = 4000,
    batch: int = 1024,
    learning_rate: float = 5e-3,
    execution: Execution = Execution(),
) -> Toys:
    """Train toy models side by side with Adam; the learning rate falls to zero.

    Args:
        sparsity: Of each model.
        importance: Of its features.
        dimensions: Of all.
        steps: Of training, each on fresh data.
        batch: Rows of a step.
        learning_rate: At the start.
        execution: Seed (of weights and data), progress.

    Raises:
        SettingsError: A sparsity is not a probability below one, or there are not more features than dimensions, at least one.
    """
    if not ((sparsity >= 0) & (sparsity < 1)).all():
        raise SettingsError(f"sparsities are {sparsity.tolist()}: each must be 0 or more and below 1")
    models, features = importance.shape
    if not 1 <= dimensions < features:
        raise SettingsError(
            f"{features} features in {dimensions} dimensions: give more features than dimensions, and at least one dimension"
        )
    generator = torch.Generator().manual_seed(execution.seed)
    weights = (torch.randn(models, dimensions, features, generator=generator) * features**-0.5).requires_grad_()
    bias = torch.zeros(models, features, requires_grad=True)
    optimizer = torch.optim.Adam([weights, bias], lr=learning_rate)
    pace = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step % _REPORTED == 0:
            execution.told("training toy models", step, steps)
        # models do not touch one another, so their losses may be summed
        loss = _loss(weights, bias, draw(sparsity, features, batch, generator), importance).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pace.step()
    with torch.no_grad():
        fresh = [_loss(weights, bias, draw(sparsity, features, batch, generator), importance) for _ in range(32)]
        return Toys(weights.detach(), bias.detach(), sparsity, importance, torch.stack(fresh).mean(0))


def draw(sparsity: Float[Tensor, " model"], features: int, batch: int, generator: torch.Generator) -> Float[Tensor, "model row feature"]:
    """Draw features: zero with probability S, else uniform."""
    shape = (len(sparsity), batch, features)
    there = torch.rand(shape, generator=generator) >= sparsity[:, None, None]
    return torch.rand(shape, generator=generator) * there


def _loss(weights: Tensor, bias: Tensor, rows: Tensor, importance: Tensor) -> Float[Tensor, " model"]:
    hidden = torch.einsum("mdf,mrf->mrd", weights, rows)
    guess = (torch.einsum("mdf,mrd->mrf", weights, hidden) + bias[:, None]).relu()
    return ((guess - rows).square() * importance[:, None]).sum(2).mean(1)


class _Hidden:
    """What one toy model holds, as activations to train a dictionary on."""

    def __init__(self, weights: Float[Tensor, "dimension feature"], sparsity: float, seed: int) -> None:
        self.places: tuple[Place, ...] = places("resid0")
        self.weights, self.sparsity, self.seed = weights, sparsity, seed
        self.blocks = _BLOCKS
        self.identity: dict[str, Any] = {"models": {"": "toy"}, "toy": weights.tolist(), "sparsity": sparsity, "seed": seed}
        self.limits: dict[str, float] = {}

    def block(self, number: int) -> Block:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        rows = draw(torch.tensor([self.sparsity]), self.weights.shape[1], _ROWS, generator)[0]
        return {self.places[0]: rows @ self.weights.T}

    def affine(self, place: Place) -> Affine:
        return Affine.fitted(moments_of(torch.cat([self.block(number)[place] for number in range(self.blocks)])))


def recovered(
    weights: Float[Tensor, "dimension feature"], sparsity: float, *, steps: int = 2000, execution: Execution = Execution()
) -> tuple[Float[np.ndarray, " feature"], Float[np.ndarray, " feature"]]:
    """Train a dictionary on what a toy model holds, and see which of its features are among the latents.

    Args:
        weights: W of one model.
        sparsity: Of its features.
        steps: Of training a TopK dictionary with as many latents as features, as many active as features are on average.
        execution: Seed.

    Returns:
        For every feature the largest cosine of its direction with a decoder; and with as many random directions, the control.
    """
    dimensions, features = weights.shape
    active = max(1, round(features * (1 - sparsity)))
    plan = Plan(autoencoder("resid0", dimensions, features, Rule("topk", min(active, features - 1))), Objective(dead_after=20_000))
    training = FeatureTraining(steps=steps, batch=512, learning_rate=3e-3)
    trained = train(_Hidden(weights, sparsity, execution.seed), {"toy": plan}, training=training, execution=Execution(seed=execution.seed))
    decoder = trained["toy"].dictionary.decoders()
    noise = torch.randn(features, dimensions, generator=torch.Generator().manual_seed(execution.seed))
    return _nearest(weights.T, decoder), _nearest(weights.T, noise)


def _nearest(directions: Float[Tensor, "feature dimension"], found: Float[Tensor, "latent dimension"]) -> Float[np.ndarray, " feature"]:
    unit = [torch.nn.functional.normalize(each, dim=1) for each in (directions, found)]
    nearest: np.ndarray = (unit[0] @ unit[1].T).max(dim=1).values.numpy()
    return nearest


def importances(features: int, decay: float, models: Sequence[float] | Tensor) -> Float[Tensor, "model feature"]:
    """Return the importances decayⁱ of every feature, for as many models."""
    return (decay ** torch.arange(features)).expand(len(models), -1).clone()
