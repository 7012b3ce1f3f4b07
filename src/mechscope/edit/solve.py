"""The closed forms of editing, on plain matrices in float64: no model is run here.

rome        Δ = R (C⁻¹ k)ᵀ / (kᵀ C⁻¹ k): the change of rank one after which W k = v exactly, and that changes W k' least over the keys of C
            (Meng et al. 2022, eq. 2). A key with k'ᵀ C⁻¹ k = 0 is written as before; with C = I it is the change of least norm.
memit       Δ = R Kᵀ (λ C + K Kᵀ)⁻¹: many keys at once, by least squares against the keys of C, of which λ say how much they count (Meng et al. 2023, eq. 14).
alphaedit   Δ = R K̂ᵀ (K̂ K̂ᵀ + K̂₀ K̂₀ᵀ + μ I)⁻¹ Uᵀ with K̂ = Uᵀ K, where U spans the directions that C hardly uses and K₀ are the keys of earlier edits
            (Fang et al. 2025, eq. 14, in U's coordinates: P = U Uᵀ). Keys of C have hardly a part in U, so what is written for them stays.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.errors import DataError, SettingsError

Left = Float[Tensor, "d_model rank"]
Right = Float[Tensor, "d_mlp rank"]


def rome(residual: Float[Tensor, " d_model"], key: Float[Tensor, " d_mlp"], moment: Float[Tensor, "d_mlp d_mlp"]) -> tuple[Left, Right]:
    """Return a change of rank one, as the two factors of left @ rightᵀ.

    Args:
        residual: v* − W k*.
        key: k*.
        moment: C, with a ridge where it is singular.

    Raises:
        DataError: C cannot be inverted, or the key is zero.
    """
    direction = _solved(moment, key[:, None])
    length = float(key @ direction[:, 0])
    if not length > 0:
        raise DataError("the subject's key is zero: the MLP's neurons are silent there, so no change of what they write can edit it")
    return residual[:, None], direction / length


def memit(
    residuals: Float[Tensor, "d_model n"], keys: Float[Tensor, "d_mlp n"], moment: Float[Tensor, "d_mlp d_mlp"], *, weight: float
) -> tuple[Left, Right]:
    """Return the change for many keys at once, as two factors.

    Args:
        residuals: What is to be added for each key.
        keys: The keys.
        moment: C, a mean over tokens.
        weight: λ, in keys: how many tokens of C one new key is weighed against.

    Raises:
        SettingsError: The weight is not above zero.
        DataError: C cannot be inverted.
    """
    if not weight > 0:
        raise SettingsError(f"weight is {weight:g}: the keys seen before must count more than nothing")
    return residuals, _solved(weight * moment + keys @ keys.T, keys)


def free_directions(moment: Float[Tensor, "d_mlp d_mlp"], *, share: float) -> Float[Tensor, "d_mlp free"]:
    """Return an orthonormal basis of the directions that keys hardly use.

    Args:
        moment: C, without a ridge.
        share: Directions with a mean square below this share of the mean over all directions are free. (The authors' threshold, 0.02, is absolute
            and so hangs on the size of a model's keys.)

    Raises:
        SettingsError: No direction is.
    """
    values, vectors = torch.linalg.eigh(moment)
    free = values < share * values.mean()
    if not bool(free.any()):
        raise SettingsError(
            f"keys use every direction more than {share:g} of the mean: nothing is free to be edited; choose a larger share"
        )
    return vectors[:, free]


def alphaedit(
    residuals: Float[Tensor, "d_model n"],
    keys: Float[Tensor, "d_mlp n"],
    free: Float[Tensor, "d_mlp free"],
    *,
    earlier: Float[Tensor, "d_mlp m"] | None = None,
    ridge: float,
) -> tuple[Left, Right]:
    """Return the change within the free directions, as two factors.

    Args:
        residuals: What is to be added for each key.
        keys: The keys.
        free: Orthonormal, from `free_directions`.
        earlier: Keys of earlier edits, which stay as they are.
        ridge: μ, above zero.

    Raises:
        SettingsError: The ridge is not above zero.
    """
    if not ridge > 0:
        raise SettingsError(f"ridge is {ridge:g}: it must be above zero")
    inside = free.T @ keys
    system = inside @ inside.T + ridge * torch.eye(len(inside), dtype=inside.dtype)
    if earlier is not None and earlier.shape[1]:
        kept = free.T @ earlier
        system = system + kept @ kept.T
    return residuals, free @ _solved(system, inside)


def _solved(matrix: Tensor, columns: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise DataError("the second moment of the keys cannot be inverted: read more texts for it, or add a ridge")
    return torch.cholesky_solve(columns, factor)
