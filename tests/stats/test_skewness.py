"""Third moments equal scipy's, however documents are grouped, and survive a restart to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mechscope.stats.skewness import ThirdMoments


def values(seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(size=(40, 5, 3))
    drawn[3, 2] = np.nan
    drawn[:, 4, 1] = np.nan
    drawn[:2, 4, 1] = 1.0, 2.0
    return drawn


@pytest.mark.parametrize("cuts", [(), (1,), (7, 22), (20,)])
def test_skewness_is_scipys_however_documents_come(cuts: tuple[int, ...]) -> None:
    drawn = values()
    parts = []
    for part in np.split(drawn, cuts):
        moments = ThirdMoments((5, 3))
        moments.update_many(part)
        parts.append(moments)
    whole = ThirdMoments((5, 3))
    for one in parts:
        whole.merge(one)
    expected = stats.skew(drawn, axis=0, bias=False, nan_policy="omit")
    expected[4, 1] = 0.0  # two documents have no shape
    np.testing.assert_allclose(whole.skewness, expected, rtol=1e-9)
    np.testing.assert_allclose(whole.variance, np.nanvar(drawn, axis=0, ddof=1), rtol=1e-12)


def test_batches_and_a_restart_continue_to_the_last_bit() -> None:
    drawn = values()
    moments, interrupted = ThirdMoments((5, 3)), ThirdMoments((5, 3))
    for part in np.split(drawn, 4):
        moments.update_many(part)
        interrupted = ThirdMoments.from_state(interrupted.state())
        interrupted.update_many(part)
    for name, array in moments.state().items():
        np.testing.assert_array_equal(interrupted.state()[name], array)
    np.testing.assert_array_equal(moments.part((2,)).skewness, moments.skewness[2])


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8])
def test_what_is_the_same_in_every_document_has_no_skew(value: float) -> None:
    moments = ThirdMoments((2,))
    for _ in range(9):
        moments.update(np.full(2, value))
    assert (moments.skewness == 0).all()


def test_a_large_mean_costs_no_digits() -> None:
    drawn = np.random.default_rng(1).exponential(size=50)
    moments = ThirdMoments()
    for value in drawn:
        moments.update(np.asarray(1e6 + value))
    assert moments.skewness == pytest.approx(stats.skew(drawn, bias=False), rel=1e-6)
