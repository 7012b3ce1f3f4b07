"""The strongest activations of every neuron with the tokens they fell on: a bounded heap, filled batch by batch and mergeable.

Order is by strength to about five digits, and among equals by place (text, then position), so that what is kept does not depend on how texts were
batched: where a token alone decides what a neuron does (a parallel model's first layer), its occurrences differ by nothing but rounding.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# a place is text · 2³² + position
_TEXT = 2**32
NOWHERE = torch.iinfo(torch.int64).max


class TopContexts:
    """The `k` strongest activations of each of some neurons.

    Attributes:
        activation: ``(k, neuron)``, strongest first; 0 where fewer tokens drove the neuron.
        token: ``(k, neuron)``: the token that the neuron fired on; -1 for none.
    """

    def __init__(self, k: int, n_neurons: int, *, by_size: bool) -> None:
        """Start with nothing.

        Args:
            k: How many per neuron.
            n_neurons: How many neurons.
            by_size: Whether strength is the size of an activation, whatever its sign (gated MLPs), or the activation itself.
        """
        self._by_size = by_size
        self.activation: Float[Tensor, "k neuron"] = torch.zeros(k, n_neurons)
        self.token: Int[Tensor, "k neuron"] = torch.full((k, n_neurons), -1)
        self._place: Int[Tensor, "k neuron"] = torch.full((k, n_neurons), NOWHERE)

    @property
    def filled(self) -> Tensor:
        """``(k, neuron)``: where there is a context."""
        return self._place != NOWHERE

    @property
    def place(self) -> Int[Tensor, "k neuron"]:
        """One number per text and position, the same in two models that read the same texts."""
        return self._place

    @property
    def text(self) -> Int[Tensor, "k neuron"]:
        """Which text; meaningless where nothing is filled."""
        return self._place // _TEXT

    @property
    def position(self) -> Int[Tensor, "k neuron"]:
        """Which token of it; meaningless where nothing is filled."""
        return self._place % _TEXT

    def update(
        self, activations: Float[Tensor, "n neuron"], text: Int[Tensor, " n"], position: Int[Tensor, " n"], token: Int[Tensor, " n"]
    ) -> None:
        """Add tokens, in ascending order of text and position."""
        strength = self._strength(activations)
        rows = _strongest(strength, len(self.activation))
        place = (text * _TEXT + position)[rows]
        values = activations.gather(0, rows)
        driven = strength.gather(0, rows) > 0
        self._combine(values.where(driven, 0).cpu(), token[rows].where(driven, -1).cpu(), place.where(driven, NOWHERE).cpu())

    def merge(self, other: TopContexts, *, texts_before: int = 0) -> None:
        """Add another object's contexts, whose texts are numbered from `texts_before` on here."""
        moved = (other._place + texts_before * _TEXT).where(other.filled, NOWHERE)
        self._combine(other.activation, other.token, moved)

    def _strength(self, activations: Tensor) -> Tensor:
        return _to_five_digits(activations.abs() if self._by_size else activations)

    def _combine(self, activation: Tensor, token: Tensor, place: Tensor) -> None:
        k = len(self.activation)
        pairs = ((self.activation.to(activation), activation), (self.token, token), (self._place, place))
        parts = [torch.cat(pair) for pair in pairs]
        by_place = parts[2].argsort(dim=0, stable=True)
        parts = [part.gather(0, by_place) for part in parts]
        by_strength = self._strength(parts[0]).argsort(dim=0, stable=True, descending=True)[:k]
        self.activation, self.token, self._place = (part.gather(0, by_strength) for part in parts)


def _to_five_digits(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round to 16 bits behind the leading one, in float32: whole steps of the number that the bits make."""
    return ((x.float().view(torch.int32) + 2**6) & -(2**7)).view(torch.float32)


def _strongest(strength: Float[Tensor, "n neuron"], k: int) -> Int[Tensor, "k neuron"]:
    """Return the rows of the k largest entries of every column; of equal ones the first."""
    k = min(k, len(strength))
    top = strength.T.contiguous().topk(min(k + 1, len(strength)), dim=1)  # along columns it takes twice as long
    rows = top.indices[:, :k].T.contiguous()
    # topk may take any of several equal entries: where one of them was left out, choose again
    torn = (top.values[:, k - 1] == top.values[:, -1]) & (top.values[:, -1] > 0) if k < len(strength) else rows.new_zeros(0)
    if torn.any():
        columns = torn.nonzero()[:, 0]
        rows[:, columns] = strength[:, columns].sort(dim=0, descending=True, stable=True).indices[:k]
    return rows
