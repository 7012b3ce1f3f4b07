"""Whole trainings: the same losses as dense autograd, from which training can be gone on with, and planted directions are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from mechscope.features.layout import Layout, autoencoder
from mechscope.features.learner import DivergedError, Learner, memory_of
from mechscope.features.objective import checked
from mechscope.features.rules import Rule
from mechscope.settings.features import FeatureTraining, Objective
from tests.features import dense_step
from tests.features.planted import Planted, best_cosines

BATCH = 64
SMALL = Planted.of(16, 24, 2)
CURVES: dict[str, tuple[Rule, dict[str, Any]]] = {
    "relu": (Rule("relu"), {"sparsity": 0.05}),
    "relu, free norms": (Rule("relu"), {"sparsity": 0.05, "norms": "free"}),
    "gated": (Rule("gated"), {"sparsity": 0.05}),
    "topk": (Rule("topk", 3), {}),
    "batchtopk": (Rule("batchtopk", 3), {}),
    "jumprelu": (Rule("jumprelu"), {"sparsity": 0.1, "target": 3.0, "bandwidth": 0.05}),
    "matryoshka": (Rule("batchtopk", 3), {"prefixes": (12, 32)}),
}


def learner(layout: Layout, training: FeatureTraining, seed: int = 0, **options: Any) -> Learner:
    return Learner(layout, Objective(**options), training, layout.tensors(seed=seed))


def dense_training(layout: Layout, training: FeatureTraining, batches: list[Tensor], **options: Any) -> list[float]:
    """Train by autograd through dense codes and plain Adam; return the losses."""
    objective = checked(Objective(**options), layout)
    leaves = {
        name: tensor.requires_grad_() for name, tensor in layout.tensors().items() if name != "threshold" or layout.rule.name == "jumprelu"
    }
    adam = torch.optim.Adam(leaves.values(), lr=training.rate(layout.latents), betas=(0.9, 0.999), foreach=False)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, training.pace)
    silent = torch.zeros(layout.latents, dtype=torch.int64)
    losses = []
    for u in batches:
        adam.zero_grad()
        loss, f = dense_step.loss(layout, leaves, u, u, objective, silent >= objective.patience(training))
        loss.backward()
        decoder = leaves["decoder.0"]
        with torch.no_grad():
            if objective.norms == "unit":
                assert decoder.grad is not None
                decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
            torch.nn.utils.clip_grad_norm_(leaves.values(), training.clip)
            adam.step()
            rate.step()
            if objective.norms == "unit":
                decoder /= decoder.norm(dim=1, keepdim=True)
            if "threshold" in leaves:
                leaves["threshold"].clamp_(min=0)
            silent = torch.where((f > 0).any(0), 0, silent + len(u))
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("case", CURVES)
def test_losses_of_a_training_are_those_of_dense_autograd(case: str) -> None:
    rule, options = CURVES[case]
    layout = autoencoder("resid0", 16, 32, rule)
    training = FeatureTraining(steps=500, batch=BATCH, learning_rate=2e-3)
    batches = [SMALL.rows(BATCH, seed) for seed in range(training.steps)]
    options = {**options, "dead_after": 10 * BATCH}
    ours = learner(layout, training, **options)
    losses = [ours.advance(u, u).loss for u in batches]
    expected = dense_training(layout, training, batches, **options)
    assert losses[-1] < 0.7 * losses[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


@pytest.mark.parametrize("case", CURVES)
def test_a_training_goes_on_from_its_state_to_the_last_bit(case: str) -> None:
    rule, options = CURVES[case]
    layout = autoencoder("resid0", 16, 32, rule)
    training = FeatureTraining(steps=12, batch=BATCH, learning_rate=2e-3)
    whole, first, second = (learner(layout, training, seed, **options, dead_after=3 * BATCH) for seed in (0, 0, 1))
    batches = [SMALL.rows(BATCH, seed) for seed in range(training.steps)]
    for u in batches:
        whole.advance(u, u)
    for u in batches[:5]:
        first.advance(u, u)
    tensors, numbers = first.state()
    second.restore(tensors, numbers)
    for u in batches[5:]:
        second.advance(u, u)
    assert all(torch.equal(second.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert torch.equal(second.silent, whole.silent)


def trained(planted: Planted, latents: int, rule: Rule, *, steps: int = 800, **options: Any) -> Learner:
    """Train on fresh draws."""
    layout = autoencoder("resid0", planted.directions.shape[1], latents, rule)
    training = FeatureTraining(steps=steps, batch=128, learning_rate=3e-3)
    ours = learner(layout, training, **options)
    for seed in range(steps):
        u = planted.rows(training.batch, seed)
        ours.advance(u, u)
    return ours


PLANTED = Planted.of(24, 40, 2)


def found(rows: Tensor) -> tuple[float, float]:
    """Return the mean largest cosine with the planted directions, and the share of them that is matched by .9."""
    cosines = best_cosines(rows, PLANTED.directions)
    return float(cosines.mean()), float((cosines > 0.9).float().mean())


def test_topk_with_auxk_finds_planted_directions_that_neither_chance_nor_pca_does() -> None:
    ours = trained(PLANTED, 56, Rule("topk", 2), steps=700, dead_after=1000)
    mmcs, recovered = found(ours.tensors["decoder.0"])
    assert mmcs >= 0.95
    assert recovered >= 0.9
    basis = torch.from_numpy(PCA().fit(PLANTED.rows(4000, 10_000).numpy()).components_)
    for control in (ours.layout.tensors(seed=7)["decoder.0"], torch.cat([basis, -basis])):
        other, share = found(control)
        assert other < mmcs - 0.2
        assert share <= 0.1


def test_auxk_brings_latents_back() -> None:
    planted = Planted.of(16, 24, 2)
    training = FeatureTraining(steps=400, batch=128, learning_rate=3e-3)
    alive, matched = [], []
    for weight in (1 / 32, 0.0):
        ours = learner(autoencoder("resid0", 16, 32, Rule("topk", 2)), training, aux_weight=weight, dead_after=1000)
        # half of the latents never speak
        ours.tensors["encoder_bias"][:16] = -1.0
        for seed in range(training.steps):
            u = planted.rows(training.batch, seed)
            ours.advance(u, u)
        alive.append(int((~ours.dead[:16]).sum()))
        matched.append(int((best_cosines(ours.tensors["decoder.0"], planted.directions) > 0.9).sum()))
    assert alive[0] > 8
    assert alive[1] == 0
    assert matched[0] > matched[1] + 3


def test_shrinkage_of_l1_grows_with_its_weight() -> None:
    planted, rows = Planted.of(16, 16, 2), 2000
    shares = []
    for weight in (0.1, 0.2, 0.4):
        ours = trained(planted, 24, Rule("relu"), steps=600, sparsity=weight)
        f = torch.relu(planted.rows(rows, 10_000) @ ours.tensors["encoder.0"].T + ours.tensors["encoder_bias"])
        truth = planted.codes(rows, 10_000) / (planted.active * 13 / 12) ** 0.5
        best = (planted.directions @ ours.tensors["decoder.0"].T).max(dim=1)
        matched = best.values > 0.9
        assert matched.float().mean() >= 0.8
        own, there = f[:, best.indices[matched]], truth[:, matched]
        shares.append(float((own * (there > 0)).sum() / there.sum()))
    assert 1 > shares[0] > shares[1] + 0.02 > shares[2] + 0.04


def test_the_threshold_of_batchtopk_gives_as_many_latents_as_k() -> None:
    planted = Planted.of(16, 24, 2)
    ours = trained(planted, 32, Rule("batchtopk", 3), steps=300)
    pre = planted.rows(2000, 10_000) @ ours.tensors["encoder.0"].T + ours.tensors["encoder_bias"]
    assert float((pre > ours.tensors["threshold"]).sum(1).float().mean()) == pytest.approx(3, rel=0.1)


def test_a_loss_that_is_no_number_is_an_error_and_leaves_the_weights() -> None:
    ours = learner(autoencoder("resid0", 16, 32, Rule("topk", 3)), FeatureTraining(steps=9))
    u = SMALL.rows(BATCH, 0)
    ours.advance(u, u)
    before = {name: tensor.clone() for name, tensor in ours.tensors.items()}
    with pytest.raises(DivergedError, match="inputs not finite at step 2"):
        ours.advance(u * float("nan"), u)
    with pytest.raises(DivergedError, match=r"loss nan.*at step 2"):
        ours.advance(u, u * float("nan"))
    assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in before.items())


def test_memory_is_that_of_weights_gradients_and_moments() -> None:
    layout = autoencoder("resid0", 768, 24_576, Rule("topk", 32))
    weights = 2 * 768 * 24_576 + 768 + 24_576
    assert memory_of([layout], 2048).held == 16 * weights
    assert memory_of([layout, layout], 2048).held == 28 * weights
    assert memory_of([layout], 2048).total <= 1.15 * 16 * weights
    # half of the latents are active in each token before a penalty acts
    dense = autoencoder("resid0", 128, 8192, Rule("relu"))
    assert memory_of([dense], 2048).work >= 2048 * 8192 // 2 * 60


def test_the_learning_rate_rises_stays_and_falls() -> None:
    training = FeatureTraining(steps=100, warm_up=0.1, decay=0.2)
    paces = [training.pace(at) for at in range(100)]
    assert paces[:3] == [0.1, 0.2, pytest.approx(0.3)]
    assert paces[10:80] == [1.0] * 70
    assert paces[-1] == 0.05
