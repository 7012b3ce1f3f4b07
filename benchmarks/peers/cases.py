"""The model and texts of the peers' jobs: those of mechscope's, and the model as a peer wraps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.models import make_model, make_texts
from benchmarks.settings import BenchmarkError, Settings
from benchmarks.shapes import Size


@dataclass(frozen=True, eq=False)
class PeerCase:
    """A plain Hugging Face model, the same one as a peer wraps it, and clean and corrupt texts.

    Attributes:
        model: The plain model.
        wrapped: The peer's.
        ids: Clean texts, ``(text, token)``.
        corrupt: Corrupt texts, likewise.
    """

    model: Any
    wrapped: Any
    ids: Tensor
    corrupt: Tensor

    @property
    def layers(self) -> range:
        """Numbers of the blocks."""
        return range(self.model.config.n_layer)

    @property
    def heads(self) -> range:
        """Numbers of a block's heads."""
        return range(self.model.config.n_head)

    @property
    def texts(self) -> int:
        """How many texts."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Of all texts together."""
        return self.ids.numel()

    @property
    def each(self) -> int:
        """Of each text."""
        return self.ids.shape[1]

    def small(self) -> PeerCase:
        """Return two texts of eight tokens."""
        return replace(self, ids=self.ids[:2, :8], corrupt=self.corrupt[:2, :8])


def build(settings: Settings, size: Size, *, wrap: Callable[[Any], Any], maps: bool = False) -> PeerCase:
    """Make the model and wrap it.

    Args:
        settings: The shape.
        size: The texts.
        wrap: What a peer does to a model before it works with it.
        maps: Whether the job holds the attention maps of all layers.

    Raises:
        BenchmarkError: These would not fit into the memory.
    """
    ids, corrupt = (texts.to(settings.device) for texts in make_texts(settings.shape, size))
    needed = 1.5 * settings.shape.layers * settings.shape.heads * ids.shape[0] * ids.shape[1] ** 2 * 4
    if maps and needed > (available := psutil.virtual_memory().available):
        raise BenchmarkError(f"maps of all layers take {needed / 2**30:.0f} GiB, {available / 2**30:.0f} are free")
    model = make_model(settings.shape, device=settings.device)
    return PeerCase(model, wrap(model), ids, corrupt)


def builder(wrap: Callable[[Any], Any] = lambda model: model, *, maps: bool = False) -> Callable[[Settings, Size], PeerCase]:
    """Return a job's `build`."""
    return partial(build, wrap=wrap, maps=maps)


@torch.no_grad()
def forward(case: PeerCase) -> None:
    """Run the plain forward pass, logits included."""
    case.model(case.ids, use_cache=False)


def text_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return every text's mean loss over the tokens that can be predicted, ``(text)``."""
    return cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def top_log_probabilities(logits: Tensor) -> Tensor:
    """Return the five largest log-probabilities of every row."""
    return logits.log_softmax(-1).topk(5, dim=-1).values


def mean_entropies(patterns: Tensor) -> Tensor:
    """Return the mean entropy over rows of attention maps, ``(…, query, key)``."""
    return torch.special.entr(patterns).sum(-1).mean(-1)


def stacked(found: list[Tensor]) -> np.ndarray:
    """Return tensors one after another."""
    return torch.cat([value.detach().flatten() for value in found]).cpu().numpy()


def first_text(found: list[Tensor]) -> np.ndarray:
    """Return what was found of the first text."""
    return stacked([value[0] for value in found])


def last_token(found: list[Tensor]) -> np.ndarray:
    """Return what was found at the first text's last token."""
    return stacked([value[0, -1] for value in found])
