"""Edges into targets: a direction that is read at one token, carried back through the frozen run, meets what was written on its way.

A block of targets of one layer goes back together, layer by layer: at each MLP its directions are multiplied with what latents, the error and constants add
there; then they go on through attention. Targets of a block stand in the order of their tokens, and what lies behind the last of them is never touched. Held
is ``(tokens, targets of a block, d_model)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.features.graphs.frozen import FrozenRun
from mechscope.features.graphs.replacement import Replacement, Written

# tokens times targets that go back together: a few hundred directions of a short prompt, 25 MB of width 768 in float32
TOKENS_PER_BLOCK = 8192


@dataclass(frozen=True)
class Rows:
    """Edges into some targets.

    Attributes:
        edges: ``(target, source)``: latents, then errors (layer after layer), then tokens.
        bias: ``(target)``: what constants on the way bring: biases, shifts of norms, decoders' biases, and the MLPs of the first tokens.
    """

    edges: Float[Tensor, "target source"]
    bias: Float[Tensor, " target"]


class Backward:
    """Carries directions back through one prompt."""

    def __init__(self, replacement: Replacement, *, tokens_per_block: int = TOKENS_PER_BLOCK) -> None:
        """Take a prompt's run with what stands for its MLPs."""
        self.replacement, self.run = replacement, replacement.run
        self._most = max(1, tokens_per_block // len(self.run.ids))
        self.sources = len(replacement) + (len(replacement.written) + 1) * len(self.run.ids)

    def blocks(self, latents: Int[Tensor, " chosen"]) -> Iterator[Int[Tensor, " block"]]:
        """Yield latents of one layer, in the order of their tokens, a block at a time."""
        for layer in self.replacement.layer[latents].unique().tolist():
            own = latents[self.replacement.layer[latents] == layer]
            own = own[self.replacement.position[own].argsort(stable=True)]
            yield from own.split(self._most)

    def latents(self, block: Int[Tensor, " block"]) -> Rows:
        """Return the edges into latents of one layer; with the bias, and `Replacement.constants`, they add up to their values."""
        given = self.replacement
        layer, positions = int(given.layer[block[0]]), given.position[block]
        above = self._at(given.encoders(block), positions)
        return self._back(self.run.through_mlp_norm(layer, above), layer)

    def logits(self, directions: Float[Tensor, "target d_model"]) -> Rows:
        """Return the edges into directions that are read from the last residual stream of the last token."""
        last = torch.full((len(directions),), len(self.run.ids) - 1, device=directions.device)
        parts = [self._back(self._at(some, last[: len(some)]), None) for some in directions.split(self._most)]
        return Rows(torch.cat([part.edges for part in parts]), torch.cat([part.bias for part in parts]))

    def _at(self, directions: Tensor, positions: Tensor) -> Float[Tensor, "token target d_model"]:
        above = directions.new_zeros(int(positions.max()) + 1, *directions.shape)
        above[positions, torch.arange(len(directions), device=positions.device)] = directions
        return above

    @torch.no_grad()
    def _back(self, above: Float[Tensor, "token target d_model"], layer: int | None) -> Rows:
        """Carry directions at what a layer's MLP reads, or at the last residual stream, to the embedding."""
        given, run = self.replacement, self.run
        tokens, targets = above.shape[:2]
        # the last column takes what empty slots bring
        edges, bias = above.new_zeros(targets, self.sources + 1), above.new_zeros(targets)
        layers = len(given.written)
        if layer is not None:
            layers = layer
            if not run.parallel:
                above = self._through_attention(above, above, layer, bias)
        for below in range(layers - 1, -1, -1):
            written = given.written[below]
            self._meet(written, below, above, edges, bias)
            middle = above
            if written.skip is not None:
                skipped = run.through_mlp_norm(below, above @ written.skip)
                skipped[: given.first] = 0.0
                middle = above + skipped
            above = self._through_attention(middle, above if run.parallel else middle, below, bias)
        edges[:, -1 - len(run.ids) : tokens - len(run.ids) - 1] = torch.einsum("tbd,td->bt", above, run.embedding[:tokens])
        return Rows(edges[:, :-1], bias)

    def _through_attention(self, middle: Tensor, above: Tensor, layer: int, bias: Tensor) -> Tensor:
        """Return directions at what a block reads, given those behind its attention (`middle`) and at what that adds (`above`)."""
        bias += torch.einsum("tbd,td->b", above, self.run.constant(layer)[: len(above)])
        return middle + self.run.through_attention(layer, above)

    def _meet(self, written: Written, layer: int, above: Tensor, edges: Tensor, bias: Tensor) -> None:
        """Add what a layer's MLP wrote in the directions of the targets."""
        tokens = len(above)
        along = torch.bmm(above, written.vectors[:tokens].transpose(1, 2))  # (token, target, slot)
        # an error has a column of its own, an empty slot the last one
        columns = written.latents[:tokens].where(written.latents[:tokens] >= 0, self.sources)
        columns[:, -1] = len(self.replacement) + layer * len(self.run.ids) + torch.arange(tokens, device=columns.device)
        edges.index_add_(1, columns.flatten(), along.permute(1, 0, 2).flatten(1))
        bias += torch.einsum("tbd,td->b", above, written.constant[:tokens])


def frozen_direction(run: FrozenRun, tokens: Int[Tensor, " token"]) -> tuple[Float[Tensor, "token d_model"], Float[Tensor, " token"]]:
    """Return what logits less their mean over the vocabulary read from the last residual stream, at the final norm's scale, and their constant part.

    A shift of all logits changes no probability, so it is taken out of every target. Logits are those before a soft cap (Gemma 2).
    """
    readout, norm = run.readout, run.readout.norm
    row = readout.weight.mean(0, dtype=run.dtype) * readout.multiplier
    common = row.new_zeros(()) if norm is None or norm.shift is None else row @ norm.shift.to(row)
    if readout.bias is not None:
        common = common + readout.bias.mean(dtype=run.dtype) * readout.multiplier
    if norm is not None:
        row = row * norm.gain.to(row)
        row = row - row.mean() if norm.centred else row
    directions = (readout.directions(tokens).to(run.dtype) - row).to(run.embedding)
    constant = (readout.constant(tokens).to(run.dtype) - common).to(run.embedding)
    return directions * readout.scale(run.last[None])[0].to(directions), constant
