"""Erasers take out exactly what they say: against concept-erasure's formula, equal class means, least change, and a fresh probe at chance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mechscope.errors import DataError
from mechscope.probing import Eraser, erase_means, inlp, lda, leace, ridge
from mechscope.stats.co_moments import CoMoments

SITES, ROWS, D, K = 2, 600, 8, 3


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of three classes, one of them rare, with dimensions of very different spread; and their classes."""
    random = np.random.default_rng(seed)
    y = random.choice(K, p=[0.7, 0.27, 0.03], size=ROWS)
    x = random.normal(size=(SITES, ROWS, D)) @ random.normal(size=(SITES, D, D)) * np.geomspace(0.01, 100, D) + 40.0
    return x + np.geomspace(0.01, 100, D) * random.normal(size=(SITES, K, D))[:, y], y


def moments_of(x: np.ndarray, y: np.ndarray, classes: int = K) -> CoMoments:
    moments = CoMoments(len(x), x.shape[2], (classes,))
    moments.update(torch.from_numpy(x), torch.from_numpy(y)[:, None])
    return moments


def erased(eraser: Eraser, x: np.ndarray) -> np.ndarray:
    return np.asarray(eraser(torch.from_numpy(x)))


def dependence(x: np.ndarray, y: np.ndarray) -> float:
    """Return the largest correlation of a dimension with the indicator of a class."""
    z = np.eye(y.max() + 1)[y]
    z = (z - z.mean(0)) / z.std(0)
    centred = x - x.mean(0)
    return float(np.abs(centred.T @ z / len(x) / np.maximum(x.std(0), 1e-12)[:, None]).max())


def test_leace_is_the_formula_of_its_theorem() -> None:
    x, y = rows()
    ours = erased(leace(moments_of(x, y)), x)
    z = np.eye(K)[y]
    for site, own in enumerate(x):
        centred, z0 = own - own.mean(0), z - z.mean(0)
        covariance, crossed = centred.T @ centred / ROWS, centred.T @ z0 / ROWS
        values, vectors = np.linalg.eigh(covariance)
        whiten, back = (vectors * values**power @ vectors.T for power in (-0.5, 0.5))
        project = (whiten @ crossed) @ np.linalg.pinv(whiten @ crossed, rcond=1e-9)
        expected = own - centred @ (back @ project @ whiten).T
        np.testing.assert_allclose(ours[site], expected, rtol=0, atol=1e-6 * own.std())


@pytest.mark.parametrize("make", [leace, erase_means])
def test_after_erasing_all_class_means_are_equal_and_least_squares_is_at_chance(make: Callable[[CoMoments], Eraser]) -> None:
    x, y = rows()
    assert min(dependence(own, y) for own in x) > 0.1
    eraser = make(moments_of(x, y))
    after = erased(eraser, x)
    assert eraser.rank == [K - 1] * SITES
    np.testing.assert_allclose(after.mean(1), x.mean(1), rtol=1e-9)
    for own, was in zip(after, x, strict=True):
        means = np.stack([own[y == each].mean(0) for each in range(K)])
        assert np.abs(means - means[0]).max() < 1e-9 * np.abs(was).max()
    left = moments_of(after, y)
    assert float((left.cross_covariance().abs().amax((1, 2)) / moments_of(x, y).cross_covariance().abs().amax((1, 2))).max()) < 1e-9
    assert float(ridge(left, penalty=1e-3).weights.abs().max()) < 1e-6


def test_after_leace_a_fresh_logistic_probe_says_no_more_than_the_majority() -> None:
    random = np.random.default_rng(1)
    y = (random.random(4000) < 0.4).astype(int)
    x = random.normal(size=(1, 4000, D)) @ random.normal(size=(D, D))
    x[0] += np.outer(y, random.normal(size=D) * 3)
    after = erased(leace(moments_of(x, y, 2)), x)[0]
    assert LogisticRegression(max_iter=2000).fit(x[0], y).score(x[0], y) > 0.9
    assert LogisticRegression(max_iter=2000).fit(after, y).score(after, y) == pytest.approx(max(y.mean(), 1 - y.mean()), abs=1e-3)


def test_leace_changes_rows_less_than_projecting_and_more_than_one_who_knows_the_labels() -> None:
    x, y = rows()
    moments = moments_of(x, y)
    least, plain = (np.square(erased(make(moments), x) - x).sum((1, 2)) for make in (leace, erase_means))
    z = np.eye(K)[y] - np.eye(K)[y].mean(0)
    for site, own in enumerate(x):
        # x − Σ_xz Σ_zz⁺ (z − E z): concept-erasure's eraser for rows whose labels are known
        predicted = z @ np.linalg.pinv(z.T @ z, rcond=1e-9) @ (z.T @ (own - own.mean(0)))
        assert dependence(own - predicted, y) < 1e-8
        assert np.square(predicted).sum() < least[site] < 0.999 * plain[site]


def test_leace_leaves_what_is_not_linear() -> None:
    random = np.random.default_rng(2)
    bits = random.integers(2, size=(4000, 2))
    x = (bits - 0.5)[None] + 0.1 * random.normal(size=(1, 4000, 2))
    y = bits[:, 0] ^ bits[:, 1]
    after = erased(leace(moments_of(x, y, 2)), x)[0]
    product = (after[:, 0] - after[:, 0].mean()) * (after[:, 1] - after[:, 1].mean())
    # the product of both tells the exclusive or where no line does, before as after
    before = (x[0][:, 0] - x[0][:, 0].mean()) * (x[0][:, 1] - x[0][:, 1].mean())
    assert np.corrcoef(before, y)[0, 1] < -0.9
    assert abs(np.corrcoef(product, y)[0, 1]) > 0.25


def test_a_site_without_variance_is_left_as_it_is() -> None:
    x, y = rows()
    x[0] = x[0, 0]
    for make in (leace, erase_means):
        eraser = make(moments_of(x, y))
        assert eraser.rank == [0, K - 1]
        np.testing.assert_allclose(erased(eraser, x)[0], x[0], rtol=1e-12)
    with pytest.raises(DataError, match="nothing to erase"):
        leace(moments_of(x[:1], y))


def test_inlp_takes_out_one_probe_after_the_other_until_nothing_is_left_to_read() -> None:
    random = np.random.default_rng(3)
    y = np.arange(3000) % 2
    x = random.normal(size=(1, 3000, D)) @ random.normal(size=(D, D))
    x[0] += np.outer(y, random.normal(size=D))
    moments = moments_of(x, y, 2)
    left = []
    for steps in (1, 2, 4):
        eraser = inlp(moments, steps=steps, penalty=1e-6)
        basis = eraser.out[0].numpy()
        np.testing.assert_allclose(basis.T @ basis, np.eye(steps), atol=1e-10)
        after = erased(eraser, x)
        left.append(float(np.linalg.norm(moments_of(after, y, 2).cross_covariance()[0])))
    # the first direction is that of least squares itself
    first = ridge(moments, penalty=1e-6).weights[0, 1].numpy()
    basis = inlp(moments, steps=1, penalty=1e-6).out[0, :, 0].numpy()
    assert abs(first @ basis) / np.linalg.norm(first) == pytest.approx(1.0, abs=1e-9)
    assert left[0] > left[1] > left[2]
    # no probe reads along a direction that was taken out
    left_over = moments_of(erased(inlp(moments, steps=4), x), y, 2)
    probe = lda(left_over, shrinkage=0.1).direction[0].numpy()
    assert np.abs(inlp(moments, steps=4).out[0].numpy().T @ probe).max() < 1e-8 * np.linalg.norm(probe) + 1e-12
    every = inlp(moments, steps=D, penalty=1e-6)
    assert sum(every.rank) <= D
