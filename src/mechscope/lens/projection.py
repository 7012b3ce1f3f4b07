"""From rows that the unembedding reads to statistics over the vocabulary: top tokens, ranks, entropies, divergences.

Only a block of logits is ever held, and its statistics are taken while slices of it are in the processor's cache. Three things make it cost little more
than the unembedding. One sweep finds the k largest logits (`token_stats`). KL(final ‖ lens) = ⟨x_final − x_lens, Σ_v p_final(v) W_U[v]⟩ +
logsumexp_lens − logsumexp_final needs the final distribution only through its mean unembedding, a vector per row (idea 2 of the design). And the
derivative of that KL by x_lens is the difference of two such vectors, so training a lens (Belrose et al. 2023, "Eliciting Latent Predictions from
Transformers with the Tuned Lens") needs no graph over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.instrument.kernels import statistics_dtype
from mechscope.instrument.readout import Readout
from mechscope.lens.token_stats import GROUP, TokenStats, divergence, said_of, to_probabilities
from mechscope.subject import Subject

# bytes of logits held at once
_HELD = 64 * 2**20
# bytes of a slice that is swept several times: in a CPU's cache; a GPU wants few launches
_SWEPT = 8 * 2**20


@dataclass(frozen=True)
class Final:
    """The final distribution of some rows, as far as a divergence from it needs it.

    Attributes:
        rows: ``(rows, d_model)``: what the unembedding reads at the end of the model.
        normaliser: ``(rows)``: logsumexp of the logits.
        expected: ``(rows, d_model)``: Σ_v p(v) W_U[v]; None where logits are capped or of half precision, and p is made again when needed.
        bias: ``(rows)``: Σ_v p(v) b[v]; None without a bias, or without `expected`.
    """

    rows: Float[Tensor, "rows d_model"]
    normaliser: Float[Tensor, " rows"]
    expected: Float[Tensor, "rows d_model"] | None
    bias: Float[Tensor, " rows"] | None

    def at(self, chosen: Tensor | slice) -> Final:
        """Return some of the rows."""
        expected, bias = (None if value is None else value[chosen] for value in (self.expected, self.bias))
        return Final(self.rows[chosen], self.normaliser[chosen], expected, bias)


class Projection:
    """A model's unembedding, with its weights as they act now (an active adapter's change included).

    Attributes:
        subject: The model.
        readout: Its final norm and unembedding.
        vocabulary: Number of words.
    """

    def __init__(self, subject: Subject) -> None:
        """Take the readout apart.

        Raises:
            ModelError: It is none that is known here.
        """
        self.subject, self.readout = subject, Readout.of(subject)
        weight = self.readout.weight
        self.vocabulary = weight.shape[0]
        self._dtype = statistics_dtype(weight.dtype)
        # the digits of half precision are too few for a mean over the vocabulary
        self._linear = self.readout.softcap is None and weight.dtype == self._dtype

    def applied(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Return what the unembedding reads of a residual stream, by the model's own final norm."""
        norm = self.subject.anatomy.final_norm
        with self.subject.active():
            return hidden if norm is None else norm(hidden)

    def scale(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows 1"]:
        """Return the factor that the final norm gives a residual stream."""
        return self.readout.scale(hidden.to(self._dtype))

    def frozen(
        self, hidden: Float[Tensor, "*rows d_model"], scale: Float[Tensor, "*rows 1"], *, part: bool
    ) -> Float[Tensor, "*rows d_model"]:
        """Return what the unembedding reads when the final norm's scale is given; of a part of the residual stream, without the norm's shift."""
        rows, norm = self.readout.rows(hidden.to(self._dtype), scale.to(hidden.device)), self.readout.norm
        return rows - norm.shift if part and norm is not None and norm.shift is not None else rows

    @torch.no_grad()
    def read(
        self,
        rows: Float[Tensor, "rows d_model"],
        targets: Int[Tensor, " rows"] | None = None,
        *,
        k: int = 5,
        ranks: bool = False,
        entropy: bool = False,
        final: Final | None = None,
        part: bool = False,
    ) -> TokenStats:
        """Return the statistics of rows over the vocabulary.

        Args:
            rows: What the unembedding reads (`applied` or `frozen`).
            targets: A token per row, −1 for none, whose log-probability is wanted.
            k: How many of the likeliest tokens.
            ranks: Also give the targets' ranks.
            entropy: Also give entropies.
            final: Final distributions of the same rows, to also give KL(final ‖ lens).
            part: The rows are a part's share of the logits: no bias, no soft cap.

        Raises:
            SettingsError: There are fewer than k words, or ranks are requested without targets.
        """
        if not 1 <= k <= self.vocabulary:
            raise SettingsError(f"k={k} of the likeliest tokens: the model has {self.vocabulary:,} words, ask for 1 to {self.vocabulary:,}")
        if ranks and targets is None:
            raise SettingsError("ranks are of targets: give a target token per row")
        rows = rows.to(self.readout.weight.device)
        targets = None if targets is None else targets.to(rows.device)
        direct = None if final is None or self._linear else self._slices(final.rows)
        stats, normalisers = [], []
        scratch: Tensor | None = None
        for where, padded in self._slices(rows, part=part):
            scratch = torch.empty_like(padded) if scratch is None else scratch  # the first slice is the largest
            own = None if targets is None else targets[where]
            one, normaliser = said_of(padded, self.vocabulary, own, k=k, ranks=ranks, entropy=entropy, scratch=scratch)
            if direct is not None and final is not None:
                words = padded[:, : self.vocabulary]
                one = one._replace(kl=divergence(next(direct)[1][:, : self.vocabulary], final.normaliser[where], words, normaliser)[0])
            stats.append(one)
            normalisers.append(normaliser)
        together = TokenStats.joined(stats)
        if final is None or final.expected is None:
            return together
        return together._replace(kl=self._kl(rows, torch.cat(normalisers), final, final.expected, part=part))

    @torch.no_grad()
    def final(self, rows: Float[Tensor, "rows d_model"]) -> Final:
        """Take the final distribution of rows that the unembedding reads at the end of the model."""
        rows = rows.to(self.readout.weight.device)
        normalisers, expected, biases = [], [], []
        for _, logits in self._chunks(rows):
            for _, padded in self._finished(logits):
                normalisers.append(to_probabilities(padded[:, : self.vocabulary]))
            if self._linear:  # the slices are views, so the chunk holds probabilities now
                expected.append(self._weighted(logits))
                if self.readout.bias is not None:
                    biases.append(logits[:, : self.vocabulary] @ self.readout.bias)
        return Final(rows, torch.cat(normalisers), torch.cat(expected) if expected else None, torch.cat(biases) if biases else None)

    @torch.no_grad()
    def loss(self, rows: Float[Tensor, "rows d_model"], final: Final) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows d_model"]]:
        """Return KL(final ‖ lens) of every row (nats), and its derivative by the row: E_lens − E_final[W_U], times the family's factor."""
        rows = rows.to(self.readout.weight.device)
        divergences, gradients = [], []
        direct = None if self._linear else self._slices(final.rows)
        for chunk, logits in self._chunks(rows):
            for at, padded in self._finished(logits):
                words = padded[:, : self.vocabulary]
                if direct is None:
                    divergences.append(to_probabilities(words))
                    continue
                normaliser, where = words.logsumexp(-1), slice(chunk.start + at.start, chunk.start + at.stop)
                values, probabilities = divergence(next(direct)[1][:, : self.vocabulary], final.normaliser[where], words, normaliser)
                divergences.append(values)
                change = (words - normaliser[:, None]).exp() - probabilities
                if self.readout.softcap is not None:
                    change *= 1 - (words / self.readout.softcap).square()
                words[:] = change
                logits[at] = padded
            gradients.append(self._weighted(logits))
        gradient, kl = torch.cat(gradients), torch.cat(divergences)
        if final.expected is not None:  # so far they were the lens's own: its normalisers and mean unembeddings
            gradient, kl = gradient - final.expected, self._kl(rows, kl, final, final.expected, part=False)
        return kl, gradient * self.readout.multiplier

    def _kl(self, rows: Tensor, normaliser: Tensor, final: Final, expected: Tensor, *, part: bool) -> Float[Tensor, " rows"]:
        """Return KL(final ‖ lens) of uncapped logits; taking the difference of the rows first leaves an exact zero where they are equal."""
        apart = ((final.rows - rows) * expected).sum(-1)
        if part and final.bias is not None:
            apart = apart + final.bias
        return apart * self.readout.multiplier + (normaliser - final.normaliser)

    def _slices(self, rows: Float[Tensor, "rows d_model"], *, part: bool = False) -> Iterator[tuple[slice, Float[Tensor, "some padded"]]]:
        """Yield logits a few rows at a time, padded with −∞ to whole groups of words."""
        for chunk, logits in self._chunks(rows, part=part):
            for at, padded in self._finished(logits, part=part):
                yield slice(chunk.start + at.start, chunk.start + at.stop), padded

    def _chunks(self, rows: Float[Tensor, "rows d_model"], *, part: bool = False) -> Iterator[tuple[slice, Float[Tensor, "some padded"]]]:
        """Yield the plain maps' outputs, as many rows at a time as may be held; the memory is used again for the next."""
        weight, bias = self.readout.weight, None if part else self.readout.bias
        width = -(-self.vocabulary // GROUP) * GROUP
        most = max(1, min(len(rows), _HELD // (width * weight.element_size())))
        held = weight.new_full((most, width), -torch.inf)
        for start in range(0, len(rows), most):
            some = rows[start : start + most].to(weight.dtype)
            logits = held[: len(some)]
            words, padding = logits[:, : self.vocabulary], logits[:, self.vocabulary :]
            padding.fill_(-torch.inf)
            if bias is None:
                torch.mm(some, weight.T, out=words)
            else:
                torch.addmm(bias, some, weight.T, out=words)
            yield slice(start, start + len(some)), logits

    def _weighted(self, words: Float[Tensor, "rows padded"]) -> Float[Tensor, "rows d_model"]:
        """Return the sum of the unembeddings, weighted by what stands at each word."""
        # half-precision kernels (AMX) read past a row's end, and −∞ · 0 is no number
        words[:, self.vocabulary :] = 0.0
        return words[:, : self.vocabulary] @ self.readout.weight

    def _finished(
        self, logits: Float[Tensor, "rows padded"], *, part: bool = False
    ) -> Iterator[tuple[slice, Float[Tensor, "some padded"]]]:
        """Yield slices with the family's factor and soft cap applied, in place but for half precision."""
        at_once = len(logits) if logits.is_cuda else max(1, _SWEPT // (logits.shape[1] * logits.element_size()))
        for start in range(0, len(logits), at_once):
            some = logits[start : start + at_once]
            words = some[:, : self.vocabulary]
            if self.readout.multiplier != 1.0:
                words.mul_(self.readout.multiplier)
            if self.readout.softcap is not None and not part:
                words.div_(self.readout.softcap).tanh_().mul_(self.readout.softcap)
            yield slice(start, start + len(some)), some.to(self._dtype)
