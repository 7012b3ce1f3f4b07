"""Activations of which it is known what they are made of: a few of many directions, each as strong as a draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Planted:
    """Sums of `active` of the rows of `directions` ``(direction, d)``, all of norm one."""

    directions: Float[Tensor, "direction d"]
    active: int

    @classmethod
    def of(cls, width: int, directions: int, active: int, seed: int = 0) -> Planted:
        """Draw directions."""
        rows = torch.randn(directions, width, generator=torch.Generator().manual_seed(seed))
        return cls(rows / rows.norm(dim=1, keepdim=True), active)

    def codes(self, tokens: int, seed: int) -> Float[Tensor, "token direction"]:
        """Draw how strong each direction is in some tokens: between 0.5 and 1.5 where it is active."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(tokens, len(self.directions), generator=generator).topk(self.active, dim=1).indices
        strength = 0.5 + torch.rand(tokens, self.active, generator=generator)
        return torch.zeros(tokens, len(self.directions)).scatter(1, chosen, strength)

    def rows(self, tokens: int, seed: int) -> Float[Tensor, "token d"]:
        """Draw tokens, scaled to a mean squared norm of about one."""
        return self.codes(tokens, seed) @ self.directions / (self.active * 13 / 12) ** 0.5


def best_cosines(found: Float[Tensor, "latent d"], directions: Float[Tensor, "direction d"]) -> Float[Tensor, " direction"]:
    """Return for each direction the largest cosine with what was found: their mean is the MMCS of Sharkey et al. (2022)."""
    unit = found / found.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (directions @ unit.T).max(dim=1).values
