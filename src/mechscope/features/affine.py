"""The affine map between what a model holds and what a dictionary sees: u = scale · (x − centre), one for every place.

Dictionaries are trained on activations of mean zero and mean squared norm one, so that one learning rate and one penalty suit every site and model:
the squared error is then the fraction of variance that is not explained. The order is fixed: centre and scale are known before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import DataError
from mechscope.shapes import by_shape
from mechscope.stats.moments import Moments


@dataclass(frozen=True)
class Affine:
    """u = scale · (x − centre).

    Attributes:
        scale: Above zero.
        centre: ``(width)``, in the model's units.
    """

    scale: float
    centre: Float[Tensor, " width"]

    __repr__ = by_shape

    @classmethod
    def identity(cls, width: int) -> Affine:
        """Return the map that changes nothing."""
        return cls(1.0, torch.zeros(width))

    @classmethod
    def fitted(cls, moments: Moments) -> Affine:
        """Return the map after which rows with these moments have mean zero and mean squared norm one.

        Raises:
            DataError: There are no two rows that differ.
        """
        rows = int(moments.count.max(initial=0))
        power = float(np.sum(moments.variance)) * (rows - 1) / rows if rows > 1 else 0.0
        if not power > 0:
            raise DataError(f"{rows} rows that do not differ have no scale: harvest more texts")
        return cls(power**-0.5, torch.from_numpy(moments.mean).float())

    def __call__(self, x: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """Return u."""
        return (x - self.centre.to(x)) * self.scale

    def back(self, u: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """Return x."""
        return u / self.scale + self.centre.to(u)


def moments_of(rows: Float[Tensor, "row width"]) -> Moments:
    """Return count, mean and squared deviations of rows, feature by feature, to be merged with others."""
    x = rows.double()
    mean = x.mean(0)
    return Moments.from_state(
        {
            "count": np.full(x.shape[1:], len(x)),
            "mean": mean.cpu().numpy(),
            "m2": (x - mean).square().sum(0).cpu().numpy(),
        }
    )
