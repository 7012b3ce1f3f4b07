"""Numbers and tokens that a page packs: they come back as they were, to three digits, and take few bytes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mechscope.report.marks.packed import Tokens, packed, shown, whole
from tests.report.drawn import counts, numbers


def test_packed_numbers_keep_three_digits_down_to_a_millionth_of_the_largest() -> None:
    values = np.concatenate([np.geomspace(12.5e-6, 12.5, 400), [0.0]])
    assert numbers(packed(values)) == pytest.approx(values, rel=2e-3, abs=1e-12)
    assert numbers(packed(values))[-2] == 12.5


def test_packed_numbers_know_what_is_missing_and_rounding_below_zero() -> None:
    read = numbers(packed(np.array([np.nan, -1e-9, 2.0, np.inf])))
    assert np.isnan(read[[0, 3]]).all()
    assert read[1:3].tolist() == [0.0, 2.0]
    assert np.isnan(numbers(packed(np.array([np.nan])))).all()
    assert numbers(packed(np.zeros(2))).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("largest", "width"), [(65535, 2), (65536, 4)])
def test_counts_take_as_few_bytes_as_hold_them(largest: int, width: int) -> None:
    held = whole(np.array([0, 1, largest, np.nan]))
    assert held["bytes"] == width
    assert counts(held).tolist() == [0, 1, largest, 0]


def test_every_token_is_held_once_and_none_can_break_a_line() -> None:
    tokens = Tokens()
    places = tokens.add(pd.Series([" the", "\n", None, " the", "a\u202eb", ""]))
    assert [tokens.listed[place] for place in places] == [" the", "↵", "", " the", "a·b", ""]
    assert tokens.add(np.array([" the"]))[0] == places[0]
    assert len(shown("w" * 5000)) == 61
