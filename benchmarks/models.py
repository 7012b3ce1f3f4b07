"""The models and texts that everything is measured on.

The weights are random (speed does not depend on their values). They are drawn here, not by transformers, so that mechscope and its peers hold the same
ones whatever transformers their environments have, and wide enough that attention is far from uniform: a peer that did other work would give other
numbers. This module imports nothing of mechscope.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.shapes import Shape, Size

# right and wrong answer of every prompt pair
ANSWER, WRONG = 1, 2
# a dictionary: times as wide as the model, active latents of a token
WIDER, ACTIVE = 32, 32
# spread of the weights: queries times keys then vary by about ± 1.2
_SPREAD = 0.04


def make_model(shape: Shape, *, device: str = "cpu", noise: float = 0.0) -> GPT2LMHeadModel:
    """Make the model; with noise, its "tuned" version: the same weights, each moved by as much on average."""
    config = GPT2Config(
        n_positions=shape.positions,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        vocab_size=shape.vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        # no dropout, as in today's models: two trainers' losses can be compared
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    generator, moves = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.normal_(0.0, _SPREAD, generator=generator)
            if "ln_" in name and name.endswith("weight"):
                parameter.add_(1)
            if noise:
                parameter.add_(torch.randn(parameter.shape, generator=moves), alpha=noise)
    return model.eval().to(device)


def make_texts(shape: Shape, size: Size) -> tuple[Tensor, Tensor]:
    """Draw clean and corrupt texts, ``(text, token)`` ids each."""
    generator = torch.Generator().manual_seed(0)
    shapes = (size.texts, min(size.tokens, shape.positions))
    return torch.randint(shape.vocabulary, shapes, generator=generator), torch.randint(shape.vocabulary, shapes, generator=generator)


def half_of(senders: int, receivers: int) -> Tensor:
    """Draw which edges a circuit has, ``(sender, receiver)``: half of all."""
    return torch.rand(senders, receivers, generator=torch.Generator().manual_seed(0)) < 0.5


def logit_difference(logits: Tensor) -> Tensor:
    """Return right answer minus wrong answer at the last token, ``(text)``."""
    return logits[:, -1, ANSWER] - logits[:, -1, WRONG]


def make_dictionary(width: int, latents: int) -> Tensor:
    """Draw decoder rows of norm one, ``(latent, width)``, those with which mechscope starts; encoders are the same."""
    generator = torch.Generator().manual_seed(0)
    # mechscope draws its encoder first, which an autoencoder then takes from the decoder
    torch.randn(latents, width, generator=generator, dtype=torch.float64)
    rows = torch.randn(latents, width, generator=generator, dtype=torch.float64)
    return (rows / rows.norm(dim=1, keepdim=True)).float()


def make_rows(size: Size, width: int) -> Tensor:
    """Draw activations of mean squared norm one, ``(token, width)``."""
    return torch.randn(size.texts * size.tokens, width, generator=torch.Generator().manual_seed(0)) / width**0.5


@dataclass(frozen=True, eq=False, kw_only=True)
class RowsCase:
    """A batch of activations, and what is done with it.

    Attributes:
        rows: ``(token, width)``.
    """

    rows: Tensor
    texts: int = 1

    @property
    def tokens(self) -> int:
        """Rows of the batch."""
        return len(self.rows)

    @property
    def each(self) -> int:
        """The same: there is one batch."""
        return len(self.rows)

    def small(self) -> Self:
        """Return the same with a batch of a few rows."""
        return replace(self, rows=self.rows[:16])
