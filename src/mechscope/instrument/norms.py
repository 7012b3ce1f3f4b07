"""LayerNorm and RMS norm by one formula, with its derivative: what stands between the residual stream and its readers.

Which of the two a module is, what is added under the root, and whether its gain is the weight or the weight plus one (Gemma) is seen from what the
module does with random rows, not from its name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechscope.errors import ModelError
from mechscope.subject.linear import acting
from mechscope.subject.placement import fetched

# what is added to the mean square, of norms that do not say it
_EPS = (1e-5, 1e-6, 1e-8, 1e-12)


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMS norm: y = gain ⊙ (x − centre) · scale(x) + shift.

    Attributes:
        module: The norm itself, no wrapper around it: what it says does not change when an adapter is switched off.
        centred: Whether the mean is taken off.
        eps: What is added to the mean square.
        offset: What is added to the weight to give the gain (1 in Gemma).
        ones: The gain of a norm that has no weight (NanoChat, OLMo).
    """

    module: nn.Module
    centred: bool
    eps: float
    offset: float
    ones: Float[Tensor, " d"]

    @property
    def gain(self) -> Float[Tensor, " d"]:
        """The factor of each dimension."""
        weight = getattr(self.module, "weight", None)
        if weight is None:
            return self.ones
        return weight.detach() + self.offset if self.offset else weight.detach()

    @property
    def shift(self) -> Float[Tensor, " d"] | None:
        """What is added at the end."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    def normalised(self, x: Float[Tensor, "*rows d"]) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows 1"]]:
        """Return x̂ = (x − centre) · scale, and the scale."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * scale, scale

    def pulled_back(self, x: Float[Tensor, "*rows d"], above: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Carry the gradient at the norm's output to its input: scale · (g − centre(g) − x̂ · mean(x̂ · g)) with g = gain ⊙ gradient."""
        standard, scale = self.normalised(x)
        g = above * self.gain.to(above.device)
        if self.centred:
            g = g - g.mean(-1, keepdim=True)
        return scale * (g - standard * (standard * g).mean(-1, keepdim=True))


def recognised(family: str, module: nn.Module, like: Tensor | None = None) -> Norm:
    """Find out which norm a module is, and check the formula on random rows; of one that an adapter trains whole, that which is on.

    Args:
        family: What errors call the model.
        module: The norm.
        like: Something of the width, type and device of what it reads: a norm without a weight does not say it.

    Raises:
        ModelError: It is neither a LayerNorm nor an RMS norm.
    """
    module = acting(module)
    named = [float(value) for name in ("eps", "variance_epsilon", "epsilon") if (value := getattr(module, name, None)) is not None]
    # a module whose weights are offloaded lets go of them when it has run, so what they should give comes first
    with fetched(module):
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim != 1:
            raise _unknown(family, module)
        like = weight if like is None else like
        if like is None:
            raise ModelError(f"{family}: {type(module).__name__} has no weight, so its width is not known: it cannot be taken apart")
        generator = torch.Generator().manual_seed(0)
        rows = (torch.randn(3, like.shape[-1], generator=generator) + 0.5).to(like if weight is None else weight)
        # of half precision the module rounds at every step, of what it gives the largest decides; RMS norms compute in float32 whatever the type
        tolerance = 2e-2 if rows.element_size() == 2 else 1e-5
        if not named:  # written into the code of its forward: seen on rows so small that it decides
            rows = rows * 1e-2
        ones = torch.ones(like.shape[-1], dtype=rows.dtype, device=rows.device)
        norms = [
            Norm(module, centred, eps, offset, ones)
            for eps in named[:1] or _EPS
            for centred in (True, False)
            for offset in ((0.0, 1.0) if weight is not None else (0.0,))
        ]
        all_expected = [norm.normalised(rows.double())[0] * norm.gain + (0.0 if norm.shift is None else norm.shift) for norm in norms]
    given = module(rows).double()
    for norm, expected in zip(norms, all_expected, strict=True):
        if torch.allclose(given, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max()))):
            return norm
    raise _unknown(family, module)


def _unknown(family: str, module: nn.Module) -> ModelError:
    return ModelError(f"{family}: {type(module).__name__} is neither a LayerNorm nor an RMS norm as known here: it cannot be taken apart")
