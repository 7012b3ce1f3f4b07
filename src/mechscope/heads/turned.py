"""The null of head detectors: the same heads, turned at random inside.

How high does a head score by chance? Not what a head scores that looks at all keys alike: every head with any weights prefers something, and over texts
that preference is certain. So each head is compared with itself, its queries (and its values, before the output projection) multiplied by a random
orthogonal matrix of the head's space. Lengths of queries, keys and values, what is read, positions and masks stay; what training aligned is lost.
Rotary positions stay too: there only matrices are drawn that commute with a shift by one position, a random angle in each plane that positions turn.

A model with independent Gaussian weights has the same law after the turn, so its own heads are one more draw. Of heads that score at least t, the share

    q(t) = (1 + turned heads at or above t, all draws) / (draws + 1) / own heads at or above t

is expected to be false (target and decoy: Elias & Gygi 2007; with the 1 of Barber & Candès 2015 it holds for few heads). Where no head has a role, the
probability that any gets one by q <= .05 is then at most .05 with 20 draws, whatever the number of heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import polar, schur
from scipy.stats import ortho_group
from torch import Tensor

from mechscope.data.pairs import PairBatch
from mechscope.instrument import AttentionCall
from mechscope.subject import Subject
from mechscope.weights import position_turn

Reduce = Callable[[AttentionCall, PairBatch], Tensor]

DRAWS = 20
"""Turns of every head: as few as let a single head reach a q of .05."""
TEXTS = 8
"""Texts that turned heads read at most: fewer than a head's own make chance reach a little higher."""

# turns per position, in radians, that no text is long enough to tell from none
_STILL = 1e-6


class Turns:
    """Random turns of every layer's heads, drawn where they are first asked for.

    Attributes:
        draws: How many.
    """

    def __init__(self, subject: Subject, *, seed: int, draws: int = DRAWS) -> None:
        """Turn a model's heads; the model itself is left alone."""
        self.draws = draws
        self._subject, self._seed = subject, seed
        self._drawn: dict[int, tuple[Tensor, Tensor]] = {}

    def each(self, reduce: Reduce) -> Reduce:
        """Return a reduction that gives ``(..., draw)``: the same numbers for every turn of the call's heads."""

        def turned(call: AttentionCall, batch: PairBatch) -> Tensor:
            query, value = self._of(call.layer)
            return torch.stack([reduce(_turn(call, query[at], value[at]), batch) for at in range(self.draws)], dim=-1)

        return turned

    def _of(self, layer: int) -> tuple[Float[Tensor, "draw d d"], Float[Tensor, "draw d d"]]:
        if layer not in self._drawn:
            random = np.random.default_rng((self._seed, layer))
            query = commuting(position_turn(self._subject, layer).cpu().numpy(), self.draws, random)
            value = orthogonal(self._subject.anatomy.d_head, self.draws, random)
            self._drawn[layer] = (torch.from_numpy(query).float(), torch.from_numpy(value).float())
        return self._drawn[layer]


def false_share(own: Float[np.ndarray, "layer head"], turned: Float[np.ndarray, "draw layer head"]) -> Float[np.ndarray, "layer head"]:
    """Return the expected share of false ones among the heads that score at least as much as each; NaN where a head was not measured.

    Args:
        own: Every head's score.
        turned: The same of its turns.
    """
    scores, chance = own[~np.isnan(own)], np.sort(turned[~np.isnan(turned)])
    order = np.argsort(scores, kind="stable")
    as_high = len(scores) - np.searchsorted(scores[order], scores, side="left")
    shares = (1 + len(chance) - np.searchsorted(chance, scores, side="left")) / (len(turned) + 1) / as_high
    # the lowest share at which a head is among those named
    least = np.empty_like(shares)
    least[order] = np.minimum.accumulate(shares[order])
    found = np.full(own.shape, np.nan)
    found[~np.isnan(own)] = np.minimum(least, 1.0)
    return found


def reached(turned: Float[np.ndarray, "draw layer head"], named: int, level: float) -> float:
    """Return the score that turned heads reach too often: heads above it are those that `false_share` names at a level; NaN of nothing measured.

    Args:
        turned: Turned heads' scores.
        named: How many heads are named; with none, what the first would have to exceed.
        level: Share of false ones, a fraction.
    """
    chance = np.sort(turned[~np.isnan(turned)])[::-1]
    allowed = int(np.floor(level * (len(turned) + 1) * max(named, 1) + 1e-9)) - 1
    return float(chance[min(max(allowed, 0), len(chance) - 1)]) if len(chance) else float("nan")


def mean_excess(
    score: Float[np.ndarray, "text layer head draw"], null: Float[np.ndarray, "text layer head draw"]
) -> Float[np.ndarray, "draw layer head"]:
    """Return the mean over texts of turned heads' scores less their nulls; NaN where no text says anything."""
    excess = score - null
    counted = (~np.isnan(excess)).sum(0)
    total = np.nansum(excess, axis=0)
    return np.moveaxis(np.divide(total, counted, out=np.full(total.shape, np.nan), where=counted > 0), -1, 0)


def orthogonal(size: int, draws: int, random: np.random.Generator) -> Float[np.ndarray, "draw d d"]:
    """Draw orthogonal matrices uniformly."""
    return np.asarray(ortho_group.rvs(size, size=draws, random_state=random)).reshape(draws, size, size)


def commuting(turn: Float[np.ndarray, "d d"], draws: int, random: np.random.Generator) -> Float[np.ndarray, "draw d d"]:
    """Draw orthogonal matrices that commute with an orthogonal one: a random angle in each of its planes, anything in the space that it leaves alone."""
    # half precision leaves it orthogonal up to rounding only
    blocks, basis = schur(polar(turn)[0], output="real")
    size = len(turn)
    firsts = np.flatnonzero(np.abs(np.diag(blocks, -1)) > _STILL)
    still = np.setdiff1d(np.arange(size), np.union1d(firsts, firsts + 1))
    inner = np.zeros((draws, size, size))
    angles = random.uniform(0, 2 * np.pi, size=(draws, len(firsts)))
    inner[:, firsts, firsts] = inner[:, firsts + 1, firsts + 1] = np.cos(angles)
    inner[:, firsts, firsts + 1], inner[:, firsts + 1, firsts] = -np.sin(angles), np.sin(angles)
    if len(still):
        inner[:, still[:, None], still] = orthogonal(len(still), draws, random)
    return np.asarray(basis @ inner @ basis.T)


def _turn(call: AttentionCall, query: Float[Tensor, "d d"], value: Float[Tensor, "d d"]) -> AttentionCall:
    value = value.to(call.value)
    return replace(call, query=call.query @ query.to(call.query), value=call.value @ value, z=call.z @ value.to(call.z))
