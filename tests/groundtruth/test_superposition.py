"""Toy models of superposition end where they are known to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechscope.errors import SettingsError
from mechscope.groundtruth.superposition import Toys, importances, recovered, train_toys
from mechscope.instrument import Execution


def test_dense_features_leave_room_for_the_more_important_and_sparse_ones_make_antipodal_pairs() -> None:
    importance = torch.tensor([[1.0, 0.5], [1.0, 1.0]])
    toys = train_toys(torch.tensor([0.0, 0.95]), importance, 1, steps=1500)
    dense, sparse = toys.weights[:, 0]
    assert abs(float(dense[0])) == pytest.approx(1, abs=0.05)
    assert abs(float(dense[1])) < 0.05
    assert float(toys.loss[0]) == pytest.approx(float(toys.linear_loss[0]), rel=0.05)
    assert sparse[0] * sparse[1] < -0.8
    np.testing.assert_allclose(toys.dimensionality[1], 0.5, atol=0.05)
    assert toys.loss[1] < 0.5 * toys.linear_loss[1]


def test_five_sparse_features_in_two_dimensions_are_a_pentagon() -> None:
    seeds = 6  # some trainings end in another polygon: the best is the pentagon
    toys = train_toys(torch.full((seeds,), 0.95), torch.ones(seeds, 5), 2, steps=1200, batch=512)
    best = int(toys.loss.argmin())
    np.testing.assert_allclose(toys.dimensionality[best], 0.4, atol=0.03)
    across, up = toys.weights[best]
    angles = np.sort(np.degrees(np.arctan2(up, across)) % 360)
    np.testing.assert_allclose(np.diff(angles, append=angles[0] + 360), 72, atol=5)


def test_a_dimension_is_shared_as_the_formula_says() -> None:
    weights = torch.tensor([[[2.0, 0, 1, -1], [0, 0.5, 0, 0], [0, 0, 0, 0]]])
    toys = Toys(weights, torch.zeros(1, 4), torch.zeros(1), torch.ones(1, 4), torch.zeros(1))
    by_hand = [4 / (4 + 1 + 1), 1, 1 / 6, 1 / 6]
    np.testing.assert_allclose(toys.dimensionality[0], by_hand, rtol=1e-5)
    # one feature to each of three dimensions, the fourth is guessed by its mean: variance 1/12 of a dense one
    assert float(toys.linear_loss) == pytest.approx(1 / 12)


def test_models_side_by_side_are_trained_as_alone_and_loss_is_that_of_the_formula() -> None:
    toys = train_toys(torch.tensor([0.5]), importances(4, 0.8, [0]), 2, steps=300)
    rows = torch.rand(200_000, 4) * (torch.rand(200_000, 4) >= 0.5)
    guess = (rows @ toys.weights[0].T @ toys.weights[0] + toys.bias[0]).relu()
    by_hand = ((guess - rows) ** 2 @ (0.8 ** torch.arange(4.0))).mean()
    assert float(toys.loss) == pytest.approx(float(by_hand), rel=0.03)
    again = train_toys(torch.tensor([0.5]), importances(4, 0.8, [0]), 2, steps=300)
    assert torch.equal(again.weights, toys.weights)
    assert not torch.equal(
        train_toys(torch.tensor([0.5]), importances(4, 0.8, [0]), 2, steps=300, execution=Execution(seed=1)).weights, again.weights
    )


def test_a_dictionary_finds_sparse_features_and_random_directions_do_not() -> None:
    found, random = recovered(
        torch.nn.functional.normalize(torch.randn(6, 12, generator=torch.Generator().manual_seed(0)), dim=0), 0.93, steps=900
    )
    assert (found > 0.9).mean() >= 0.75
    assert random.mean() < 0.85 < found.mean()


@pytest.mark.parametrize(
    ("sparsity", "dimensions", "message"),
    [
        (1.0, 1, "each must be 0 or more and below 1"),
        (0.5, 3, "3 features in 3 dimensions: give more features"),
        (0.5, 0, "3 features in 0 dimensions"),
    ],
)
def test_what_is_no_toy_model_is_refused(sparsity: float, dimensions: int, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        train_toys(torch.tensor([sparsity]), torch.ones(1, 3), dimensions)
