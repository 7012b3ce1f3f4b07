"""Streaming co-moments equal numpy's of all rows at once, however the rows came and were taken apart, and however far from zero they lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechscope.stats.co_moments import CoMoments

SITES, WIDTH, ROWS = 3, 7, 90
# labels, a control, folds and a shuffle, all in one pass
CLASSES = (2, 5, 4, 2)


def rows(*, offset: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Return correlated rows whose dimensions have spreads from 0.1 to 10."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(SITES, ROWS, WIDTH)) @ random.normal(size=(SITES, WIDTH, WIDTH)) * np.geomspace(0.1, 10, WIDTH)
    return torch.from_numpy(x + offset)


def labels(seed: int = 1) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([random.integers(size, size=ROWS) for size in CLASSES], axis=1))


def whole(x: torch.Tensor, y: torch.Tensor, cuts: tuple[int, ...] = ()) -> CoMoments:
    """Add rows up in batches that end at these rows."""
    moments = CoMoments(SITES, WIDTH, CLASSES)
    for start, stop in zip((0, *cuts), (*cuts, ROWS), strict=True):
        moments.update(x[:, start:stop], y[start:stop])
    return moments


def assert_same(moments: CoMoments, x: np.ndarray, y: np.ndarray, *, tolerance: float = 1e-10) -> None:
    """Compare with numpy's statistics of the same rows, row by row and class by class."""
    assert moments.n == x.shape[1]
    for site, own in enumerate(x):
        covariance = np.cov(own.T, bias=True)
        scale = np.abs(covariance).max()
        np.testing.assert_allclose(moments.mean[site], own.mean(0), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(moments.covariance[site], covariance, rtol=0, atol=tolerance * scale)
        for labeling, size in enumerate(CLASSES):
            classes = [own[y[:, labeling] == each] for each in range(size)]
            np.testing.assert_array_equal(moments.counts(labeling), [len(each) for each in classes])
            means = np.stack([each.mean(0) for each in classes])
            np.testing.assert_allclose(moments.class_means(labeling)[site], means, rtol=tolerance, atol=tolerance)
            within = sum((each - each.mean(0)).T @ (each - each.mean(0)) for each in classes) / len(own)
            np.testing.assert_allclose(moments.within(labeling)[site], within, rtol=0, atol=tolerance * scale)
            member = np.eye(size)[y[:, labeling]]
            crossed = (own - own.mean(0)).T @ (member - member.mean(0)) / len(own)
            np.testing.assert_allclose(moments.cross_covariance(labeling)[site], crossed, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("cuts", [(), (1,), (30, 31, 77)])
def test_statistics_of_batches_equal_numpy_of_all_rows_for_every_labeling(cuts: tuple[int, ...]) -> None:
    x, y = rows(), labels()
    assert_same(whole(x, y, cuts), x.numpy(), y.numpy())


def test_rows_far_from_zero_keep_their_covariance() -> None:
    # unshifted sums of squares of 1e8 lose eight of sixteen digits, against a least variance of 0.01
    x, y = rows(offset=1e4), labels()
    moments = whole(x, y, (10,))
    centred = (x - 1e4).numpy()
    for site in range(SITES):
        expected = np.cov(centred[site].T, bias=True)
        np.testing.assert_allclose(moments.covariance[site].diagonal(), expected.diagonal(), rtol=1e-10)
    naive = torch.einsum("sri,srj->sij", x, x) / ROWS - x.mean(1)[:, :, None] * x.mean(1)[:, None]
    error = (naive[0].diagonal().numpy() - np.cov(centred[0].T, bias=True).diagonal()) / np.cov(centred[0].T, bias=True).diagonal()
    assert np.abs(error).max() > 1e-8, "the test would pass without a shift"


def test_float32_rows_are_added_up_in_float64() -> None:
    x, y = rows(offset=100.0).float(), labels()
    assert_same(whole(x, y, (40,)), x.double().numpy(), y.numpy())


@pytest.mark.parametrize("cut", [0, 1, 45, ROWS])
def test_parts_with_shifts_of_their_own_merge_to_the_whole(cut: int) -> None:
    x, y = rows(offset=50.0), labels()
    x[:, cut:] += 3.0
    left, right = CoMoments(SITES, WIDTH, CLASSES), CoMoments(SITES, WIDTH, CLASSES)
    left.update(x[:, :cut], y[:cut])
    right.update(x[:, cut:], y[cut:])
    left.merge(right)
    assert_same(left, x.numpy(), y.numpy())


def test_statistics_without_a_fold_are_those_of_the_other_rows() -> None:
    x, y = rows(offset=20.0), labels()
    fold = CoMoments(SITES, WIDTH, CLASSES)
    fold.update(x[:, 60:], y[60:])
    everything = whole(x, y)
    assert_same(everything.without(fold), x[:, :60].numpy(), y[:60].numpy())
    assert_same(everything, x.numpy(), y.numpy())


def test_restored_statistics_continue_to_the_last_bit() -> None:
    x, y = rows(), labels()
    moments = CoMoments(SITES, WIDTH, CLASSES)
    moments.update(x[:, :50], y[:50])
    restored = CoMoments.from_state(moments.state())
    for each in (moments, restored):
        each.update(x[:, 50:], y[50:])
    assert restored.n == ROWS
    for name, value in moments.state().items():
        torch.testing.assert_close(restored.state()[name], value, rtol=0, atol=0)


def test_a_class_without_rows_has_no_mean_and_adds_nothing() -> None:
    x, y = rows(), torch.zeros(ROWS, len(CLASSES), dtype=torch.int64)
    moments = whole(x, y)
    assert moments.counts(1).tolist() == [ROWS, 0, 0, 0, 0]
    assert moments.class_means(1)[:, 1:].isnan().all()
    torch.testing.assert_close(moments.within(1), moments.covariance)


def test_rows_that_do_not_fit_are_refused() -> None:
    x, y = rows(), labels()
    moments = CoMoments(SITES, WIDTH, CLASSES)
    with pytest.raises(ValueError, match="of width 7 cannot take rows of shape"):
        moments.update(x[:, :, :5], y)
    with pytest.raises(ValueError, match=r"for 90 rows in 4 labelings"):
        moments.update(x)
    with pytest.raises(ValueError, match="labels lie in 0 to 9"):
        moments.update(x, y.clone().fill_(9).index_fill_(0, torch.tensor(0), 0))
    moments.update(x, y)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            moments.update(x.clone().index_fill_(1, torch.tensor(3), value), y)
    assert_same(moments, x.numpy(), y.numpy())
    fewer = CoMoments(SITES, WIDTH, CLASSES)
    fewer.update(x[:, :5], y[:5])
    with pytest.raises(ValueError, match="only rows that were added"):
        fewer.without(moments)
    with pytest.raises(ValueError, match="cannot be combined"):
        fewer.merge(CoMoments(SITES, WIDTH, (2,)))
