"""The closed forms against numpy: exact at the keys they are asked for, least elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechscope.edit import solve
from mechscope.errors import DataError, SettingsError

OUT, IN = 5, 8
RANDOM = np.random.default_rng(0)
SEEN = RANDOM.normal(size=(40, IN)) * np.geomspace(0.2, 3, IN)
C = SEEN.T @ SEEN / len(SEEN)
K, R = RANDOM.normal(size=(IN, 3)), RANDOM.normal(size=(OUT, 3))


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x)


def dense(factors: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    left, right = factors
    return (left @ right.T).numpy()


def test_rome_is_the_least_change_on_the_keys_seen_that_writes_what_is_asked() -> None:
    change = dense(solve.rome(tensor(R[:, 0]), tensor(K[:, 0]), tensor(C)))
    np.testing.assert_allclose(change @ K[:, 0], R[:, 0], rtol=1e-10)
    # constrained least squares by its own system: minimise |D S'|² with D k = r, row by row
    system = np.block([[2 * C, K[:, :1]], [K[:, :1].T, np.zeros((1, 1))]])
    rows = [np.linalg.solve(system, np.append(np.zeros(IN), value))[:IN] for value in R[:, 0]]
    np.testing.assert_allclose(change, np.array(rows), rtol=1e-8)
    # a key that is orthogonal in the metric of C⁻¹
    other = K[:, 1] - K[:, 0] * (K[:, 1] @ np.linalg.solve(C, K[:, 0])) / (K[:, 0] @ np.linalg.solve(C, K[:, 0]))
    np.testing.assert_allclose(change @ other, 0, atol=1e-12)


def test_with_the_identity_it_is_the_change_of_least_norm() -> None:
    change = dense(solve.rome(tensor(R[:, 0]), tensor(K[:, 0]), torch.eye(IN, dtype=torch.float64)))
    np.testing.assert_allclose(change, np.outer(R[:, 0], np.linalg.pinv(K[:, :1])), rtol=1e-12)


def test_memit_is_least_squares_against_the_keys_seen() -> None:
    weight = 7.0
    change = dense(solve.memit(tensor(R), tensor(K), tensor(C), weight=weight))
    seen = np.sqrt(weight / len(SEEN)) * SEEN
    expected = np.linalg.lstsq(np.vstack([seen, K.T]), np.vstack([np.zeros((len(SEEN), OUT)), R.T]), rcond=None)[0].T
    np.testing.assert_allclose(change, expected, rtol=1e-8, atol=1e-12)


def test_memit_of_one_fact_is_rome_held_back_by_the_keys_seen() -> None:
    # (λ C + k kᵀ)⁻¹ k = C⁻¹ k / (λ + kᵀ C⁻¹ k) by Sherman and Morrison
    weight, length = 7.0, K[:, 0] @ np.linalg.solve(C, K[:, 0])
    one = dense(solve.memit(tensor(R[:, :1]), tensor(K[:, :1]), tensor(C), weight=weight))
    whole = dense(solve.rome(tensor(R[:, 0]), tensor(K[:, 0]), tensor(C)))
    np.testing.assert_allclose(one, whole * length / (weight + length), rtol=1e-8, atol=1e-12)


def test_alphaedit_is_the_authors_formula_and_leaves_keys_without_a_part_in_the_free_directions() -> None:
    free = solve.free_directions(tensor(C), share=0.5)
    values, vectors = np.linalg.eigh(C)
    p = vectors[:, values < 0.5 * values.mean()]
    p = p @ p.T
    np.testing.assert_allclose((free @ free.T).numpy(), p, atol=1e-12)
    assert 0 < free.shape[1] < IN
    earlier, ridge = RANDOM.normal(size=(IN, 2)), 0.3
    change = dense(solve.alphaedit(tensor(R), tensor(K), free, earlier=tensor(earlier), ridge=ridge))
    expected = np.linalg.solve(p @ (K @ K.T + earlier @ earlier.T) + ridge * np.eye(IN), p @ K @ R.T).T
    np.testing.assert_allclose(change, expected, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(change @ (K - p @ K), 0, atol=1e-12)
    less = np.abs(dense(solve.alphaedit(tensor(R), tensor(K), free, earlier=tensor(1e4 * earlier), ridge=ridge)) @ earlier).max()
    assert less < 1e-5 * np.abs(change @ earlier).max()


def test_what_cannot_be_solved_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be inverted"):
        solve.rome(tensor(R[:, 0]), tensor(K[:, 0]), torch.zeros(IN, IN, dtype=torch.float64))
    with pytest.raises(DataError, match="neurons are silent"):
        solve.rome(tensor(R[:, 0]), tensor(0 * K[:, 0]), tensor(C))
    with pytest.raises(SettingsError, match="weight is 0"):
        solve.memit(tensor(R), tensor(K), tensor(C), weight=0.0)
    with pytest.raises(SettingsError, match="nothing is free"):
        solve.free_directions(torch.eye(IN, dtype=torch.float64), share=0.5)
    with pytest.raises(SettingsError, match="ridge is 0"):
        solve.alphaedit(tensor(R), tensor(K), tensor(K), ridge=0.0)
