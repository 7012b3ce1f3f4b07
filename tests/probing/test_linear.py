"""Linear probes in closed form against theory, scikit-learn, numpy and planted directions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from mechscope.errors import DataError
from mechscope.probing import PENALTIES, LinearProbe, chosen_penalties, difference_in_means, lda, mass_mean, r_squared, ridge
from mechscope.stats.co_moments import CoMoments

D = 6


def moments_of(x: np.ndarray, y: np.ndarray, classes: int = 2) -> CoMoments:
    """Return the statistics of rows at one site."""
    moments = CoMoments(1, x.shape[1], (classes,))
    moments.update(torch.from_numpy(x)[None], torch.from_numpy(y)[:, None])
    return moments


def gaussian(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return rows of two classes with one covariance, far from zero, their classes, the covariance and the difference of means."""
    random = np.random.default_rng(seed)
    turn = np.random.default_rng(7).normal(size=(D, D))
    difference = np.array([0.8, -0.5, 0.0, 0.3, 0.0, 1.0])
    y = random.integers(2, size=n)
    return random.normal(size=(n, D)) @ turn.T + y[:, None] * difference + 100.0, y, turn @ turn.T, difference


def error(probe_says: torch.Tensor, y: np.ndarray) -> float:
    return float(np.mean([np.mean(probe_says.numpy()[y == each] != each) for each in (0, 1)]))


def test_lda_of_gaussian_classes_errs_as_often_as_theory_says_and_no_other_probe_less() -> None:
    x, y, covariance, difference = gaussian(20_000)
    held, held_y, _, _ = gaussian(200_000, seed=1)
    least = norm.cdf(-np.sqrt(difference @ np.linalg.solve(covariance, difference)) / 2)
    learned, rows = moments_of(x, y), torch.from_numpy(held)[None]
    # 200,000 rows tell an error of a quarter to ±.002
    assert error(lda(learned).says(rows)[0], held_y) == pytest.approx(least, abs=0.004)
    # the nearest mean in the wrong metric: error of a line along the difference
    along = difference @ difference / np.sqrt(difference @ covariance @ difference)
    assert error(difference_in_means(learned).says(rows)[0], held_y) == pytest.approx(norm.cdf(-along / 2), abs=0.006)
    assert norm.cdf(-along / 2) > least + 0.05, "the test tells the two apart"


def test_lda_equals_scikit_learns_with_either_priors_and_with_shrinkage() -> None:
    random = np.random.default_rng(3)
    y = random.choice(3, p=[0.6, 0.3, 0.1], size=500)
    x = random.normal(size=(500, D)) @ random.normal(size=(D, D)) + 2 * random.normal(size=(3, D))[y] + 30.0
    learned = moments_of(x, y, 3)
    rows = torch.from_numpy(x)[None]
    observed = LinearDiscriminantAnalysis(solver="lsqr").fit(x, y).decision_function(x)
    # given priors this solver would also weigh the classes' covariances by them, the other one does not
    equal = LinearDiscriminantAnalysis(solver="svd", priors=np.full(3, 1 / 3)).fit(x, y).decision_function(x)
    for probe, expected in ((lda(learned, priors="observed"), observed), (lda(learned), equal)):
        ours = probe.scores(rows)[0].numpy()
        # scores are those of classes up to what all have in common
        np.testing.assert_allclose(ours - ours[:, :1], expected - expected[:, :1], rtol=0, atol=1e-7)
    within = sum((x[y == each] - x[y == each].mean(0)).T @ (x[y == each] - x[y == each].mean(0)) for each in range(3)) / 500
    means = np.stack([x[y == each].mean(0) for each in range(3)])
    shrunk = within + 0.2 * np.trace(np.cov(x.T, bias=True)) / D * np.eye(D)
    np.testing.assert_allclose(lda(learned, shrinkage=0.2).weights[0], np.linalg.solve(shrunk, (means - x.mean(0)).T).T, rtol=1e-9)


def test_mass_mean_is_the_turned_difference_of_means_read_halfway() -> None:
    x, y, _, _ = gaussian(400)
    probe = mass_mean(moments_of(x, y))
    means = [x[y == each].mean(0) for each in (0, 1)]
    within = sum((x[y == each] - means[each]).T @ (x[y == each] - means[each]) for each in (0, 1)) / 400
    np.testing.assert_allclose(probe.direction[0], np.linalg.solve(within, means[1] - means[0]), rtol=1e-8)
    middle = torch.from_numpy((means[0] + means[1]) / 2)[None, None]
    scores = probe.scores(middle)[0, 0]
    assert scores[0] == pytest.approx(float(scores[1]), abs=1e-6)
    with pytest.raises(DataError, match="tells two classes apart, here are 3"):
        mass_mean(moments_of(x, np.arange(400) % 3, 3))


def test_ridge_and_its_held_out_r_squared_equal_scikit_learns() -> None:
    x, y, _, _ = gaussian(300)
    held, held_y, _, _ = gaussian(100, seed=5)
    learned, judged = moments_of(x, y), moments_of(held, held_y)
    penalty = 0.05
    fitted = Ridge(alpha=penalty * np.trace(np.cov(x.T, bias=True)) / D * len(x)).fit(x, np.eye(2)[y])
    probe = ridge(learned, penalty=penalty)
    np.testing.assert_allclose(probe.weights[0], fitted.coef_, rtol=1e-8)
    np.testing.assert_allclose(probe.scores(torch.from_numpy(held)[None])[0], fitted.predict(held), rtol=0, atol=1e-8)
    # pooled over both classes, whose variances are equal
    assert float(r_squared(probe, judged)) == pytest.approx(fitted.score(held, np.eye(2)[held_y]), abs=1e-9)


def test_the_penalty_is_the_best_on_the_other_rows_of_all_that_are_tried() -> None:
    random = np.random.default_rng(11)
    x, y = random.normal(size=(60, 40)), np.arange(60) % 2
    x[:, 0] += 1.2 * y
    held_y = np.arange(3000) % 2
    held = random.normal(size=(3000, 40))
    held[:, 0] += 1.2 * held_y
    learned, judged = moments_of(x, y), moments_of(held, held_y)
    chosen = float(chosen_penalties(learned, judged))
    scores = {penalty: float(r_squared(ridge(learned, penalty=penalty), judged)) for penalty in PENALTIES}
    assert chosen == max(scores, key=lambda each: scores[each])
    assert chosen > 0.05, "with as many dimensions as rows hardly any shrinkage is worse"
    assert scores[chosen] > scores[PENALTIES[0]] + 0.1


def test_a_planted_direction_is_found_at_its_site_and_not_at_another() -> None:
    random = np.random.default_rng(2)
    y = np.arange(2000) % 2
    direction = random.normal(size=D)
    x = random.normal(size=(2, 2000, D))
    x[1] += np.outer(y, 3 * direction / np.linalg.norm(direction))
    moments = CoMoments(2, D, (2,))
    moments.update(torch.from_numpy(x), torch.from_numpy(y)[:, None])
    held = random.normal(size=(2, 2000, D))
    held[1] += np.outer(y, 3 * direction / np.linalg.norm(direction))
    probe = lda(moments)
    right = (probe.says(torch.from_numpy(held)).numpy() == y).mean(1)
    assert right[1] == pytest.approx(norm.cdf(1.5), abs=0.02)
    assert abs(right[0] - 0.5) < 0.05
    cosine = probe.direction[1].numpy() @ direction / np.linalg.norm(probe.direction[1]) / np.linalg.norm(direction)
    assert cosine > 0.99


@pytest.mark.parametrize("fit", [difference_in_means, lda, ridge])
def test_linear_probes_stay_at_chance_on_exclusive_or(fit: Callable[[CoMoments], LinearProbe]) -> None:
    random = np.random.default_rng(4)
    bits = random.integers(2, size=(20_000, 2))
    x = np.concatenate([bits - 0.5 + 0.05 * random.normal(size=bits.shape), random.normal(size=(20_000, 2))], axis=1)
    y = bits[:, 0] ^ bits[:, 1]
    probe = fit(moments_of(x[:10_000], y[:10_000]))
    # within four standard errors of a half, or what a line that cuts off a corner gets
    assert abs(error(probe.says(torch.from_numpy(x[10_000:])[None])[0], y[10_000:]) - 0.5) < 0.26
    assert float(r_squared(ridge(moments_of(x[:10_000], y[:10_000])), moments_of(x[10_000:], y[10_000:]))) < 0.01


def test_rows_that_are_all_the_same_are_told_as_one_class() -> None:
    y = np.arange(50) % 2
    x = np.tile(np.random.default_rng(5).normal(size=D) * 1e3, (50, 1))
    learned = moments_of(x, y)
    assert len(set(lda(learned, shrinkage=0.1).says(torch.from_numpy(x)[None])[0].tolist())) == 1
    assert torch.isfinite(chosen_penalties(learned, learned)).all()


def test_what_cannot_be_fitted_is_refused() -> None:
    x, *_ = gaussian(30)
    for fit in (difference_in_means, lda, ridge):
        with pytest.raises(DataError, match="labeling 0 has rows of 1 of its 2 classes"):
            fit(moments_of(x, np.zeros(30, dtype=int)))
    wide = np.random.default_rng(6).normal(size=(10, 20))
    for fit in (lda, ridge):
        with pytest.raises(DataError, match="the covariance is singular, as where there are fewer rows"):
            fit(moments_of(wide, np.arange(10) % 2))
    lda(moments_of(wide, np.arange(10) % 2), shrinkage=1e-3)
    with pytest.raises(DataError, match="a probe of 3 classes has no one direction"):
        _ = difference_in_means(moments_of(x, np.arange(30) % 3, 3)).direction


@pytest.mark.parametrize("fit", [difference_in_means, lda, ridge])
def test_a_class_without_rows_changes_nothing_and_is_never_said(fit: Callable[[CoMoments], LinearProbe]) -> None:
    x, y, _, _ = gaussian(300)
    rows = torch.from_numpy(x)[None]
    two, three = fit(moments_of(x, y)), fit(moments_of(x, 2 * y, 3))
    torch.testing.assert_close(three.weights[:, [0, 2]], two.weights)
    assert (three.says(rows) == 2 * two.says(rows)).all()
