"""What is kept of the documents seen so far: mergeable sums, of constant size.

Moments of every measure over documents, a Poisson bootstrap of those that rank heads, and a fixed-size sample of pooled states for the
geometry (idea 3 of the design). The same object is summed over batches and processes and saved to resume a killed run to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mechscope.difference.lockstep import GINI_MEASURES, HEAD_MEASURES, LAYER_MEASURES, OUTPUT_MEASURES, ROWS, SIDES, Measured
from mechscope.stats.geometry import BottomK
from mechscope.stats.moments import Resampled
from mechscope.stats.skewness import ThirdMoments

# the head measures that selection rules rank by, resampled over documents to say how stable a selection is
RESAMPLED = ("kl_base_tuned", "entropy_change", "write_change")


class Accumulated:
    """Statistics over the documents measured so far."""

    def __init__(
        self,
        *,
        n_layers: int,
        n_heads: int,
        n_attending: int | None = None,
        gini: bool = False,
        replicates: int = 200,
        geometry_documents: int = 300,
        seed: int = 0,
    ) -> None:
        """Start with no documents.

        Args:
            n_layers: How many layers.
            n_heads: Heads of a layer.
            n_attending: How many layers have heads; None for all.
            gini: Whether Gini coefficients are measured.
            replicates: Bootstrap replicates.
            geometry_documents: Most documents whose pooled states are kept.
            seed: Of bootstrap and sample.
        """
        n_attending = n_layers if n_attending is None else n_attending
        self.head_measures = HEAD_MEASURES + (GINI_MEASURES if gini else ())
        self.heads = ThirdMoments((len(ROWS), len(self.head_measures), n_attending, n_heads))
        self.layers = ThirdMoments((len(ROWS), len(LAYER_MEASURES), n_layers))
        self.outputs = ThirdMoments((len(ROWS), len(OUTPUT_MEASURES)))
        self.resampled = Resampled((len(ROWS), len(RESAMPLED), n_attending, n_heads), replicates, seed)
        self.pooled = BottomK(geometry_documents, seed)

    def update(self, measured: Measured) -> None:
        """Add a batch of documents."""
        self.heads.update_many(measured.heads)
        self.layers.update_many(measured.layers)
        self.outputs.update_many(measured.outputs)
        index = [self.head_measures.index(name) for name in RESAMPLED]
        self.resampled.update_many(measured.ids, measured.heads[:, :, index])
        for name, array in zip(measured.sampled, measured.pooled, strict=True):
            self.pooled.update(name, array)

    def merge(self, other: Accumulated) -> None:
        """Add all of another object's documents."""
        for name in ("heads", "layers", "outputs", "resampled", "pooled"):
            getattr(self, name).merge(getattr(other, name))

    def replicates(self, name: str, rows: str) -> np.ndarray:
        """Return the bootstrap replicates of a head measure's mean over documents, ``(replicate, layer, head)``, of the layers that attend."""
        return self.resampled.replicates_mean()[:, ROWS.index(rows), RESAMPLED.index(name)]

    def pooled_states(self, side: str, rows: str, layer: int) -> np.ndarray:
        """Return the sampled documents' pooled states of one layer, ``(document, d_model)``."""
        return self.pooled.arrays((SIDES.index(side), ROWS.index(rows), layer))

    def state(self) -> dict[str, Tensor]:
        """Return everything as named tensors, from which `load_state` continues to the last bit."""
        parts = {name: getattr(self, name).state() for name in ("heads", "layers", "outputs", "resampled", "pooled")}
        return {f"{name}.{key}": torch.from_numpy(np.array(array)) for name, arrays in parts.items() for key, array in arrays.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        for name, kind in (
            ("heads", ThirdMoments),
            ("layers", ThirdMoments),
            ("outputs", ThirdMoments),
            ("resampled", Resampled),
            ("pooled", BottomK),
        ):
            arrays = {key.removeprefix(f"{name}."): value.numpy() for key, value in state.items() if key.startswith(f"{name}.")}
            setattr(self, name, kind.from_state(arrays))
