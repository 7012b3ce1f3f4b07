"""What tests of trainings share: short settings, a placed adapter, and the weights of a result's folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from mechscope.adapt.targets import place
from mechscope.settings.training import TrainSettings
from mechscope.subject.components import Components

# three steps an epoch with a short last batch, evaluations off the rhythm of the epochs, a last step off the rhythm of the evaluations
SETTINGS = TrainSettings(
    learning_rate_full=3e-3, learning_rate_lora=2e-2, batch_size=8, max_steps=11, eval_every=2, warmup=0.2, patience=None
)


def placed_on(subject, where="layers:0,a1.h2"):
    return place(subject, Components.parse(where), rank=4)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def same_weights(left: Path, right: Path) -> bool:
    a, b = weights(left), weights(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
