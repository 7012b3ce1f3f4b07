"""Sparsity of attention rows."""

from __future__ import annotations

import pytest
import torch

from mechscope.stats.gini import gini


def by_pairs(weights: list[float]) -> float:
    """Return Gini as half the relative mean absolute difference, its other definition."""
    n = len(weights)
    return sum(abs(a - b) for a in weights for b in weights) / (2 * n * sum(weights))


def test_uniform_attention_is_not_sparse() -> None:
    rows = torch.tril(torch.ones(6, 6, dtype=torch.float64))
    rows = rows / rows.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(gini(rows), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_attention_on_one_of_n_keys_is_one_minus_one_over_n() -> None:
    rows = torch.zeros(8, 8, dtype=torch.float64)
    rows[:, 0] = 1.0
    expected = 1 - 1 / torch.arange(1, 9, dtype=torch.float64)
    torch.testing.assert_close(gini(rows), expected)


def test_gini_of_one_two_three_by_hand() -> None:
    # (2·1−4)·1 + (2·2−4)·2 + (2·3−4)·3 = 4, over 3 · 6
    row = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64)
    assert gini(row).item() == pytest.approx(4 / 18)


def test_gini_equals_the_mean_absolute_difference_over_the_causal_support() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = torch.randn(2, 3, 7, 7, generator=generator, dtype=torch.float64)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    attention = attention.masked_fill(~causal, -torch.inf).softmax(dim=-1)
    found = gini(attention)
    for batch in range(2):
        for head in range(3):
            for query in range(7):
                expected = by_pairs(attention[batch, head, query, : query + 1].tolist())
                assert found[batch, head, query].item() == pytest.approx(expected, abs=1e-12)


def test_left_padding_does_not_change_gini() -> None:
    generator = torch.Generator().manual_seed(1)
    plain = torch.rand(5, 5, generator=generator, dtype=torch.float64).tril()
    padded = torch.zeros(8, 8, dtype=torch.float64)
    padded[3:, 3:] = plain
    real = torch.arange(8) >= 3
    support = torch.ones(8, 8, dtype=torch.bool).tril() & real[None, :]
    found = gini(padded, support)
    torch.testing.assert_close(found[3:], gini(plain))
    assert found[:3].isnan().all()


def test_later_queries_of_a_cached_prefix_see_all_keys_before_them() -> None:
    attention = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    assert gini(attention)[0].item() == pytest.approx(by_pairs([0.5, 0.25, 0.25]))
    assert gini(attention)[1].item() == pytest.approx(0.0)
