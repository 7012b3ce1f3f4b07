"""A learned subspace: an orthogonal rotation, and how many of its first dimensions are exchanged.

The number is fixed, or learned as a soft boundary that sharpens while it is pulled towards fewer dimensions (boundless search, Wu et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mechscope.subject import Subject

# Wu et al. 2023: the boundary is first so soft that all dimensions feel it, at last a step
_TEMPERATURES = (50.0, 0.1)


def random_rotation(width: int, seed: int) -> Float[Tensor, "features features"]:
    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


def precision(subject: Subject) -> torch.dtype:
    """Return the rotation's type: never less exact than single precision, so that its columns stay orthogonal."""
    return torch.float64 if subject.dtype == torch.float64 else torch.float32


def exchanged(difference: Tensor, rotation: Tensor, share: Tensor | None = None) -> Tensor:
    """Project source − base on the subspace, each dimension by its share."""
    rotation = rotation.to(difference.device)
    inside = difference.to(rotation.dtype) @ rotation
    return ((inside if share is None else inside * share) @ rotation.T).to(difference.dtype)


class Subspace:
    """What is learned: the rotation, and, boundless, how many of its dimensions are exchanged."""

    def __init__(self, width: int, dimensions: int | None, seed: int, subject: Subject) -> None:
        dtype = precision(subject)
        self.width = width
        self.fixed = dimensions
        with torch.random.fork_rng(devices=[]):  # torch fills up a tall matrix at random
            torch.manual_seed(seed)
            self.turn = nn.Linear(dimensions or width, width, bias=False, dtype=dtype)
            with torch.no_grad():
                self.turn.weight.copy_(random_rotation(width, seed)[:, : dimensions or width])
            parametrizations.orthogonal(self.turn)
        self.turn.to(subject.device)
        # as a share of the width
        self.boundary = nn.Parameter(torch.tensor(0.5, dtype=dtype, device=subject.device))
        self.at = torch.arange(width, device=subject.device, dtype=dtype) + 0.5
        self.temperature = _TEMPERATURES[0] if dimensions is None else float("nan")

    def anneal(self, done: float) -> None:
        """Sharpen the boundary geometrically."""
        if self.fixed is None:
            first, last = _TEMPERATURES
            self.temperature = first * (last / first) ** done

    def _mask(self) -> Tensor | None:
        return None if self.fixed is not None else torch.sigmoid((self.boundary * self.width - self.at) / self.temperature)

    def exchange(self) -> Callable[[Tensor], Tensor]:
        """Return the projection as it is now."""
        rotation, mask = self.turn.weight, self._mask()
        return lambda difference: exchanged(difference, rotation, mask)

    def share(self) -> Tensor | float:
        """Return the share of the dimensions that is exchanged, if it is learned."""
        mask = self._mask()
        return 0.0 if mask is None else mask.mean()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep at least one dimension and at most all."""
        self.boundary.clamp_(1 / self.width, 1.0)

    @property
    def dimensions(self) -> int:
        """Return the number of dimensions, rounded."""
        return round(self.boundary.item() * self.width) if self.fixed is None else self.fixed

    def rotation(self) -> Tensor:
        """Return the columns of the subspace."""
        return self.turn.weight.detach()[:, : self.dimensions].clone()
