"""Tokens on the two sides of a head: as it reads them, and as the logits read what it writes.

What a token puts into the residual stream comes from the model's own embedding code (scaled in Gemma, mapped in some OPTs), its position taken off:
that is what the same code gives for an embedding of zeros. A head reads it through its layer's norm, each token at the scale it has when it stands
alone. What a head writes is read by the unembedding through the final norm's gain and centring; its scale depends on all else that was written and is left
out, so values are logits up to one positive factor per position. Logits are taken less their mean over the vocabulary: the softmax does not see a shift
of all, yet it would count in the copying score and in the ranking of a whole matrix (TransformerLens centres its unembedding for the same reason).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.errors import ModelError, SettingsError
from mechscope.instrument.norms import Norm
from mechscope.instrument.parts import mlp_of
from mechscope.instrument.readout import Readout
from mechscope.instrument.substitutes import stubbed
from mechscope.instrument.walk import Walk
from mechscope.instrument.wiring import Wiring
from mechscope.subject.load import Subject
from mechscope.weights.bilinear import Bilinear

Embedding = Literal["normalised", "raw"]

# tokens or rows of W_U worked on at once; of width 4,096 in float32 they are 64 MiB
_ROWS = 4096


class Vocabulary:
    """A model's tokens, projected through heads; it holds one copy of the embedding, on whose device all it returns is.

    Attributes:
        subject: The model.
        size: Number of tokens.
    """

    def __init__(self, subject: Subject, *, embedding: Embedding = "normalised", effective: bool = False) -> None:
        """Choose how tokens are read.

        Args:
            subject: The model.
            embedding: `"normalised"`: through the layer's attention norm at the token's own scale, biases and shifts included where they
                count (queries and keys). `"raw"`: the bare row times the weights with the norm's gain and centring folded in, no scale, no
                biases: the circuit as Elhage et al. (2021) write it.
            effective: Add what the first layer's MLP makes of a token to its embedding, for heads behind it (the "effective embedding" that is used for
                GPT-2, whose first MLP widens the embedding). Heads of layer 0 stand before that MLP and read the plain embedding.

        Raises:
            SettingsError: `embedding` is neither.
            ModelError: The embedding is not a sum of a token's and a position's part.
        """
        if embedding not in ("normalised", "raw"):
            raise SettingsError(f"embedding {embedding!r} is not known: use normalised or raw")
        self.subject, self.wiring, self._readout = subject, Wiring(subject), Readout.of(subject)
        self.size = len(self._readout.weight)
        self._normalised, self._effective = embedding == "normalised", effective
        self._cached: tuple[tuple[bool, float, bool] | None, Tensor] | None = None

    def rows(self, layer: int) -> Float[Tensor, "vocab d_model"]:
        """Return all tokens as a layer's heads read them, before gain and shift; float64 for models in float64, else float32."""
        norm = self.wiring.attention_norm(layer) if self._normalised else None
        key = (False if norm is None else norm.centred, 0.0 if norm is None else norm.eps, self._effective and layer > 0)
        if self._cached is None or self._cached[0] != key:
            self._cached = None  # before the next is made
            self._cached = key, _embedded(self.subject, norm, effective=key[2])
        return self._cached[1]

    def as_read(self, rows: Float[Tensor, "n d_model"], layer: int) -> Float[Tensor, "n d_model"]:
        """Return other rows as a layer's heads read them, before gain and shift."""
        return _normalised(rows.to(_working(rows.dtype)), self.wiring.attention_norm(layer) if self._normalised else None)

    def read(self, form: Bilinear, layer: int, *, side: Literal["left", "right"] = "left") -> Float[Tensor, "vocab rank"]:
        """Return one side of a form for every token that is read; its constant is part of it unless tokens are read raw."""
        return self.through(self.rows(layer), form, side=side)

    def through(self, rows: Float[Tensor, "n d_model"], form: Bilinear, *, side: Literal["left", "right"]) -> Float[Tensor, "n rank"]:
        """Return one side of a form for rows of any kind, read as this vocabulary reads tokens."""
        weight, constant = (form.left, form.left_constant) if side == "left" else (form.right, form.right_constant)
        projected = rows @ weight.T.to(rows)
        return projected if constant is None or not self._normalised else projected + constant.to(projected)

    def written(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "vocab n"]:
        """Return what vectors in the residual stream add to every token's logit, less the mean over the vocabulary, at a final norm's scale of one."""
        weight = self._readout.weight
        kind = _working(weight.dtype)
        across = self._readout.folded(vectors).T.to(weight.device, kind)
        logits = torch.cat([rows.to(kind) @ across for rows in weight.split(_ROWS)])
        return logits.sub_(logits.mean(0)).to(self.subject.device)

    def checked(self, tokens: Sequence[int], what: str) -> list[int]:
        """Return token ids as they are.

        Raises:
            SettingsError: There is none, or one lies outside the vocabulary.
        """
        ids = [int(token) for token in tokens]
        if not ids or min(ids) < 0 or max(ids) >= self.size:
            outside = [token for token in ids if not 0 <= token < self.size]
            raise SettingsError(f"{what} {outside or 'is empty'}: give token ids from 0 to {self.size - 1:,}")
        return ids


@torch.no_grad()
def position_rows(subject: Subject) -> Float[Tensor, "position d_model"] | None:
    """Return what every position adds to the residual stream; None for models whose embedding knows no positions (rotary families)."""
    longest = subject.anatomy.max_positions
    return _position_rows(subject, longest) if _position_rows(subject, min(2, longest)).any() else None


def _normalised(rows: Float[Tensor, "n d_model"], norm: Norm | None) -> Float[Tensor, "n d_model"]:
    return rows if norm is None else norm.normalised(rows)[0]


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def _embedded(subject: Subject, norm: Norm | None, *, effective: bool) -> Float[Tensor, "vocab d_model"]:
    size, kind = subject.anatomy.vocab_size, _working(subject.dtype)
    start = _position_rows(subject, 1)[0]
    _require_sum(subject)
    embedded = torch.empty(size, subject.anatomy.d_model, dtype=kind, device=subject.device)
    for ids in torch.arange(size).split(_ROWS):
        walk = Walk(subject, ids[:, None])
        rows = walk.hidden - start
        if effective:
            rows = rows + mlp_of(walk, 0, rows).to(rows.device)
        embedded[ids.to(embedded.device)] = _normalised(rows[:, 0].to(embedded), norm)
    return embedded


def _position_rows(subject: Subject, length: int) -> Float[Tensor, "position d_model"]:
    return _streams(subject, torch.full((1, length), subject.anatomy.vocab_size - 1), 0.0)[0]


def _streams(subject: Subject, ids: Int[Tensor, "batch token"], factor: float) -> Float[Tensor, "batch token d_model"]:
    """Return the residual stream before the first block with the tokens' embeddings multiplied."""
    ids = ids.to(subject.device)
    with subject.active():
        given = factor * subject.anatomy.embedding(ids)
    with stubbed(subject.anatomy.embedding, given):
        return Walk(subject, ids).hidden


def _require_sum(subject: Subject) -> None:
    """See that the residual stream is linear in a token's embedding, and what is added to it the same for all tokens."""
    size, length = subject.anatomy.vocab_size, min(2, subject.anatomy.max_positions)
    ids = torch.tensor([[size - 1] * length, [size // 2] * length])
    none, once, twice = (_streams(subject, ids, factor) for factor in (0.0, 1.0, 2.0))
    doubled, expected = (twice - none)[:, -1], 2 * (once - none)[:, 0]
    tolerance = 1e-2 if doubled.element_size() == 2 else 1e-4
    if not torch.allclose(doubled, expected, rtol=tolerance, atol=tolerance * float(once.abs().max())):
        raise ModelError(
            f"{subject.family} does not add a token's and a position's embedding (a norm stands behind them): "
            "its tokens are not projected through heads here"
        )
