"""Rows that are held while texts are read, for probes that are learned step by step: all of them, or as many as fit drawn at random.

Which rows are held hangs on the task and the seed alone, so that models, ranks and batches of any size hold the same.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope import ranks
from mechscope.data.pairs import PairBatch
from mechscope.shapes import by_shape
from mechscope.subject.placement import sent

MOST = 20_000


class HeldRows:
    """Rows of some texts at every site, in float32.

    Attributes:
        text: ``(row,)``: the text that a row is of.
        labels: ``(row, labeling)``.
    """

    def __init__(
        self, labelings: Int[np.ndarray, "row labeling"], text: Int[np.ndarray, " row"], *, most: int = MOST, seed: int = 0
    ) -> None:
        """Choose which rows will be held.

        Args:
            labelings: The classes of all rows, text after text.
            text: The text that each is of.
            most: Rows at most.
            seed: Of the choice.
        """
        chosen = np.sort(np.random.default_rng(seed).permutation(len(text))[:most])
        self.text, self.labels = torch.from_numpy(text[chosen]), torch.from_numpy(labelings[chosen])
        # where a row of a text is held, or that it is not
        place = np.full(len(text), -1)
        place[chosen] = np.arange(len(chosen))
        self._place = np.split(place, np.flatnonzero(np.diff(text)) + 1)
        self._x: Tensor | None = None
        self._seen = torch.zeros(len(chosen), dtype=torch.bool)

    __repr__ = by_shape

    def take(self, batch: PairBatch, x: Float[Tensor, "site row width"]) -> None:
        """Hold what is to be held of a batch's rows."""
        place = torch.from_numpy(np.concatenate([self._place[at] for at in batch.indices]))
        if self._x is None:
            self._x = torch.zeros(x.shape[0], len(self.text), x.shape[2], device=x.device)
        held = place >= 0
        self._x[:, sent(place[held], x.device)] = x[:, sent(held, x.device)].float()
        self._seen[place[held]] = True

    def gather(self) -> None:
        """Bring together what ranks hold; each then holds all."""
        if ranks.size() == 1:
            return
        parts = ranks.exchange((self._seen, None if self._x is None else self._x[:, sent(self._seen, self._x.device)].cpu()))
        whole = next(part for _, part in parts if part is not None)
        device = "cpu" if self._x is None else self._x.device
        x = torch.zeros(whole.shape[0], len(self.text), whole.shape[2])
        for seen, part in parts:
            if part is not None:
                x[:, seen] = part
        self._x, self._seen = x.to(device), torch.ones_like(self._seen)

    @property
    def x(self) -> Float[Tensor, "site row width"]:
        """The rows; `ValueError` before all are there."""
        if self._x is None or not bool(self._seen.all()):
            raise ValueError("rows are held of all texts only once all were read")
        return self._x
