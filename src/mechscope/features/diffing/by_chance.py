"""How near to a direction some latent of a dictionary comes by chance: what stands beside every cosine by which a latent counts as found.

    m = Σ_j g_j D_j / ‖D_j‖        g_j drawn from N(0, 1)

Such random mixtures of a dictionary's decoders have their second moments: they lean to where its latents lean, so that directions which all latents share
make nothing look found. The nearest of as many mixtures as there are latents to choose from is the nearest by chance. Only the square root of the moments is
needed, so that nothing of size mixtures × latents is held.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 10


def nearest_by_chance(
    directions: Float[Tensor, "row width"],
    decoders: Float[Tensor, "latent width"],
    count: int,
    *,
    recurs: float,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Look for directions among random mixtures of decoders.

    Args:
        directions: What is looked for, of any length but zero.
        decoders: What is mixed; those of length zero are left aside.
        count: Mixtures of a draw: as many as there were latents to choose from.
        recurs: Cosine from which a direction counts as found.
        draws: How often mixtures are drawn.
        seed: Of the draws.

    Returns:
        Of every direction the mean over draws of the largest cosine with a mixture (NaN where there is none), and the share of draws in which that is at
        least `recurs` (0 where there is none).
    """
    if not count or not len(directions):
        return np.full(len(directions), np.nan), np.zeros(len(directions))
    rows, mixed = (torch.nn.functional.normalize(each.double().cpu(), dim=1) for each in (directions, decoders))
    values, axes = torch.linalg.eigh(mixed.T @ mixed)
    spread = axes * values.clamp(min=0).sqrt()
    generator = torch.Generator().manual_seed(seed)
    largest = []
    for _ in range(draws):
        mixtures = torch.randn(count, len(spread), generator=generator, dtype=torch.float64).float() @ spread.T.float()
        largest.append((rows.float() @ torch.nn.functional.normalize(mixtures, dim=1).T).max(dim=1).values)
    found = torch.stack(largest).double()
    return found.mean(0).numpy(), (found >= recurs).double().mean(0).numpy()
