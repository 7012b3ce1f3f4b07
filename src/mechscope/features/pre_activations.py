"""What latents would be before their rule has chosen among them, u Eᵀ + b: of a block of tokens at a time, as all of it is too large to hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.features.layout import Layout

# held at once: 32 MiB in float32. Every block reads the whole encoder, so fewer are faster; much larger ones leave the processor's cache before the largest
# are chosen (measured at 768 × 24,576: 2^21 1.6, 2^22 1.4, 2^23 and 2^24 1.2 products with the encoder a step)
BLOCK = 2**23


def pre_activations(
    layout: Layout, tensors: Mapping[str, Tensor], u: Float[Tensor, "token read"]
) -> Iterator[Float[Tensor, "token latent"]]:
    """Yield the pre-activations of a block of tokens after another, in one piece of memory that the next block overwrites."""
    at_once = max(1, BLOCK // layout.latents)
    work = u.new_empty(min(at_once, len(u)), layout.latents)
    for start in range(0, max(len(u), 1), at_once):
        rows = u[start : start + at_once]
        pre = work[: len(rows)]
        for number, (group, (first, last)) in enumerate(zip(layout.groups, layout.spans, strict=True)):
            part = rows[:, layout.read_columns(group)]
            torch.addmm(tensors["encoder_bias"][first:last], part, tensors[f"encoder.{number}"].T, out=pre[:, first:last])
        yield pre
