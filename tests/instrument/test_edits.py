"""Changes name rows of a batch as any sequence of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mechscope.errors import SettingsError
from mechscope.instrument import Edit, Knockout, intervene
from tests import families


@pytest.mark.parametrize("rows", [(1,), [1], slice(1, 2)])
@torch.no_grad()
def test_only_the_named_rows_change(rows: Sequence[int] | slice) -> None:
    subject = families.subject("gpt2")
    ids = torch.stack(families.documents(lengths=(7, 7, 7)))
    plain = subject.plain(ids).logits
    first = torch.zeros_like(ids[:1], dtype=torch.bool)
    first[:, 0] = True
    for change in (Edit("residual", 1, 0.0, rows=rows), Knockout(1, ~first, first, rows=rows)):
        with intervene(subject, change):
            changed = subject.plain(ids).logits
        torch.testing.assert_close(changed[[0, 2]], plain[[0, 2]])
        assert (changed[1] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(3, 7, families.WIDTH + 1), (2, 7, families.WIDTH), (5, 3, 7, families.WIDTH)])
@torch.no_grad()
def test_a_value_of_another_shape_is_refused_by_both_shapes(shape: tuple[int, ...]) -> None:
    subject = families.subject("gpt2")
    ids = torch.stack(families.documents(lengths=(7, 7, 7)))
    for value in (torch.zeros(shape), lambda part: torch.zeros(shape)):
        with (
            intervene(subject, Edit("residual", 1, value)),
            pytest.raises(
                SettingsError, match=rf"shape \({', '.join(map(str, shape))}\) does not fit residual of layer 1, .* \(3, 7, 32\)"
            ),
        ):
            subject.plain(ids)
