"""Probes with one hidden layer, of all sites and labelings at once: they tell what no linear probe does, such as whether two signs agree.

    scores = W₂ relu(W₁ u + b₁) + b₂,   u = (x − mean) (Σ + λ t I)^−½, scaled to a mean variance of one

Rows are whitened as far as λ says, so that one learning rate suits all sites. Every labeling is learned from the same batches and the same beginning, by Adam
with decoupled weight decay, the rate falling to zero along a cosine; classes weigh alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.errors import DataError
from mechscope.probing.linear import Spectrum
from mechscope.shapes import by_shape
from mechscope.stats.co_moments import CoMoments

_RATE, _DECAY, _BATCH = 1e-2, 1e-2, 256


@dataclass(frozen=True)
class MlpProbe:
    """A probe with a hidden layer at every site.

    Attributes:
        mean: ``(site, width)``.
        hidden: ``(site, width, unit)``, of rows less their mean.
        hidden_bias: ``(site, unit)``.
        weights: ``(site, unit, class)``.
        bias: ``(site, class)``.
    """

    mean: Float[Tensor, "site width"]
    hidden: Float[Tensor, "site width unit"]
    hidden_bias: Float[Tensor, "site unit"]
    weights: Float[Tensor, "site unit class"]
    bias: Float[Tensor, "site class"]

    __repr__ = by_shape

    def scores(self, x: Float[Tensor, "site row width"]) -> Float[Tensor, "site row class"]:
        """Return each class's score."""
        units = torch.baddbmm(self.hidden_bias[:, None], (x - self.mean[:, None]).to(self.hidden), self.hidden).relu()
        return torch.baddbmm(self.bias[:, None], units, self.weights)

    def says(self, x: Float[Tensor, "site row width"]) -> Int[Tensor, "site row"]:
        """Return the class with the largest score."""
        return self.scores(x).argmax(-1)


def mlp(
    x: Float[Tensor, "site row width"],
    labels: Int[Tensor, "row labeling"],
    classes: int,
    *,
    shrinkage: float | Float[Tensor, " site"] = 1e-2,
    units: int = 32,
    steps: int = 400,
    spectrum: Spectrum | None = None,
    seed: int = 0,
) -> list[MlpProbe]:
    """Return the probe of each labeling, at every site.

    Args:
        x: Rows that are learned from.
        labels: Their classes.
        classes: How many classes there are.
        shrinkage: λ, for all sites or for each.
        units: Of the hidden layer.
        steps: Of 256 rows each.
        spectrum: Of the rows' covariance, where it is at hand.
        seed: Of the first weights and the batches.

    Raises:
        DataError: Rows of a labeling are of one class only.
    """
    labels = labels.to(x.device)
    counts = torch.nn.functional.one_hot(labels.T, classes).sum(1)
    if bool(((counts > 0).sum(1) < 2).any()):
        raise DataError("rows of a labeling are of one class only: a probe needs some of two at least")
    spectrum = spectrum or Spectrum.of(CoMoments.of(x))
    mean, whitening = x.double().mean(1), _whitening(spectrum, shrinkage)
    u = ((x - mean[:, None].to(x)) @ whitening.to(x)).float()
    sites, n, width = u.shape
    labelings = labels.shape[1]
    random = torch.Generator().manual_seed(seed)
    first = torch.randn(width, units, generator=random) * math.sqrt(2 / width)
    second = torch.randn(units, classes, generator=random) / math.sqrt(units)
    w1, w2 = (each.to(x.device).expand(sites, labelings, *each.shape).clone().requires_grad_() for each in (first, second))
    b1, b2 = (torch.zeros(sites, labelings, 1, size, device=x.device, requires_grad=True) for size in (units, classes))
    weight = (n / classes / counts.clamp(min=1)).to(u)
    optimizer = torch.optim.AdamW(
        [{"params": [w1, w2], "weight_decay": _DECAY}, {"params": [b1, b2], "weight_decay": 0.0}], lr=_RATE, betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.empty(0, dtype=torch.int64)
    with torch.enable_grad():
        for _ in range(steps):
            if len(order) < min(_BATCH, n):
                order = torch.randperm(n, generator=random)
            at, order = order[:_BATCH].to(x.device), order[_BATCH:]
            scores = (u[:, None, at] @ w1 + b1).relu() @ w2 + b2
            own = labels[at].T
            loss = -torch.log_softmax(scores, -1).gather(-1, own[None, :, :, None].expand(sites, -1, -1, 1))[..., 0]
            optimizer.zero_grad()
            # problems share nothing, so that the sum over them has the gradient of each
            (loss * weight.gather(1, own)).mean(-1).sum().backward()
            optimizer.step()
            schedule.step()
    hidden = whitening[:, None] @ w1.detach().double()
    b1, w2, b2 = (each.detach().double() for each in (b1, w2, b2))
    b2 = b2.masked_fill((counts == 0)[:, None], -torch.inf)
    return [MlpProbe(mean, hidden[:, each], b1[:, each, 0], w2[:, each], b2[:, each, 0]) for each in range(labelings)]


def _whitening(spectrum: Spectrum, shrinkage: float | Float[Tensor, " site"]) -> Float[Tensor, "site width direction"]:
    inverse = spectrum.inverse(shrinkage)
    variance = (spectrum.values * inverse).mean(-1, keepdim=True)
    # of rows that are all the same nothing is made larger
    scale = torch.where(variance > 0, inverse / variance.clamp(min=torch.finfo(torch.float64).tiny), inverse)
    return spectrum.vectors * scale.sqrt()[:, None]
