"""Forms of low rank have the norms, singular values and differences of the matrices they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mechscope.weights import Bilinear, Forms
from tests import families
from tests.weights import oracle


def dense(form: Bilinear) -> Tensor:
    return form.left.T @ form.right


def made(seed: int, rank: int = 4, size: int = 11, constants: bool = True) -> Bilinear:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rank, size), (rank, size), (rank,), (rank,)]
    left, right, one, two = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return Bilinear(left, right, one, two) if constants else Bilinear(left, right)


def at(form: Bilinear, x: Tensor, y: Tensor) -> Tensor:
    left = form.left @ x + (0 if form.left_constant is None else form.left_constant)
    return left @ (form.right @ y + (0 if form.right_constant is None else form.right_constant))


@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_a_heads_forms_are_the_dense_products_of_its_weights(family: str) -> None:
    subject = families.subject(family, torch.float64)
    forms = Forms(subject)
    for layer, head in subject.anatomy.heads():
        one = oracle.head(subject.plain, family, layer, head)
        torch.testing.assert_close(dense(forms.ov(layer, head)), one.ov, rtol=1e-9, atol=1e-9)
        if family != "qwen3":
            torch.testing.assert_close(dense(forms.qk(layer, head)), one.qk, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_norms_and_compressed_sides_are_those_of_the_matrix(rank: int) -> None:
    form, other = made(0, rank), torch.randn(11, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert form.norm() == pytest.approx(float(torch.linalg.norm(dense(form))), rel=1e-12)
    right, left = (float(torch.linalg.norm(side @ other)) for side in (form.onto_right(), form.onto_left()))
    assert right == pytest.approx(float(torch.linalg.norm(dense(form) @ other)), rel=1e-12)
    assert left == pytest.approx(float(torch.linalg.norm(dense(form).T @ other)), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_singular_vectors_are_those_of_the_matrix(rank: int) -> None:
    form = made(0, rank)
    found, expected = form.singular(), torch.linalg.svdvals(dense(form))
    n = min(rank, 11)
    torch.testing.assert_close(found.values[:n], expected[:n], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((found.left.T * found.values) @ found.right, dense(form), rtol=1e-9, atol=1e-9)
    for side in (found.left, found.right):
        torch.testing.assert_close(side @ side.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("constants", [(True, True), (False, False), (True, False), (False, True)])
def test_a_difference_has_the_value_of_both_forms_subtracted(constants: tuple[bool, bool]) -> None:
    one, two = (made(seed, constants=on) for seed, on in enumerate(constants))
    generator = torch.Generator().manual_seed(9)
    x, y = (torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(2))
    difference = one.minus(two)
    torch.testing.assert_close(at(difference, x, y), at(one, x, y) - at(two, x, y), rtol=1e-9, atol=1e-9)
    assert difference.norm() == pytest.approx(float(torch.linalg.norm(dense(one) - dense(two))), rel=1e-9)
    assert difference.rank <= 8


def test_equal_forms_differ_by_nothing_and_a_change_of_rank_two_has_rank_two() -> None:
    one = made(0, constants=False)
    assert one.minus(made(0, constants=False)).rank == 0
    assert one.minus(made(0, constants=False)).norm() == 0
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    assert one.minus(Bilinear(turn @ one.left, turn @ one.right)).norm() == pytest.approx(0, abs=1e-12), "the same map by other factors"
    other = Bilinear(one.left, one.right + 1e-7 * torch.eye(4, 11, dtype=torch.float64) * torch.tensor([[1.0], [1.0], [0.0], [0.0]]))
    change = other.minus(one)
    assert change.rank == 2
    expected = dense(other) - dense(one)
    torch.testing.assert_close(dense(change), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
