"""Scores of what latents stand for find what was planted, and nothing where nothing was: probes on few latents, SCR, TPP, absorption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from mechscope.features.absorption import Tokens, absorption, main_latents
from mechscope.features.affine import Affine
from mechscope.features.codes import Codes
from mechscope.features.dictionary import Dictionary
from mechscope.features.layout import autoencoder, cross_layer
from mechscope.features.probes import (
    Pooled,
    Writes,
    balanced,
    balanced_of,
    dense_probing,
    mean_of,
    sparse_probing,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from mechscope.features.rules import Rule
from tests.features import oracle

D, TEXTS = 12, 240
RNG = np.random.default_rng(0)
# two attributes that are independent, and one of four classes
WANTED, OTHER, KIND = RNG.random(TEXTS) < 0.5, RNG.random(TEXTS) < 0.5, RNG.integers(4, size=TEXTS)
HALF = np.arange(TEXTS) < TEXTS // 2


def pooled(decoder: np.ndarray, codes: np.ndarray, x: np.ndarray) -> Pooled:
    layout = autoencoder("resid0", D, len(decoder), Rule("relu"))
    tensors = {**layout.tensors(dtype=torch.float64), "decoder.0": torch.from_numpy(decoder)}
    return Pooled(x, csr_matrix(codes), Writes(Dictionary.plain(layout, tensors)))


def planted() -> Pooled:
    """Latent 0 writes the wanted attribute, 1 the other one, 2 to 5 the four kinds; 6 and 7 speak at random and write nothing that counts."""
    directions = np.eye(D)[:8]
    codes = np.zeros((TEXTS, 8))
    codes[:, 0], codes[:, 1] = WANTED * 2.0, OTHER * 3.0
    codes[np.arange(TEXTS), 2 + KIND] = 2.0
    codes[:, 6:] = RNG.random((TEXTS, 2))
    return pooled(directions, codes, codes @ directions + 0.2 * RNG.normal(size=(TEXTS, D)))


def halves(whole: Pooled) -> tuple[Pooled, Pooled]:
    return whole.rows(np.flatnonzero(HALF)), whole.rows(np.flatnonzero(~HALF))


def random_codes(whole: Pooled) -> Pooled:
    """Return the same activations with latents that know nothing of them."""
    rng = np.random.default_rng(5)
    directions = rng.normal(size=(8, D))
    return pooled(directions / np.linalg.norm(directions, axis=1, keepdims=True), rng.random((TEXTS, 8)), whole.x)


def test_a_latent_that_stands_for_a_class_is_found_by_a_probe_of_one_and_chance_is_a_half() -> None:
    for whole, expected in ((planted(), 1.0), (random_codes(planted()), 0.5)):
        train, test = halves(whole)
        score = balanced_of(sparse_probing(train, test, WANTED[HALF], WANTED[~HALF], 1), WANTED[~HALF])
        assert score.value == pytest.approx(expected, abs=0.12)
        assert score.low <= expected <= score.high + 1e-9 or expected == 1.0
        assert score.n == (~HALF).sum()
        # whatever the latents, there is something to be found
        assert balanced_of(dense_probing(train, test, WANTED[HALF], WANTED[~HALF]), WANTED[~HALF]).value > 0.95


def test_balanced_accuracy_weighs_both_classes_alike() -> None:
    y = np.array([True] * 2 + [False] * 8)
    right = np.array([True, False] + [True] * 6 + [False] * 2)
    assert balanced(right, y).mean() == pytest.approx((1 / 2 + 6 / 8) / 2)
    assert balanced_of(right, y).value == pytest.approx((1 / 2 + 6 / 8) / 2)


def test_unequal_classes_are_no_error_and_no_error_is_not_certain() -> None:
    y = np.arange(100) < 10
    assert mean_of(balanced(np.ones(100, dtype=bool), y)).low == pytest.approx(1)
    score = balanced_of(np.ones(100, dtype=bool), y)
    assert (score.value, score.high) == pytest.approx((1, 1))
    # Wilson's lower ends of 10 of 10 and 90 of 90 are n / (n + z²)
    misses = [1 - n / (n + 1.959964**2) for n in (10, 90)]
    assert score.low == pytest.approx(1 - np.linalg.norm(misses) / 2)
    # the variance of a mean of two independent shares
    right = np.r_[np.arange(10) < 5, np.arange(90) < 45]
    deviation = balanced(right, y).std() / np.sqrt(100)
    assert deviation == pytest.approx(np.sqrt(0.25 / 10 + 0.25 / 90) / 2)


def test_taking_out_the_latent_of_what_goes_with_a_class_removes_the_bias_and_random_ones_do_not() -> None:
    train, test = halves(planted())
    attributes = (WANTED[HALF], OTHER[HALF], WANTED[~HALF], OTHER[~HALF])
    found = spurious_correlation_removal(train, test, *attributes, counts=[1, 2])
    assert found[1].value == pytest.approx(1, abs=0.15)
    assert found[1].low > 0.5
    train, test = halves(random_codes(planted()))
    assert abs(spurious_correlation_removal(train, test, *attributes, counts=[1])[1].value) < 0.3
    # where the other attribute is no hint there is no bias to remove
    none = Pooled(planted().x * np.r_[1, 0, np.ones(D - 2)], train.codes, train.writes)
    whole = Pooled(none.x, planted().codes, train.writes)
    train, test = halves(whole)
    assert "is as good as the unbiased one" in spurious_correlation_removal(train, test, *attributes, counts=[1])[1].withheld


def test_taking_out_the_latent_of_a_class_costs_its_own_probe_and_no_other() -> None:
    classes = np.stack([WANTED, OTHER], axis=1)
    train, test = halves(planted())
    share = targeted_probe_perturbation(train, test, classes[HALF], classes[~HALF], [1])[1]
    # all of what a balanced probe has above chance
    assert share.value == pytest.approx(0.5, abs=0.08)
    # of four kinds the absence of the others still tells each of them
    kinds = np.stack([kind == KIND for kind in range(4)], axis=1)
    share = targeted_probe_perturbation(train, test, kinds[HALF], kinds[~HALF], [1])[1]
    assert 0.2 < share.low < 0.5
    train, test = halves(random_codes(planted()))
    assert abs(targeted_probe_perturbation(train, test, classes[HALF], classes[~HALF], [1])[1].value) < 0.1


def test_what_is_written_is_in_the_models_units_at_every_place() -> None:
    layout = cross_layer((0, 1), 5, 6, Rule("relu"))
    given = oracle.dictionary(layout)
    given = Dictionary(
        layout, given.tensors, given.input_maps, tuple(Affine(2.0 + at, each.centre) for at, each in enumerate(given.output_maps))
    )
    rows = torch.cat([given.directions(range(12), place) for place in layout.outputs], dim=1).numpy()
    direction = np.random.default_rng(0).normal(size=10)
    inner, cosines = Writes(given).along(direction)
    np.testing.assert_allclose(inner, rows @ direction, rtol=1e-12)
    np.testing.assert_allclose(cosines, rows @ direction / np.linalg.norm(rows, axis=1) / np.linalg.norm(direction), rtol=1e-12)
    np.testing.assert_allclose(Writes(given).of([3, 8]), rows[[3, 8]], rtol=1e-12)
    nothing = Codes.from_dense(torch.zeros(1, 12, dtype=torch.float64))
    np.testing.assert_allclose(Writes(given).bias, torch.cat(given.decode(nothing), dim=1)[0], rtol=1e-12)


WORDS, ABSORBED = 40, 6


def tokens(absorbing: bool) -> tuple[Tokens, np.ndarray, Writes]:
    """Half of the words have the concept. Latent 0 stands for it; if absorbing, of six of these words another each stands for both."""
    rng = np.random.default_rng(1)
    word = rng.integers(2 * WORDS, size=2000)
    y = word < WORDS
    concept, of_word = np.eye(D + WORDS)[0], np.eye(D + WORDS)[D:]
    x = np.outer(y * 3.0, concept) + 0.05 * rng.normal(size=(2000, D + WORDS))
    x[y] += of_word[word[y]]
    decoder = np.stack([concept, *(of_word[:ABSORBED] + (3 * concept if absorbing else 0))])
    codes = np.zeros((2000, 1 + ABSORBED))
    codes[:, 0] = y * 3.0
    for at in range(ABSORBED):
        codes[word == at, 1 + at] = 1.0
        if absorbing:
            codes[word == at, 0] = 0.0
    layout = autoencoder("resid0", D + WORDS, 1 + ABSORBED, Rule("relu"))
    tensors = {**layout.tensors(dtype=torch.float64), "decoder.0": torch.from_numpy(decoder)}
    return Tokens(x, csr_matrix(codes), np.arange(2000) // 10), y, Writes(Dictionary.plain(layout, tensors))


@pytest.mark.parametrize("absorbing", [True, False])
def test_absorbed_words_are_counted_and_only_these(absorbing: bool) -> None:
    whole, y, writes = tokens(absorbing)
    learned = np.arange(len(y)) < 1000
    found = absorption(whole.rows(learned), whole.rows(~learned), y[learned], y[~learned], writes)
    assert found.main[0] == 0
    assert len(found.text) == y[~learned].sum(), "the probe finds all of them"
    expected = whole.codes[~learned][y[~learned]][:, 0].toarray().ravel() == 0
    assert found.full.tolist() == expected.tolist()
    np.testing.assert_allclose(found.fraction, expected, atol=1e-9)
    assert found.full.mean() == pytest.approx(ABSORBED / WORDS if absorbing else 0, abs=0.06)


def test_a_part_that_is_absorbed_counts_as_a_fraction() -> None:
    whole, y, writes = tokens(True)
    # the main latent gives a third where the others stand in for two
    codes = whole.codes.toarray()
    codes[:, 0] = np.where(codes[:, 1:].any(1), 1.0, codes[:, 0])
    codes[:, 1:] *= 2 / 3
    part = Tokens(whole.x, csr_matrix(codes), whole.text)
    learned = np.arange(len(y)) < 1000
    found = absorption(part.rows(learned), part.rows(~learned), y[learned], y[~learned], writes)
    assert not found.full.any()
    assert set(found.fraction.round(1)) == {0.0, 0.7}


def test_as_many_main_latents_are_taken_as_a_probe_needs() -> None:
    rng = np.random.default_rng(2)
    y = rng.random(600) < 0.5
    half = rng.random(600) < 0.5
    # the concept is split over two latents; a third speaks at random
    codes = np.stack([y & half, y & ~half, rng.random(600) < 0.3], axis=1).astype(float)
    assert sorted(main_latents(csr_matrix(codes), y)) == [0, 1]
    whole = np.stack([y, y & half, y & ~half], axis=1).astype(float)
    assert main_latents(csr_matrix(whole), y).tolist() == [0]
