"""Influence, pruning and scores are what the dense definitions give; predicted effects follow every path once."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from mechscope.errors import SettingsError
from mechscope.features.graphs import pruned, scores
from mechscope.features.graphs.influence import influence, normalised, predicted_effects

# eight latents in four layers, four errors, three tokens, two logits
KINDS = np.repeat(["latent", "error", "token", "logit"], [8, 4, 3, 2])
DEPTH = np.array([1, 1, 2, 2, 3, 3, 4, 4, 1, 2, 3, 4, 0, 0, 0, 9, 9])
WEIGHTS = np.where(KINDS == "logit", 0.0, 0.0)
WEIGHTS[-2:] = 0.6, 0.3


def made(seed: int) -> np.ndarray:
    """Return a dense random graph ``(target, source)`` without circles, of weights of both signs and very different sizes."""
    generator = np.random.default_rng(seed)
    edges = generator.standard_normal((17, 17)) * np.exp(2 * generator.standard_normal((17, 17)))
    allowed = (DEPTH[:, None] > DEPTH[None]) & np.isin(KINDS, ("latent", "logit"))[:, None]
    return np.where(allowed & (generator.random((17, 17)) < 0.7), edges, 0.0)


def dense_influence(edges: np.ndarray) -> np.ndarray:
    sizes = np.abs(edges)
    shares = sizes / np.maximum(sizes.sum(1, keepdims=True), 1e-12)
    return WEIGHTS @ (np.linalg.inv(np.eye(17) - shares) - np.eye(17))


def fewest(values: np.ndarray, share: float) -> float:
    """Return the least of the fewest largest values that have a share of all."""
    ordered = sorted(values.ravel(), reverse=True)
    total = 0.0
    for value in ordered:
        total += value
        if total >= share * sum(ordered) - 1e-12:
            return value
    return ordered[-1]


@pytest.mark.parametrize("seed", range(4))
def test_influence_is_the_sum_over_all_paths(seed: int) -> None:
    edges = made(seed)
    np.testing.assert_allclose(influence(normalised(sparse.csr_matrix(edges)), WEIGHTS), dense_influence(edges), atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("node_share", "edge_share"), [(0.8, 0.98), (0.5, 0.9), (1.0, 1.0)])
def test_pruning_keeps_the_fewest_nodes_then_edges_and_no_stranded_ones(seed: int, node_share: float, edge_share: float) -> None:
    edges, always = made(seed), np.isin(KINDS, ("token", "logit"))
    reached = dense_influence(edges)
    keep = always | (reached >= fewest(reached, node_share) - 1e-12)
    inner = edges * keep[:, None] * keep[None]
    shares = np.abs(inner) / np.maximum(np.abs(inner).sum(1, keepdims=True), 1e-12)
    through = (dense_influence(inner) + WEIGHTS)[:, None] * shares
    left = through >= max(fewest(through, edge_share) - 1e-12, 1e-300)
    for _ in range(20):
        stranded = ~always & (~left.any(0) | ((KINDS == "latent") & ~left.any(1)))
        keep &= ~stranded
        left &= keep[:, None] & keep[None]
    found = pruned(sparse.csr_matrix(edges), WEIGHTS, pd.DataFrame({"kind": KINDS}), node_share=node_share, edge_share=edge_share)
    assert (found.nodes == keep).all()
    np.testing.assert_allclose(found.edges.toarray(), np.where(left, edges, 0.0))
    np.testing.assert_allclose(found.edge_influence.toarray(), np.where(left, through, 0.0), atol=1e-12)
    np.testing.assert_allclose(found.influence, reached, atol=1e-12)
    order = np.argsort(-reached)
    np.testing.assert_allclose(found.cumulative[order], np.cumsum(reached[order]) / reached.sum())


def test_shares_outside_of_zero_and_one_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"node_share=1\.2"):
        pruned(sparse.csr_matrix(made(0)), WEIGHTS, pd.DataFrame({"kind": KINDS}), node_share=1.2)


def test_scores_by_hand() -> None:
    # a logit that reads a latent (3) and an error (1); the latent reads a token (1) and another error (3)
    kinds = pd.DataFrame({"kind": ["latent", "error", "error", "token", "logit"]})
    edges = np.zeros((5, 5))
    edges[4, 0], edges[4, 1], edges[0, 3], edges[0, 2] = 3.0, -1.0, 1.0, 3.0
    found = scores(sparse.csr_matrix(edges), np.array([0, 0, 0, 0, 1.0]), kinds)
    # influence: latent .75, first error .25, token .75 / 4, second error .75 · 3 / 4
    assert found.replacement == pytest.approx(0.1875 / (0.1875 + 0.25 + 0.5625))
    # the logit counts 1 and has .75 of its inputs explained; the latent .75 and .25; of what reads nothing nothing is unexplained: 1 · (.25 + .1875 + .5625)
    assert found.completeness == pytest.approx((1 * 0.75 + 0.75 * 0.25 + 1.0) / (1 + 0.75 + 1.0))


def test_without_errors_both_scores_are_one() -> None:
    edges = made(1)
    edges[:, KINDS == "error"] = 0.0
    found = scores(sparse.csr_matrix(edges), WEIGHTS, pd.DataFrame({"kind": KINDS}))
    assert (found.replacement, found.completeness) == pytest.approx((1.0, 1.0))


def test_predicted_effects_follow_every_path() -> None:
    edges = made(2)
    values = np.where(np.isin(KINDS, ("latent", "logit")), np.linspace(0.5, 3.0, 17), np.nan)
    changed = np.zeros(17)
    changed[[0, 3]] = -1.0, 0.5
    direct, total = predicted_effects(sparse.csr_matrix(edges), values, changed)
    np.testing.assert_allclose(direct, edges @ changed)
    # change = edges · (what was changed + change / value), solved at once
    follows = np.where(np.isnan(values), 0.0, 1 / values)
    np.testing.assert_allclose(total, np.linalg.solve(np.eye(17) - edges * follows[None], edges @ changed), rtol=1e-9, atol=1e-9)
