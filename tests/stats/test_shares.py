"""Shares of a whole: Fieller's interval, its coverage, and when a share is withheld."""

from __future__ import annotations

import numpy as np
import pytest

from mechscope.stats.inference import MIN_TEXTS
from mechscope.stats.shares import difference_of_shares, share_of, shares_of
from tests.stats.fieller import by_inverting_t_tests


@pytest.mark.parametrize("n", [6, 12, 40])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_interval_is_what_t_tests_do_not_exclude(n: int, sign: int) -> None:
    random = np.random.default_rng(n)
    whole = sign * random.lognormal(0, 0.4, n)
    part = 0.6 * whole + 0.2 * random.normal(size=n)
    share = share_of(part, whole)
    assert share.value == pytest.approx(part.mean() / whole.mean())
    assert (share.low, share.high) == pytest.approx(by_inverting_t_tests(part, whole), rel=1e-6)
    assert (share.n, share.withheld) == (n, "")


def losses(random: np.random.Generator, draws: int, n: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return parts and wholes, ``(draw, text)``, with a share of .6: losses gained that are skewed or heavy-tailed."""
    if kind == "lognormal":
        whole = random.lognormal(0, 1.0, (draws, n))
        return whole * random.beta(3, 2, (draws, n)), whole
    whole = 1 + random.standard_t(3, (draws, n))
    return 0.6 * whole + 0.5 * random.standard_t(3, (draws, n)), whole


@pytest.mark.parametrize("kind", ["lognormal", "heavy tails"])
@pytest.mark.parametrize("n", [8, 16, 64])
def test_skewed_and_heavy_tailed_losses_are_covered(kind: str, n: int) -> None:
    # the percentile bootstrap that was here covered .84 to .90 of these at 8 and 16 texts
    random = np.random.default_rng(0)
    parts, wholes = losses(random, 3000, n, kind)
    shares = shares_of(parts, wholes, positive=True)
    given = shares.withheld == ""
    assert given.sum() > 1000
    covered = ((shares.low <= 0.6) & (shares.high >= 0.6))[given].mean()
    assert 0.93 <= covered <= 0.98


@pytest.mark.parametrize("n", [8, 16, 64])
def test_no_gain_is_taken_for_one_in_more_than_a_fortieth(n: int) -> None:
    random = np.random.default_rng(0)
    gains = random.normal(size=(8000, n))
    given = shares_of(gains, gains, positive=True).withheld == ""
    assert given.mean() < 0.025 + 3 * (0.025 * 0.975 / 8000) ** 0.5


def test_a_whole_that_is_none_withholds_the_share_and_says_why() -> None:
    whole = np.array([-0.05, 0.0, -0.02, 0.01, -0.04, -0.02])
    absent = "fine-tuning did not lower the loss on these summaries"
    worse = share_of(np.ones(6), whole, absent=absent, positive=True)
    assert np.isnan([worse.value, worse.low, worse.high]).all()
    assert worse.withheld == f"{absent}: −0.02 (−0.0439 to 0.00393)"
    # on the right side, but not shown
    better = share_of(np.ones(6), -whole, absent=absent, positive=True)
    assert better.withheld == f"{absent}, as far as 6 texts show: 0.02 (−0.00393 to 0.0439)"
    # surely worse: a share of a loss is none of a gain, though it is of a difference
    surely = whole - 1.0
    assert share_of(surely, surely, absent=absent, positive=True).withheld.startswith(absent)
    assert share_of(surely, surely).value == pytest.approx(1.0)


def test_below_six_texts_there_is_no_share() -> None:
    whole = np.linspace(1, 1.1, 5)
    assert share_of(whole / 2, whole).withheld == f"too few texts: 5 of at least {MIN_TEXTS}"
    assert share_of(whole / 2, whole, unit="documents").withheld.startswith("too few documents")
    assert share_of(np.full(7, np.nan), np.ones(7)).withheld == "too few texts: 0 of at least 6"


def test_each_part_counts_the_texts_that_have_it() -> None:
    random = np.random.default_rng(1)
    whole = 1 + 0.2 * random.normal(size=12)
    parts = np.stack([0.5 * whole + 0.1 * random.normal(size=12), 0.5 * whole, 0.1 * whole])
    parts[0, 3:6] = np.nan
    parts[2, 4:] = np.nan
    shares = shares_of(parts, whole)
    there = ~np.isnan(parts[0])
    alone = share_of(parts[0, there], whole[there])
    assert (shares[0].low, shares[0].value, shares[0].high, shares[0].n) == pytest.approx((alone.low, alone.value, alone.high, 9))
    # a part in exact proportion has no doubt
    assert (shares[1].low, shares[1].high) == pytest.approx((0.5, 0.5))
    assert shares[2].withheld == "too few texts: 4 of at least 6"
    assert shares.note == shares[2].withheld


def test_a_whole_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parts of shape \(2, 6\) and a whole of shape \(5,\)"):
        shares_of(np.ones((2, 6)), np.ones(5))


def test_the_interval_of_a_difference_holds_the_truth_and_is_as_wide_as_resampling_says() -> None:
    rng = np.random.default_rng(3)

    def drawn(n: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        whole = rng.lognormal(0, 0.5, n)
        common = rng.normal(size=n)
        one, other = (share * whole + 0.3 * common + 0.1 * rng.normal(size=n) for share in (0.7, 0.6))
        return (one, whole), (other, whole * 1.5)

    truth = 0.7 - 0.4
    found = [difference_of_shares(*drawn(24)) for _ in range(300)]
    covered = np.mean([each.low <= truth <= each.high for each in found])
    assert 0.91 <= covered <= 0.99
    one, other = drawn(400)
    share, picks = difference_of_shares(one, other), rng.integers(400, size=(2000, 400))
    resampled = [one[0][pick].mean() / one[1][pick].mean() - other[0][pick].mean() / other[1][pick].mean() for pick in picks]
    assert (share.high - share.low) / 3.93 == pytest.approx(np.std(resampled), rel=0.1)
    assert share.value == pytest.approx(one[0].mean() / one[1].mean() - other[0].mean() / other[1].mean())
    # what is no whole for one of them is none for the difference
    assert "does not differ from zero" in difference_of_shares(one, (other[0], other[1] * 0)).withheld
    assert difference_of_shares((one[0][:5], one[1][:5]), (other[0][:5], other[1][:5])).withheld.startswith("too few texts")
