"""Which entries of a training batch have a gradient: chosen block by block, so that pre-activations of all tokens are never held.

For `topk` and `relu` each block decides for itself. `batchtopk` keeps the k · tokens largest of the whole batch: candidates above a bound are collected
and cut down whenever there are twice as many, and the bound rises. It may start at a guess (what the last batch's smallest was); where that leaves too
few, it is begun again from zero, so the choice is exact; ranks that share a batch choose among the scores of all. `jumprelu` keeps what lies in its
thresholds' window too, `gated` all open gates. The largest pre-activations of dead latents are taken in the same pass, for AuxK.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.features.codes import Codes
from mechscope.features.layout import Layout
from mechscope.features.pre_activations import pre_activations
from mechscope.features.rules import entries, top_codes
from mechscope.features.shared_batch import Batch

# of the guess, from where candidates are collected: batches differ by less
_SLACK = 0.8


class Selected(NamedTuple):
    """Entries with their pre-activations: those that the rule looks at, those of dead latents, and the smallest score kept (`batchtopk`)."""

    codes: Codes
    aux: Codes | None
    cut: float | None


def select(
    layout: Layout,
    tensors: Mapping[str, Tensor],
    u: Float[Tensor, "token read"],
    sizes: Float[Tensor, " latent"] | None,
    bandwidth: float,
    batch: Batch,
    *,
    dead: Bool[Tensor, " latent"] | None = None,
    aux_k: int = 0,
    cut: float = 0.0,
) -> Selected:
    """Return the entries of a batch that have a gradient.

    Args:
        layout: What the dictionary reads and writes.
        tensors: Its tensors.
        u: What it reads.
        sizes: Norms by which latents are compared, or None.
        bandwidth: Width of JumpReLU's window.
        batch: The whole batch.
        dead: Latents for AuxK.
        aux_k: How many of them for each token.
        cut: `batchtopk`: a guess of the smallest score that will be kept.
    """
    rule = layout.rule
    silent = None if dead is None or not aux_k else dead.nonzero()[:, 0]
    found: list[Codes] = []
    aux: list[Codes] = []
    best = _Best(int(rule.k or 0) * batch.tokens, _SLACK * cut, batch) if rule.name == "batchtopk" else None
    for pre in pre_activations(layout, tensors, u):
        if silent is not None and len(silent):
            # a copy of some columns: their number is small unless nearly all are dead
            own = pre[:, silent]
            some = top_codes(own, own, aux_k, signed=True)
            aux.append(Codes(silent[some.latents], some.values, some.offsets, layout.latents))
        scores = pre if sizes is None else pre * sizes
        if best is not None:
            best.add(pre, scores)
        elif rule.name == "topk":
            found.append(top_codes(pre, scores, int(rule.k or 0)))
        elif rule.name == "jumprelu":
            found.append(entries(pre, pre > tensors["threshold"] - bandwidth / 2))
        else:
            found.append(entries(pre, pre > 0))
    revived = Codes.joined(aux) if aux else None
    if best is None:
        return Selected(Codes.joined(found), revived, None)
    if best.missed:
        again = select(layout, tensors, u, sizes, bandwidth, batch)
        return Selected(again.codes, revived, again.cut)
    codes, smallest = best.codes(len(u), layout.latents)
    return Selected(codes, revived, smallest)


class _Best:
    """The largest scores of a batch that comes in blocks."""

    def __init__(self, number: int, bound: float, batch: Batch) -> None:
        self.number, self.bound, self._guessed, self._start, self._batch = number, max(bound, 0.0), bound > 0, 0, batch
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []  # scores, place in the batch, pre-activations

    def add(self, pre: Tensor, scores: Tensor) -> None:
        """Look at a block."""
        rows, latents = (scores > self.bound).nonzero(as_tuple=True)
        self._held.append((scores[rows, latents], (rows + self._start) * pre.shape[1] + latents, pre[rows, latents]))
        self._start += len(pre)
        if sum(len(each[0]) for each in self._held) > 2 * self.number:
            self._cut()

    def _cut(self) -> None:
        scores, places, values = (torch.cat([each[part] for each in self._held]) for part in range(3))
        if len(scores) > self.number:
            top = scores.topk(self.number, sorted=False).indices
            scores, places, values = scores[top], places[top], values[top]
            self.bound = float(scores.min())
        self._held = [(scores, places, values)]

    @property
    def missed(self) -> bool:
        """Whether the guess was too high: fewer are above it than may be kept."""
        if not self._guessed:
            return False
        held = torch.tensor(sum(len(each[0]) for each in self._held), device=self._held[0][0].device)
        return int(self._batch.summed(held)) < self.number

    def codes(self, tokens: int, width: int) -> tuple[Codes, float]:
        """Return the entries, and the smallest score among them."""
        self._cut()
        scores, places, values = self._held[0]
        smallest = float(scores.min()) if len(scores) else 0.0
        if self._batch.shared:
            every = torch.cat(self._batch.parts(scores))
            smallest = float(every.topk(min(self.number, len(every))).values.min()) if len(every) else 0.0
            own = scores >= smallest
            scores, places, values = scores[own], places[own], values[own]
        order = places.argsort()
        places = places[order]
        return Codes.of(places // width, places % width, values[order], tokens, width), smallest
