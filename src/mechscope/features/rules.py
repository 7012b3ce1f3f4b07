"""Activation rules: which of a token's latents are active, and with what value.

    relu        f = max(pre, 0)                                          with an L1 penalty while training
    gated       f = 1[pre > 0] · max(e^r · (pre − b) + b', 0)            pre with the gate's bias b (Rajamanoharan et al. 2024, "Improving dictionary …")
    topk        the k largest of a token, then max(pre, 0)               (Gao et al. 2024)
    batchtopk   the k · tokens largest of a batch while training, those above one threshold ever after (Bussmann et al. 2024)
    jumprelu    f = pre · 1[pre > θ_j]                                   (Rajamanoharan et al. 2024, "Jumping ahead")

What is compared (by k, by the batch's threshold) is the pre-activation, or with `by_norm` the pre-activation times the decoder's norm, so that a latent's
scale, which encoder and decoder can exchange, does not decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.choices import RuleName
from mechscope.errors import SettingsError
from mechscope.features.codes import Codes

# which tensors a rule has besides encoder and decoder
RULE_TENSORS: dict[RuleName, tuple[str, ...]] = {
    "relu": (),
    "gated": ("magnitude_log", "magnitude_bias"),
    "topk": (),
    "batchtopk": ("threshold",),
    "jumprelu": ("threshold",),
}


@dataclass(frozen=True)
class Rule:
    """An activation rule.

    Attributes:
        name: Which.
        k: Active latents of a token (`topk`), on average (`batchtopk`).
        by_norm: Whether pre-activations are compared after multiplication with the decoder's norm.
    """

    name: RuleName
    k: int | None = None
    by_norm: bool = False

    def __post_init__(self) -> None:
        if self.name not in RULE_TENSORS:
            raise SettingsError(f"rule {self.name!r} is not known: the rules are {', '.join(RULE_TENSORS)}")
        if (self.name in ("topk", "batchtopk")) != (self.k is not None) or (self.k is not None and self.k < 1):
            raise SettingsError(f"rule {self.name} with k={self.k}: topk and batchtopk need k of at least 1, the others have none")
        if self.by_norm and self.name not in ("topk", "batchtopk"):
            raise SettingsError(f"rule {self.name} compares no latents with each other, so norms cannot decide: leave by_norm out")

    def codes(self, pre: Float[Tensor, "token latent"], tensors: Mapping[str, Tensor], sizes: Float[Tensor, " latent"] | None) -> Codes:
        """Return the active latents of some tokens and their values, as they are ever after training.

        Args:
            pre: Pre-activations, biases included.
            tensors: The rule's own: `threshold`, `magnitude_log`, `magnitude_bias`.
            sizes: Norms of the decoder, for `by_norm`.
        """
        match self.name:
            case "topk":
                return top_codes(pre, pre if sizes is None else pre * sizes, int(self.k or 0))
            case "batchtopk":
                scores = pre if sizes is None else pre * sizes
                return entries(pre, (scores > tensors["threshold"]) & (pre > 0))
            case "jumprelu":
                return entries(pre, pre > tensors["threshold"])
            case "gated":
                open_gates = entries(pre, pre > 0)
                values = magnitudes(open_gates, tensors)
                keep = values > 0
                return Codes.of(open_gates.rows[keep], open_gates.latents[keep], values[keep], *pre.shape)
        return entries(pre, pre > 0)


def entries(pre: Float[Tensor, "token latent"], where: Tensor) -> Codes:
    """Return the marked pre-activations."""
    rows, latents = where.nonzero(as_tuple=True)
    return Codes.of(rows, latents, pre[rows, latents], *pre.shape)


def top_codes(pre: Float[Tensor, "token latent"], scores: Float[Tensor, "token latent"], k: int, *, signed: bool = False) -> Codes:
    """Return each token's k largest by score; those that are not positive only if `signed`."""
    latents = scores.topk(k, dim=1, sorted=False).indices
    values = pre.gather(1, latents)
    keep = values > 0
    if signed or bool(keep.all()):
        # as nearly always: nothing is to be left out, and every token has as many
        offsets = torch.arange(0, values.numel() + 1, max(k, 1), device=pre.device)
        return Codes(latents.flatten(), values.flatten(), offsets, pre.shape[1])
    rows = torch.arange(len(pre), device=pre.device)[:, None].expand_as(latents)
    return Codes.of(rows[keep], latents[keep], values[keep], *pre.shape)


def magnitudes(gates: Codes, tensors: Mapping[str, Tensor]) -> Float[Tensor, " entry"]:
    """Return what gated latents say where their gates are open: max(e^r · (pre − b) + b', 0)."""
    at = gates.latents
    plain = gates.values - tensors["encoder_bias"][at]
    return torch.relu(tensors["magnitude_log"][at].exp() * plain + tensors["magnitude_bias"][at])
