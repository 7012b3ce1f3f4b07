"""Statistics of one layer's neurons over tokens and texts, added up batch by batch and mergeable.

Means carry intervals over texts, one number per text; spread, extremes and the dependence on position are over tokens. That dependence is the share of a
neuron's variance that lies between groups of positions (the correlation ratio η², an R² with one level per group); where nothing depends on position it
is (groups − 1) / (tokens − 1) on average, for tokens that are independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechscope.stats.moments import Moments
from mechscope.stats.skewness import ThirdMoments
from mechscope.weights.contexts import TopContexts

# a group per position up to the first number and then eight to an octave: 64 groups up to 1,024, 120 up to 131,072
_SINGLE, _PER_OCTAVE = 16, 8
# a neuron whose values differ by less than this share of their size is constant up to rounding
_CONSTANT = 1e-12


@dataclass(frozen=True)
class Tokens:
    """The real tokens of a batch, in ascending order of text and position.

    Attributes:
        rows: Where each is in the flattened batch.
        text: Number of its text.
        position: Its position there.
        token: Its id.
        lengths: Tokens of every text of the batch.
    """

    rows: Int[Tensor, " n"]
    text: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    token: Int[Tensor, " n"]
    lengths: list[int]


class LayerActivity:
    """Statistics of one layer's neurons.

    Attributes:
        by_text: Moments over texts of ``(2, neuron)``: a text's mean activation, and the share of its tokens where a neuron is active.
        tokens: Moments over tokens of the activation, ``(neuron,)``.
        minimum: ``(neuron,)``.
        maximum: ``(neuron,)``.
        active: ``(neuron,)``: tokens where a neuron was active.
        contexts: The strongest activations.
    """

    def __init__(self, n_neurons: int, *, gated: bool, contexts: int, longest: int) -> None:
        """Start with no tokens; `longest` is the number of tokens of the longest text."""
        self._gated, self._longest = gated, longest
        self.by_text, self.tokens = ThirdMoments((2, n_neurons)), Moments((n_neurons,))
        self.minimum, self.maximum = np.full(n_neurons, np.inf), np.full(n_neurons, -np.inf)
        self.active: Int[np.ndarray, " neuron"] = np.zeros(n_neurons, dtype=np.int64)
        self.contexts = TopContexts(contexts, n_neurons, by_size=gated)
        groups = int(position_group(torch.tensor(longest - 1))) + 1
        self._sums: Float[np.ndarray, "group neuron"] = np.zeros((groups, n_neurons))
        self._counts: Int[np.ndarray, " group"] = np.zeros(groups, dtype=np.int64)

    def empty(self) -> LayerActivity:
        """Return an object for the same neurons and texts that has seen no tokens."""
        return LayerActivity(len(self.minimum), gated=self._gated, contexts=len(self.contexts.token), longest=self._longest)

    def update(
        self, values: Float[Tensor, "n neuron"], active: Bool[Tensor, "n neuron"], tokens: Tokens
    ) -> Float[np.ndarray, "text 2 neuron"]:
        """Add tokens; return what each text adds to `by_text`."""
        split = [one.split(tokens.lengths) for one in (values, active, position_group(tokens.position).to(values.device))]
        by_text = torch.stack([self._add(*one) for one in zip(*split, strict=True)]).cpu().numpy()
        self.by_text.update_many(by_text)
        low, high = values.amin(0).cpu().numpy(), values.amax(0).cpu().numpy()
        self.minimum, self.maximum = np.minimum(self.minimum, low), np.maximum(self.maximum, high)
        self.contexts.update(values, *(one.to(values.device) for one in (tokens.text, tokens.position, tokens.token)))
        return by_text

    def _add(
        self, values: Float[Tensor, "n neuron"], active: Bool[Tensor, "n neuron"], group: Int[Tensor, " n"]
    ) -> Float[Tensor, "2 neuron"]:
        """Add one text's tokens to what is over tokens; return its means."""
        wide, n, fired = values.double(), len(values), active.sum(0)
        mean = wide.mean(0)
        self._sums += wide.new_zeros(self._sums.shape).index_add_(0, group, wide).cpu().numpy()
        self._counts += np.bincount(group.cpu().numpy(), minlength=len(self._counts))
        spread = (wide - mean).square_().sum(0)
        self.tokens.merge(Moments.from_state({"count": np.full(mean.shape, n), "mean": mean.cpu().numpy(), "m2": spread.cpu().numpy()}))
        self.active += fired.cpu().numpy()
        return torch.stack([mean, fired.double() / n])

    def merge(self, other: LayerActivity, *, texts_before: int) -> None:
        """Add another object's tokens; its texts are numbered from `texts_before` on here."""
        self.by_text.merge(other.by_text)
        self.tokens.merge(other.tokens)
        self.minimum, self.maximum = np.minimum(self.minimum, other.minimum), np.maximum(self.maximum, other.maximum)
        self.active += other.active
        groups = max(len(self._counts), len(other._counts))
        self._sums, self._counts = (
            _grown(self._sums, groups) + _grown(other._sums, groups),
            _grown(self._counts, groups) + _grown(other._counts, groups),
        )
        self.contexts.merge(other.contexts, texts_before=texts_before)

    @property
    def position_r2(self) -> Float[np.ndarray, " neuron"]:
        """Share of the variance over tokens that lies between groups of positions; NaN for constant neurons."""
        seen = self._counts > 0
        means = self._sums[seen] / self._counts[seen, None]
        between = (self._counts[seen, None] * (means - self.tokens.mean) ** 2).sum(0)
        total = self.tokens.variance * (self.tokens.count - 1)
        least = self.tokens.count * (_CONSTANT * np.maximum(np.abs(self.minimum), np.abs(self.maximum))) ** 2
        return np.divide(between, total, out=np.full(between.shape, np.nan), where=total > least)

    @property
    def position_r2_chance(self) -> float:
        """What that share is on average where activations do not depend on position, nor on one another."""
        n = int(self._counts.sum())
        return (int((self._counts > 0).sum()) - 1) / (n - 1) if n > 1 else float("nan")

    def purity(self) -> tuple[Float[np.ndarray, " neuron"], Int[np.ndarray, " neuron"]]:
        """Return the share of each neuron's contexts that its commonest token has, and that token; NaN below two contexts (and -1 with none)."""
        token, filled = self.contexts.token, self.contexts.filled
        together = ((token[:, None] == token[None]) & filled[:, None]).sum(0)
        most, at = together.max(0)
        n = filled.sum(0)
        share = (most.double() / n).where(n > 1, torch.nan)
        return share.numpy(), token.gather(0, at[None])[0].numpy()


def position_group(position: Int[Tensor, "*some"]) -> Int[Tensor, "*some"]:
    """Return which group of positions each belongs to: one by one up to 16, then eight groups to an octave; not a matter of the texts at hand."""
    octave = torch.frexp(position.double()).exponent.long() - 1
    first = torch.bitwise_left_shift(torch.ones_like(position), octave.clamp(min=0))
    within = (position - first) * _PER_OCTAVE // first
    return torch.where(position < _SINGLE, position, _SINGLE + (octave - 4) * _PER_OCTAVE + within)


def _grown(values: np.ndarray, groups: int) -> np.ndarray:
    return np.concatenate([values, np.zeros((groups - len(values), *values.shape[1:]), values.dtype)])
