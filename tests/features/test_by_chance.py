"""How near random mixtures come is what geometry says: a share of the circle, or all of a line to which decoders lean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechscope.features.diffing import nearest_by_chance


@pytest.mark.parametrize(("count", "recurs"), [(1, 0.7), (3, 0.7), (3, 0.9), (1, -0.5)])
def test_mixtures_of_what_leans_nowhere_are_found_as_often_as_a_sector_is_hit(count: int, recurs: float) -> None:
    # of two dimensions: an angle at most arccos(recurs) away, on either side, at least once
    expected = 1 - (1 - np.arccos(recurs) / np.pi) ** count
    directions = torch.tensor([[2.0, 0.0], [0.0, -0.1], [3.0, 3.0]])
    # lengths do not matter
    _, found = nearest_by_chance(directions, torch.tensor([[5.0, 0.0], [0.0, 0.1]]), count, recurs=recurs, draws=4000)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.03)


def test_the_nearest_of_mixtures_is_as_near_as_it_is_on_average() -> None:
    # the largest cosine of one random direction of the plane is 0 on average; of two, ∫ cos(t) 2 (1 − t/π) dt / π over 0 to π: 4 / π²
    basis = torch.eye(2)
    for count, expected in ((1, 0.0), (2, 4 / np.pi**2)):
        mean, _ = nearest_by_chance(basis, basis, count, recurs=0.7, draws=4000)
        np.testing.assert_allclose(mean, expected, rtol=0, atol=0.04)


def test_what_all_latents_lean_to_is_near_by_chance() -> None:
    decoders = torch.tensor([[1.0, 0.01, 0.0], [-1.0, 0.0, 0.01], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mean, found = nearest_by_chance(torch.eye(3), decoders, 20, recurs=0.7, draws=200)
    assert mean[0] > 0.99
    assert found[0] == 1
    # but for mixtures in which what they lean to cancels
    assert (mean[1:] < 0.5).all()
    assert (found[1:] < 0.2).all()


def test_every_draw_is_another_and_the_seed_decides() -> None:
    basis = torch.eye(6)
    one, same, other = (nearest_by_chance(basis, basis, 2, recurs=0.4, seed=seed)[0] for seed in (0, 0, 1))
    assert (one == same).all()
    assert (one != other).all()
    single = nearest_by_chance(basis, basis, 2, recurs=0.4, draws=1)[0]
    assert (one != single).all()


def test_nothing_is_near_where_there_is_nothing_to_choose_from() -> None:
    basis = torch.eye(2)
    mean, found = nearest_by_chance(basis, basis, 0, recurs=0.7)
    assert np.isnan(mean).all()
    assert found.tolist() == [0, 0]
    assert [len(each) for each in nearest_by_chance(basis[:0], basis, 2, recurs=0.7)] == [0, 0]
