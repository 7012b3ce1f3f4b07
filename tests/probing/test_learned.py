"""Logistic probes against scikit-learn's, and probes with a hidden layer where no linear one tells anything."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mechscope.errors import DataError
from mechscope.probing import LinearProbe, MlpProbe, leace, logistic, mlp
from mechscope.probing.linear import Spectrum
from mechscope.stats.co_moments import CoMoments

D = 6
# variances of directions far from alike, and means far from zero, as residual streams have
SCALES = np.array([100.0, 10.0, 1.0, 1.0, 0.1, 0.01])


def rows(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of classes of different frequency that overlap."""
    random = np.random.default_rng(seed)
    share = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    y = random.choice(classes, p=share, size=n)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0]
    means = np.random.default_rng(2).normal(size=(classes, D))
    return ((random.normal(size=(n, D)) + means[y]) * SCALES) @ turn + 50.0, y


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("balanced", [True, False])
def test_logistic_probes_have_the_weights_of_scikit_learns_with_the_same_penalty(classes: int, balanced: bool) -> None:
    made = [rows(400, classes, seed) for seed in (0, 1)]
    x = torch.from_numpy(np.stack([each for each, _ in made]))
    y = np.stack([made[0][1], made[1][1], np.random.default_rng(5).permutation(made[0][1])], axis=1)
    penalty = torch.tensor([[0.01, 0.3], [0.1, 0.001], [0.02, 0.02]])
    found = logistic(x, torch.from_numpy(y), classes, penalty=penalty, balanced=balanced)
    for site in (0, 1):
        for labeling in range(3):
            c = (2 if classes == 2 else 1) / (float(penalty[labeling, site]) * 400)
            weighing = "balanced" if balanced else None
            own = LogisticRegression(C=c, class_weight=weighing, solver="newton-cholesky", tol=1e-10).fit(x[site].numpy(), y[:, labeling])
            scores = found[labeling].scores(x)[site]
            assert (scores.argmax(-1).numpy() == own.predict(x[site].numpy())).mean() > 0.997
            # half the square of a difference of 0.005 is a loss of 1e-5 nats
            np.testing.assert_allclose(scores.softmax(-1).numpy(), own.predict_proba(x[site].numpy()), atol=0.01)


def test_narrow_types_and_any_grouping_of_sites_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (torch.from_numpy(each) for each in rows(300, 3, 0))
    whole = logistic(torch.stack([x, x.flip(0)]), y[:, None], 3, penalty=0.01)[0]
    monkeypatch.setattr(sys.modules["mechscope.probing.logistic"], "_SCORES", 1)
    spectrum = Spectrum.of(CoMoments.of(x[None].expand(2, -1, -1)))
    narrow = logistic(torch.stack([x, x.flip(0)]).float(), y[:, None], 3, penalty=0.01, spectrum=spectrum)[0]
    told, scores = whole.scores(x[None].expand(2, -1, -1)).softmax(-1), narrow.scores(x[None].expand(2, -1, -1)).softmax(-1)
    np.testing.assert_allclose(scores, told, atol=0.01)


def exclusive(n: int, seed: int, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows whose class is whether two of their directions have the same sign; and which lie farther along a third by so much in one class."""
    random = np.random.default_rng(seed)
    half = random.normal(size=(n // 2, D))
    half[:, :2] += 2 * np.sign(half[:, :2])
    # with every row its opposite, so that the means of both classes are the same
    x = np.concatenate([half, -half])
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    x[:, 2] += shift * y
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0]
    return torch.from_numpy(x @ turn + 3.0), torch.from_numpy(y)


def test_a_hidden_layer_tells_whether_signs_agree_and_a_linear_probe_does_not() -> None:
    (x, y), (held, held_y) = exclusive(600, 0), exclusive(2000, 1)
    assert abs(told(logistic(x[None], y[:, None], 2, penalty=0.01)[0], held, held_y) - 0.5) < 0.05
    assert told(mlp(x[None], y[:, None], 2)[0], held, held_y) > 0.95


def test_leace_takes_what_a_linear_probe_tells_and_leaves_what_a_hidden_layer_does() -> None:
    (x, y), (held, held_y) = exclusive(600, 0, shift=1.0), exclusive(2000, 1, shift=1.0)
    erase = leace(CoMoments.of(x[None], y[:, None], (2,)))
    linear = {name: logistic(rows[None], y[:, None], 2, penalty=0.01)[0] for name, rows in (("before", x), ("after", erase(x[None])[0]))}
    assert told(linear["before"], held, held_y) > 0.65
    assert abs(told(linear["after"], erase(held[None])[0], held_y) - 0.5) < 0.05
    assert told(mlp(erase(x[None]), y[:, None], 2)[0], erase(held[None])[0], held_y) > 0.95


def told(probe: LinearProbe | MlpProbe, rows: torch.Tensor, y: torch.Tensor) -> float:
    """Return the share of rows at one site that a probe tells right."""
    return float((probe.says(rows[None])[0] == y).double().mean())


def test_sites_and_labelings_are_learned_as_if_alone_and_seeds_tell_what_is_drawn() -> None:
    (x, y), (other, other_y) = exclusive(300, 0), exclusive(300, 1)
    both = mlp(torch.stack([x, other]), torch.stack([y, other_y], 1), 2, steps=20)
    alone = mlp(other[None], other_y[:, None], 2, steps=20)[0]
    torch.testing.assert_close(both[1].scores(torch.stack([x, other]))[1:], alone.scores(other[None]), atol=1e-4, rtol=1e-4)
    different = mlp(other[None], other_y[:, None], 2, steps=20, seed=1)[0]
    assert not torch.allclose(different.scores(other[None]), alone.scores(other[None]), atol=0.1)


def test_a_class_without_rows_is_never_said_and_one_class_alone_is_refused() -> None:
    x, y = (torch.from_numpy(each) for each in rows(100, 2, 0))
    for made in (logistic(x[None], y[:, None], 3, penalty=0.1)[0], mlp(x[None], y[:, None], 3, steps=5)[0]):
        assert int(made.says(x[None]).max()) < 2
    for fit in (lambda labels: logistic(x[None], labels, 2, penalty=0.1), lambda labels: mlp(x[None], labels, 2)):
        with pytest.raises(DataError, match="of one class only"):
            fit(torch.zeros(100, 1, dtype=torch.int64))
    with pytest.raises(DataError, match="needs a penalty above 0"):
        logistic(x[None], y[:, None], 2, penalty=0.0)
