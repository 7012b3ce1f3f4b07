"""Size, rank and direction of a weight change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mechscope.stats import spectra
from mechscope.stats.spectra import effective_rank, intruder_dimensions, singular_values_of_change, weight_change

SHAPES = [(12, 12), (12, 40), (40, 12)]


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(rows: int, columns: int, values: list[float], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix with the given singular values, and its left singular vectors."""
    u = torch.linalg.qr(matrix(rows, len(values), seed)).Q
    v = torch.linalg.qr(matrix(columns, len(values), seed + 1)).Q
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T, u


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_equal_those_of_the_full_decomposition(shape: tuple[int, int]) -> None:
    base, change = matrix(*shape, 0), 0.01 * matrix(*shape, 1)
    found = singular_values_of_change(base, base + change)
    torch.testing.assert_close(found, torch.linalg.svdvals(change), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_taken_in_slices_is_the_same_matrix(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = matrix(*shape, 0), matrix(*shape, 1)
    at_once = weight_change(base, tuned)
    monkeypatch.setattr(spectra, "_ROWS", 7)
    in_slices = weight_change(base, tuned)
    assert in_slices.change == pytest.approx(at_once.change, rel=1e-12)
    assert in_slices.singular_values == pytest.approx(at_once.singular_values, rel=1e-9)
    assert in_slices.intruders == at_once.intruders


def test_norms_by_hand() -> None:
    base, tuned = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[3.0, 0.0], [2.0, 4.0]])
    found = weight_change(base, tuned, top=3)
    assert (found.norm_base, found.change, found.relative_change) == pytest.approx((5.0, 2.0, 0.4))
    assert found.singular_values == pytest.approx((2.0, 0.0, 0.0))
    assert found.effective_rank == pytest.approx(1.0)
    assert found.stable_rank == pytest.approx(1.0)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_k_equal_singular_values_have_effective_and_stable_rank_k(k: int) -> None:
    change, _ = with_spectrum(20, 30, [0.7] * k, 0)
    base = matrix(20, 30, 5)
    found = weight_change(base, base + change)
    assert found.effective_rank == pytest.approx(k, rel=1e-4)
    assert found.stable_rank == pytest.approx(k, rel=1e-9)


def test_ranks_of_two_unequal_singular_values_by_hand() -> None:
    # shares ¾ and ¼: entropy ¾ ln(4/3) + ¼ ln 4; stable rank (9 + 1) / 9
    change, _ = with_spectrum(10, 10, [3.0, 1.0], 0)
    found = weight_change(torch.ones(10, 10, dtype=torch.float64), torch.ones(10, 10, dtype=torch.float64) + change)
    assert found.effective_rank == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)), rel=1e-6)
    assert found.stable_rank == pytest.approx(10 / 9)
    assert effective_rank(torch.tensor([3.0, 1.0, 0.0])) == pytest.approx(found.effective_rank, rel=1e-6)


def test_no_change_is_all_zeros() -> None:
    base = matrix(6, 9, 0)
    found = weight_change(base, base.clone(), top=3)
    assert (found.change, found.relative_change, found.effective_rank, found.stable_rank, found.intruders) == (0, 0, 0, 0, 0)
    assert found.singular_values == (0.0, 0.0, 0.0)
    assert found.norm_base == pytest.approx(float(base.norm()))


def test_a_zero_parameter_that_stays_zero_has_no_relative_change_and_one_that_moves_has_none_defined() -> None:
    zero = torch.zeros(4, 4)
    assert weight_change(zero, zero).relative_change == 0.0
    assert math.isnan(weight_change(zero, torch.eye(4)).relative_change)
    assert weight_change(zero, torch.eye(4)).change == pytest.approx(2.0)


def test_a_vector_has_norms_only() -> None:
    found = weight_change(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0]), top=2)
    assert (found.norm_base, found.change, found.relative_change) == pytest.approx((5.0, 1.0, 0.2))
    assert np.isnan([found.effective_rank, found.stable_rank, found.intruders, *found.singular_values]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_change_in_half_precision_is_measured_in_full(dtype: torch.dtype) -> None:
    base = matrix(8, 8, 0).to(dtype)
    tuned = (base.double() * 1.02).to(dtype)
    expected = float((tuned.double() - base.double()).norm())
    assert weight_change(base, tuned).change == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(30, 30), (30, 50), (50, 30)])
@pytest.mark.parametrize("planted", [0, 1, 2])
def test_planted_intruders_are_found(shape: tuple[int, int], planted: int) -> None:
    # the base's ten directions are strong and well apart; what is planted is orthogonal to all of them, and strong
    base, u = with_spectrum(*shape, [float(10 - i) for i in range(10)], 0)
    outside = matrix(shape[0], planted, 7)
    outside = torch.linalg.qr(outside - u @ (u.T @ outside)).Q if planted else outside
    inputs = torch.linalg.qr(matrix(shape[1], max(planted, 1), 9)).Q[:, :planted]
    tuned = base + 20.0 * outside @ inputs.T + 1e-3 * matrix(*shape, 3)
    assert intruder_dimensions(base, tuned, k=10) == planted


def loop_intruders(base: torch.Tensor, tuned: torch.Tensor, k: int, epsilon: float) -> int:
    """Count intruders by full SVDs and a loop."""
    u_base, u_tuned = torch.linalg.svd(base, full_matrices=False).U, torch.linalg.svd(tuned, full_matrices=False).U
    count = 0
    for j in range(min(k, u_tuned.shape[1])):
        if max(abs(float(u_tuned[:, j] @ u_base[:, i])) for i in range(u_base.shape[1])) < epsilon:
            count += 1
    return count


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [0.1, 0.5, 2.0])
def test_intruders_equal_a_loop_over_full_decompositions(shape: tuple[int, int], strength: float) -> None:
    base = matrix(*shape, 0)
    tuned = base + strength * matrix(*shape, 1)
    for epsilon in (0.4, 0.6, 0.8):
        assert intruder_dimensions(base, tuned, k=6, epsilon=epsilon) == loop_intruders(base, tuned, 6, epsilon)


def test_scaling_a_matrix_brings_no_intruder() -> None:
    base = matrix(20, 20, 0)
    assert weight_change(base, 3 * base).intruders == 0


def test_an_intruder_beyond_the_leading_k_does_not_count() -> None:
    base, u = with_spectrum(30, 30, [float(10 - i) for i in range(10)], 0)
    outside = matrix(30, 1, 7)
    outside = torch.linalg.qr(outside - u @ (u.T @ outside)).Q
    tuned = base + 0.5 * outside @ torch.linalg.qr(matrix(30, 1, 9)).Q.T
    assert intruder_dimensions(base, tuned, k=10) == 0
    assert intruder_dimensions(base, tuned, k=11) == 1


def test_parameters_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        weight_change(torch.zeros(2, 3), torch.zeros(3, 2))


def test_a_parameter_that_requires_gradients_is_measured_without_them() -> None:
    base = torch.nn.Parameter(matrix(5, 5, 0))
    assert weight_change(base, torch.nn.Parameter(base.detach() * 2)).relative_change == pytest.approx(1.0)
