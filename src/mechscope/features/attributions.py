"""What latents do along a gradient, text by text: Σ_t ± f_tj ⟨g_t, D_j⟩, the products of their values with the derivatives of a metric by them.

Attribution patching, integrated gradients and SHIFT are such sums, over the codes of what latents become and, with the other sign, of what they are. Only
latents that are active on a text are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.features.codes import Codes
from mechscope.shapes import by_shape


@dataclass(frozen=True)
class Attributions:
    """Sums of products, over one set of tokens or several.

    Attributes:
        cells: ``(cell)``: text × latents + latent, in order: those that are active on the text.
        values: ``(set, cell)``: their sums.
        texts: Number of texts.
        latents: Number of latents.
    """

    cells: Int[Tensor, " cell"]
    values: Float[Tensor, "set cell"]
    texts: int
    latents: int

    __repr__ = by_shape

    @classmethod
    def of(
        cls,
        changes: Sequence[tuple[float, Codes]],
        gradient: Float[Tensor, "text token width"],
        decoders: Float[Tensor, "latent width"],
        weights: Float[Tensor, "set token_of_all"] | None = None,
    ) -> Attributions:
        """Sum products over the tokens of each text.

        Args:
            changes: Signs and codes of all tokens, text after text.
            gradient: The derivative of the metric by what stands at the place; no entry of the codes may meet a value that is not finite.
            decoders: What each latent writes.
            weights: What each token counts, in several sets; None for one set in which all count 1.
        """
        flat, length = gradient.flatten(0, 1), gradient.shape[1]
        weights = flat.new_ones(1, len(flat)) if weights is None else weights
        keys, values = [], []
        for sign, codes in changes:
            keys.append(codes.rows // length * codes.width + codes.latents)
            product = sign * codes.values * codes.inner(flat, decoders)
            values.append((weights[:, codes.rows] * product).double())
        cells, place = torch.cat(keys).unique(return_inverse=True)
        sums = torch.zeros(len(weights), len(cells), dtype=torch.float64, device=cells.device)
        return cls(cells, sums.index_add_(1, place, torch.cat(values, dim=1)), len(gradient), len(decoders))

    def dense(self) -> Float[Tensor, "set text latent"]:
        """Return all sums, zero where a latent is silent."""
        whole = self.values.new_zeros(len(self.values), self.texts * self.latents)
        whole[:, self.cells] = self.values
        return whole.unflatten(1, (self.texts, self.latents))

    def by_text(self) -> list[tuple[Int[np.ndarray, " active"], Float[np.ndarray, " active"]]]:
        """Return of every text the latents that are active, and their sums over the first set of tokens."""
        cells, values = self.cells.cpu().numpy(), self.values[0].cpu().numpy()
        ends = np.searchsorted(cells // self.latents, np.arange(self.texts + 1))
        return [(cells[start:stop] % self.latents, values[start:stop]) for start, stop in pairwise(ends)]
