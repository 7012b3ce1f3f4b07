"""Texts for neurons, and their activations from runs of one unpadded text each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.instrument import record
from mechscope.subject.load import Subject
from tests import families

LENGTHS = (23, 9, 31, 14, 9, 12)


def texts_of(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, names: str = "t") -> Pairs:
    rows = [tuple(text.tolist()) for text in families.documents(lengths=lengths, seed=seed)]
    return Pairs(tuple(PromptPair(f"{names}{at}", row, row) for at, row in enumerate(rows)), "random")


def from_rows(*rows: tuple[int, ...]) -> Pairs:
    return Pairs(tuple(PromptPair(f"t{at}", row, row) for at, row in enumerate(rows)), "by hand")


def gates(subject: Subject, layer: int, kept: list[Tensor]) -> Any:
    block: Any = subject.anatomy.blocks[layer].module
    function = next(
        getattr(holder, name)
        for holder in (getattr(block, "mlp", block), block)
        for name in ("act", "act_fn", "activation_fn")
        if hasattr(holder, name)
    )
    return function.register_forward_hook(lambda _, args, output: kept.append(output.reshape(-1, output.shape[-1])))


@torch.no_grad()
def run(subject: Subject, texts: Pairs) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Run every text by itself: per text the neurons and the outputs of the activation, ``(layer, token, neuron)``."""
    neurons, opened = [], []
    for pair in texts:
        kept: list[Tensor] = []
        handles = [gates(subject, layer, kept) for layer in range(subject.anatomy.n_layers)]
        with record(subject, "neuron") as seen:
            subject.plain(torch.tensor([pair.clean]))
        for handle in handles:
            handle.remove()
        neurons.append(torch.stack([seen["neuron", layer][0] for layer in range(subject.anatomy.n_layers)]).numpy())
        opened.append(torch.stack(kept).numpy())
    return neurons, opened
