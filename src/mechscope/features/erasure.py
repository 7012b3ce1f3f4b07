"""Erasing a concept from activations: what taking out latents stands beside.

mean difference   x − (x·d̂) d̂, d the difference of the class means
LEACE             the smallest change, in the least-squares sense, after which no linear probe tells the classes: with W the whitening of x and P the projection
onto W Σ_xz, r(x) = x − W⁺ P W (x − E x) (Belrose et al. 2023, theorem 4.3)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from mechscope.errors import DataError

Erasure = Callable[[Float[np.ndarray, "row width"]], Float[np.ndarray, "row width"]]
# eigenvalues of the covariance, as a share of the largest, below which a direction is none
_RANK = 1e-6


def mean_difference(x: Float[np.ndarray, "row width"], y: np.ndarray) -> Erasure:
    """Return the map that projects out the difference of class means; `DataError` where the classes do not differ."""
    difference = _difference(x, y)
    unit = difference / np.linalg.norm(difference)
    return lambda rows: rows - np.outer(rows @ unit, unit)


def leace(x: Float[np.ndarray, "row width"], y: np.ndarray) -> Erasure:
    """Return the LEACE eraser of a concept with two classes; `DataError` where the classes do not differ."""
    _difference(x, y)
    mean, centred = x.mean(0), x - x.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    kept = values > _RANK * values.max()
    whiten = (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T
    back = (vectors[:, kept] * np.sqrt(values[kept])) @ vectors[:, kept].T
    along = whiten @ (centred * (y - y.mean())[:, None]).mean(0)
    along /= np.linalg.norm(along)
    change = np.outer(back @ along, along @ whiten)
    return lambda rows: rows - (rows - mean) @ change.T


def _difference(x: Float[np.ndarray, "row width"], y: np.ndarray) -> Float[np.ndarray, " width"]:
    difference = x[y].mean(0) - x[~y].mean(0) if y.any() and not y.all() else np.zeros(x.shape[1])
    if not np.linalg.norm(difference) > 0:
        raise DataError("the two classes do not differ in their mean activations: there is nothing to erase")
    return np.asarray(difference)
