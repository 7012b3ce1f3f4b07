"""Codes: what a dictionary says of tokens, as sparse values, and the products that are taken with them.

Token by token the active latents and their values lie side by side (compressed rows), because nothing of size tokens × latents may be held. Three
products are all that decoding and its gradients need; each is one operation of torch that is fast where others are not (features of 24,576 latents of
width 768, 2,048 tokens, 32 active, two cores: decoding by `embedding_bag` 16 ms against 492 ms dense):

    decoded   Σ_j f_tj D_j         for every token                embedding_bag over its latents
    inner     ⟨G_t, D_j⟩           for every active (t, j)        a sampled product
    outer     Σ_t w_tj X_t         for every latent               embedding_bag over its tokens
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from mechscope.shapes import by_shape


@dataclass(frozen=True)
class Codes:
    """The active latents of some tokens.

    Attributes:
        latents: ``(entry)``: which latent, token after token.
        values: ``(entry)``: its value.
        offsets: ``(token + 1)``: where each token's entries begin, and their number at the end.
        width: Number of latents there are.
    """

    latents: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]
    offsets: Int[Tensor, " token_and_one"]
    width: int

    __repr__ = by_shape

    @classmethod
    def of(
        cls, rows: Int[Tensor, " entry"], latents: Int[Tensor, " entry"], values: Float[Tensor, " entry"], tokens: int, width: int
    ) -> Codes:
        """Put entries together whose `rows` (tokens) are in order."""
        offsets = torch.zeros(tokens + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(torch.bincount(rows, minlength=tokens), 0, out=offsets[1:])
        return cls(latents, values, offsets, width)

    @classmethod
    def from_dense(cls, values: Float[Tensor, "token latent"]) -> Codes:
        """Take what is not zero of a matrix."""
        rows, latents = values.nonzero(as_tuple=True)
        return cls.of(rows, latents, values[rows, latents], *values.shape)

    @classmethod
    def joined(cls, parts: Sequence[Codes]) -> Codes:
        """Put the codes of consecutive tokens behind one another."""
        if len(parts) == 1:
            return parts[0]
        counts = torch.cat([part.counts for part in parts])
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        latents, values = (torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "values"))
        return cls(latents, values, offsets, parts[0].width)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.offsets) - 1

    def __len__(self) -> int:
        return len(self.latents)

    @cached_property
    def counts(self) -> Int[Tensor, " token"]:
        """Active latents of each token: its L0."""
        return self.offsets.diff()

    @cached_property
    def rows(self) -> Int[Tensor, " entry"]:
        """The token of each entry."""
        return torch.repeat_interleave(torch.arange(self.tokens, device=self.offsets.device), self.counts, output_size=len(self))

    def dense(self) -> Float[Tensor, "token latent"]:
        """Return the whole matrix: for few tokens, or few latents."""
        whole = self.values.new_zeros(self.tokens, self.width)
        whole[self.rows, self.latents] = self.values
        return whole

    def columns(self, latents: Int[Tensor, " chosen"]) -> Float[Tensor, "token chosen"]:
        """Return the values of some latents for all tokens, zero where they are silent."""
        place = torch.full((self.width,), -1, dtype=torch.int64, device=self.latents.device)
        place[latents] = torch.arange(len(latents), device=place.device)
        at = place[self.latents]
        whole = self.values.new_zeros(self.tokens, len(latents))
        whole[self.rows[at >= 0], at[at >= 0]] = self.values[at >= 0]
        return whole

    def between(self, start: int, stop: int) -> tuple[Codes, Tensor | slice]:
        """Return the entries of latents `start` to `stop`, counted from `start`, and an index of their places among all entries."""
        if (start, stop) == (0, self.width):
            return self, slice(None)
        at = ((self.latents >= start) & (self.latents < stop)).nonzero()[:, 0]
        part = Codes.of(self.rows[at], self.latents[at] - start, self.values[at], self.tokens, stop - start)
        return part, at

    def at(self, tokens: Bool[Tensor, " token"]) -> Codes:
        """Return the entries at some tokens; the others are left without any."""
        keep = tokens[self.rows]
        return Codes.of(self.rows[keep], self.latents[keep], self.values[keep], self.tokens, self.width)

    def with_values(self, values: Float[Tensor, " entry"]) -> Codes:
        """Return the same entries with other values."""
        return Codes(self.latents, values, self.offsets, self.width)

    def decoded(self, decoder: Float[Tensor, "latent d"]) -> Float[Tensor, "token d"]:
        """Return Σ_j f_tj D_j of every token."""
        return embedding_bag(self.latents, decoder, self.offsets, mode="sum", per_sample_weights=self.values, include_last_offset=True)

    def inner(self, left: Float[Tensor, "token d"], right: Float[Tensor, "latent d"]) -> Float[Tensor, " entry"]:
        """Return ⟨left_t, right_j⟩ of every entry."""
        if not len(self):
            return self.values
        with warnings.catch_warnings():
            # torch calls compressed rows a beta feature, once per process
            warnings.simplefilter("ignore", UserWarning)
            pattern = torch.sparse_csr_tensor(
                self.offsets, self.latents, torch.zeros_like(self.values), (self.tokens, self.width), check_invariants=False
            )
            return torch.sparse.sampled_addmm(pattern, left.contiguous(), right.T, beta=0.0).values()

    def total(self, weights: Float[Tensor, " entry"]) -> Float[Tensor, " latent"]:
        """Return Σ_t w_tj of every latent."""
        return weights.new_zeros(self.width).index_add_(0, self.latents, weights)


@dataclass(frozen=True)
class ByLatent:
    """Entries in the order of their latents: their places (`order`), and where each latent's begin (`offsets`)."""

    order: Int[Tensor, " entry"]
    offsets: Int[Tensor, " latent_and_one"]

    @classmethod
    def of(cls, latents: Int[Tensor, " entry"], width: int) -> ByLatent:
        """Sort entries by latent."""
        counts = torch.bincount(latents, minlength=width)
        # half as wide, half as long
        return cls(latents.int().argsort(stable=True), torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def outer(
        self, rows: Int[Tensor, " entry"], weights: Float[Tensor, " entry"], table: Float[Tensor, "row d"]
    ) -> Float[Tensor, "latent d"]:
        """Return Σ w · table[row] over each latent's entries."""
        return embedding_bag(
            rows[self.order], table, self.offsets, mode="sum", per_sample_weights=weights[self.order], include_last_offset=True
        )
