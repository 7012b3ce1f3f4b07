"""Planted activations as a source of training, and dictionaries of every kind to train on them."""

from __future__ import annotations

from typing import Any

import torch

from mechscope.features.activations import Block
from mechscope.features.affine import Affine, moments_of
from mechscope.features.layout import autoencoder, cross_layer, crosscoder, transcoder
from mechscope.features.places import Place, places
from mechscope.features.rules import Rule
from mechscope.features.trainer import Plan
from mechscope.settings.features import FeatureTraining, Objective
from tests.features.planted import Planted

PLANTED = Planted.of(16, 24, 2)
WHERE = places("resid0,m1.in,m1,m0.in,m0")


class Made:
    """Planted activations in four blocks, the same at all places but for their scale and centre."""

    def __init__(self, where: tuple[Place, ...] = WHERE) -> None:
        self.places = where
        self.blocks = 4
        self.identity: dict[str, Any] = {"models": {"": "abc"}, "made": "planted"}
        self.limits: dict[str, float] = {}

    def block(self, number: int) -> Block:
        rows = PLANTED.rows(500, number)
        return {place: rows * (2.0 + at) + at for at, place in enumerate(self.places)}

    def affine(self, place: Place) -> Affine:
        moments = moments_of(torch.cat([self.block(number)[place] for number in range(self.blocks)]))
        return Affine.fitted(moments)


PLANS = {
    "topk": Plan(autoencoder("resid0", 16, 32, Rule("topk", 3)), Objective(dead_after=500)),
    "l1": Plan(autoencoder("m1", 16, 24, Rule("relu")), Objective(sparsity=0.1), learning_rate=5e-3),
    "transcoder": Plan(transcoder(1, 16, 32, Rule("batchtopk", 3), skip=True)),
    "cross-layer": Plan(cross_layer((0, 1), 16, 24, Rule("jumprelu")), Objective(sparsity=0.1, target=4.0, bandwidth=0.05)),
    "crosscoder": Plan(crosscoder("resid0,m1", (16, 16), 32, Rule("topk", 3, by_norm=True)), Objective(norms="free")),
}
TRAINING = FeatureTraining(steps=30, batch=64, learning_rate=3e-3)
