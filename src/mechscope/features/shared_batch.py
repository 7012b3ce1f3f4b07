"""A batch of training as one rank sees it: its own rows, and sums over those of all ranks.

Gradients are sums over tokens, so each rank takes those of its own rows, divided by the tokens of all, and they are added up. What is no such sum is brought
together where it arises: which scores are the largest of the batch (`batchtopk`), how many latents are active (the penalty `target`), the mean and the variance
of what is left over (AuxK). In one process all of it costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mechscope import ranks


@dataclass(frozen=True)
class Batch:
    """How many tokens a batch has.

    Attributes:
        tokens: Of all ranks together.
        shared: Whether other ranks hold some of them.
    """

    tokens: int
    shared: bool = False

    @classmethod
    def of(cls, rows: int, whole: int | None) -> Batch:
        """Return a batch of which this rank holds some rows; `whole` is None where it holds all."""
        return cls(rows) if whole is None else cls(whole, ranks.size() > 1)

    def summed(self, value: Tensor) -> Tensor:
        """Return the sum over ranks; changes `value`."""
        if self.shared:
            ranks.add_up(value)
        return value

    def once(self, value: Tensor) -> Tensor:
        """Return what all ranks have in common so that it counts once in a sum over ranks."""
        return value if not self.shared or ranks.is_first() else torch.zeros_like(value)

    def parts(self, value: Tensor) -> list[Tensor]:
        """Return what each rank brings, on the CPU where there are several."""
        return ranks.exchange(value.cpu()) if self.shared else [value]
