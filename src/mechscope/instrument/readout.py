"""From the last residual stream to logits, with its parts in the hand: final norm, unembedding, scaling, soft cap.

logits = cap(multiplier · (norm(x) W_Uᵀ + b)). Before the cap this is linear in x once the norm's scale is known, so what any part of the model wrote has a
logit of its own (with the scale frozen), and their sum is the model's. Families that shrink the residual stream before the unembedding have that map
folded into W_U.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.errors import ModelError
from mechscope.instrument.norms import Norm, recognised
from mechscope.subject.load import Subject


@dataclass(frozen=True)
class Readout:
    """How a model reads logits off its last residual stream, with the weights as they act now (an active adapter's change included).

    The final norm and the unembedding may lie on different devices: what tokens and logits are made of is on the unembedding's, the rest where it was given.

    Attributes:
        norm: The final norm; None where there is none.
        weight: ``(vocab, d_model)``: W_U, one row per token; what the model itself holds, without the norm's gain.
        bias: ``(vocab)`` or None.
        multiplier: The family's factor on the logits.
        softcap: Bound of soft-capped logits (Gemma 2); None for plain ones. All methods speak of logits before the cap.
    """

    norm: Norm | None
    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None
    multiplier: float
    softcap: float | None

    @classmethod
    def of(cls, subject: Subject) -> Readout:
        """Take a model's apart.

        Raises:
            ModelError: The final norm is none that is known here, the map before the unembedding has a bias, or weights are offloaded.
        """
        subject.require_in_memory("taking logits apart")
        anatomy = subject.anatomy
        weight, bias = subject.linear(anatomy.unembedding)
        if anatomy.projection_out is not None:
            narrow, own = subject.linear(anatomy.projection_out)
            if own is not None:
                raise ModelError(f"{subject.family} has a biased map before its unembedding: its logits are not taken apart here")
            weight = weight @ narrow
        norm = None
        if anatomy.final_norm is not None:
            with subject.active():
                norm = recognised(subject.family, anatomy.final_norm, weight[0])
        return cls(norm, weight, bias, anatomy.logit_multiplier, anatomy.logit_softcap)

    def scale(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows 1"]:
        """Return the factor that the final norm gives a residual stream; 1 without a norm."""
        if self.norm is None:
            return hidden.new_ones(*hidden.shape[:-1], 1)
        return self.norm.normalised(hidden)[1]

    def directions(self, tokens: Int[Tensor, "*some"]) -> Float[Tensor, "*some d_model"]:
        """Return what tokens' logits read from the residual stream: times the frozen scale and what is written, this is a logit contribution.

        The norm's gain and centring and the family's factor are in it: ⟨written, direction⟩ · scale.
        """
        rows = self.weight[tokens.to(self.weight.device)] * self.multiplier
        if self.norm is None:
            return rows
        rows = rows * self.norm.gain.to(rows.device)
        return rows - rows.mean(-1, keepdim=True) if self.norm.centred else rows

    def folded(self, written: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some d_model"]:
        """Return vectors whose product with `weight` is what vectors in the residual stream add to every token's logit, at a frozen scale of one.

        It is what `directions` gives, folded into a few vectors instead of into all tokens.
        """
        vectors = written * self.multiplier
        if self.norm is None:
            return vectors
        vectors = vectors - vectors.mean(-1, keepdim=True) if self.norm.centred else vectors
        return vectors * self.norm.gain.to(vectors)

    def constant(self, tokens: Int[Tensor, "*some"]) -> Float[Tensor, "*some"]:
        """Return the part of tokens' logits that nothing wrote: the unembedding's bias and the norm's shift."""
        tokens = tokens.to(self.weight.device)
        total = self.weight.new_zeros(tokens.shape)
        if self.norm is not None and self.norm.shift is not None:
            total = total + self.weight[tokens] @ self.norm.shift.to(self.weight.device)
        if self.bias is not None:
            total = total + self.bias[tokens]
        return total * self.multiplier

    def logits(self, hidden: Float[Tensor, "*rows d_model"], scale: Float[Tensor, "*rows 1"] | None = None) -> Float[Tensor, "*rows vocab"]:
        """Return logits before any soft cap.

        Args:
            hidden: Residual stream, or anything of that width.
            scale: The norm's factor, to freeze it at another residual stream's; by default that of `hidden`.
        """
        rows = self.rows(hidden, scale).to(self.weight.device)
        logits = torch.nn.functional.linear(rows, self.weight, self.bias)
        return logits if self.multiplier == 1.0 else logits * self.multiplier

    def rows(self, hidden: Float[Tensor, "*rows d_model"], scale: Float[Tensor, "*rows 1"] | None = None) -> Float[Tensor, "*rows d_model"]:
        """Return what the unembedding reads: the norm applied, with its own scale or a given one."""
        if self.norm is None:
            return hidden
        standard, own = self.norm.normalised(hidden)
        if scale is not None:
            standard = standard * (scale.to(own.device) / own)
        standard = standard * self.norm.gain.to(standard.device)
        return standard if self.norm.shift is None else standard + self.norm.shift.to(standard.device)

    def capped(self, logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
        """Apply the family's soft cap: what the model gives out."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap
