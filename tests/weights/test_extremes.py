"""The extreme entries of a product that is never formed are those of the formed one, whatever is skipped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mechscope.weights import extremes as module
from mechscope.weights.extremes import extremes, extremes_of_rows


def factors(kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(size, 6, dtype=torch.float64, generator=generator) for size in (71, 53))
    match kind:
        case "heavy":  # few long rows: most blocks are skipped
            return a * torch.rand(71, 1, dtype=torch.float64, generator=generator) ** 6, b
        case "unbalanced":  # one direction is long in one factor and short in the other
            scale = torch.tensor([1e4, 1, 1, 1, 1, 1e-4], dtype=torch.float64)
            return a * scale, b / scale
        case "positive":
            return a.abs(), b.abs()
        case "deficient":
            return a[:, :2] @ a[:2], b
        case "repeated":
            return torch.cat([a[:3]] * 20), b
        case _:
            return a, b


@pytest.mark.parametrize("k", [1, 7, 40])
@pytest.mark.parametrize("kind", ["plain", "heavy", "unbalanced", "positive", "deficient", "repeated"])
def test_they_are_the_largest_and_smallest_of_the_whole_matrix(kind: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 5)
    monkeypatch.setattr(module, "_COLUMNS", 4)
    a, b = factors(kind)
    dense = a @ b.T
    for best, largest in zip(extremes(a, b, k=k), (True, False), strict=True):
        torch.testing.assert_close(best.values, dense.flatten().topk(k, largest=largest).values, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(best.values, dense[best.rows, best.columns], rtol=1e-9, atol=1e-9)
        assert len(set(zip(best.rows.tolist(), best.columns.tolist(), strict=True))) == k, "no entry twice"


def test_blocks_that_cannot_hold_a_winner_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 5)
    monkeypatch.setattr(module, "_COLUMNS", 4)
    made: list[Tensor] = []
    original = Tensor.aminmax

    def counted(block: Tensor) -> object:
        made.append(block)
        return original(block)

    monkeypatch.setattr(Tensor, "aminmax", counted)
    a, b = factors("heavy")
    extremes(a, b, k=3)
    assert len(made) < 0.5 * 15 * 14


def test_a_matrix_smaller_than_k_is_given_whole() -> None:
    a, b = factors("plain")
    high, low = extremes(a[:2], b[:3], k=50)
    assert len(high.values) == len(low.values) == 6
    torch.testing.assert_close(high.values, low.values.flip(0))


def test_every_rows_extremes_are_those_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENTRIES", 100)  # a row at a time
    a, b = factors("plain")
    dense = a @ b.T
    for (columns, values), largest in zip(extremes_of_rows(a, b, k=4), (True, False), strict=True):
        expected = dense.topk(4, dim=1, largest=largest)
        assert torch.equal(columns, expected.indices)
        torch.testing.assert_close(values, expected.values)
