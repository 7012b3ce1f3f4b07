"""Numbers drawn from names alone."""

from __future__ import annotations

import numpy as np
from scipy.stats import chisquare, poisson

from mechscope.stats.chance import drawn, poisson_weights, stable_hash


def test_a_hash_is_the_same_on_every_machine_and_in_every_process() -> None:
    # worked out once with hashlib.blake2b; a change here would silently change every resumed run
    assert stable_hash(0, "doc-1") == 8233908031529079133


def test_hashes_of_one_name_differ_between_seeds() -> None:
    assert len({stable_hash(seed, "doc-1") for seed in range(100)}) == 100


def test_a_seed_does_not_run_into_the_name() -> None:
    assert stable_hash(1, "1x") != stable_hash(11, "x")


def test_hashes_fit_a_signed_integer() -> None:
    assert all(0 <= stable_hash(0, str(i)) < 2**63 for i in range(1000))


def test_weights_follow_a_poisson_distribution_with_mean_one() -> None:
    weights = np.concatenate([poisson_weights(3, f"doc-{i}", 1000) for i in range(200)])
    found = np.bincount(weights, minlength=6)[:6] / len(weights)
    # 200,000 draws: a share of .37 has a standard error of .0011
    np.testing.assert_allclose(found, poisson.pmf(np.arange(6), 1.0), atol=0.005)


def test_weights_of_two_documents_are_uncorrelated() -> None:
    a, b = poisson_weights(0, "a", 20_000), poisson_weights(0, "b", 20_000)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_more_replicates_begin_with_the_same_weights() -> None:
    np.testing.assert_array_equal(poisson_weights(0, "a", 50), poisson_weights(0, "a", 500)[:50])


def test_numbers_are_hashed_by_splitmix64() -> None:
    # the first numbers of the published generator from seed 0 and from 1234567
    assert drawn(0, np.array([0]))[0] == 0xE220A8397B1DCDAF
    assert drawn(1234567, np.array([0]))[0] == 6457827717110365317
    # one number after another, each in the state that the last left
    assert drawn(5, np.array([3]), np.array([8]))[0] == drawn(int(drawn(5, np.array([3]))[0]), np.array([8]))[0]


def test_what_is_drawn_for_neighbours_falls_anywhere() -> None:
    """Remainders of positions side by side are as even as those of independent numbers, one by one and in pairs."""
    text, position = (part.ravel() for part in np.indices((40, 500)))
    remainders = drawn(0, text, position) % 32
    for counts in (
        np.bincount(remainders.astype(int), minlength=32),
        np.bincount((remainders[1:] * 32 + remainders[:-1]).astype(int), minlength=1024),
    ):
        assert chisquare(counts).pvalue > 1e-3
