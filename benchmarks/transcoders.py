"""Transcoders for graphs: random ones, of which so many latents are active in a text. Nothing of mechscope is imported, so that peers use the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# active latents of all layers together, and latents of a layer for each unit of its width
ACTIVE, WIDER = 2000, 4
# tokens whose MLPs count as constants
FIRST = 1


@torch.no_grad()
def make_transcoders(model: Any, ids: Tensor) -> list[dict[str, Tensor]]:
    """Make a transcoder for every layer, with thresholds above which `ACTIVE` values of a text's tokens lie in all but the first.

    Args:
        model: A GPT-2 of Hugging Face.
        ids: The text, ``(1, token)``.
    """
    reads: list[Tensor] = []
    handles = [block.mlp.register_forward_pre_hook(lambda _, args: reads.append(args[0][0])) for block in model.transformer.h]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    generator, layers, made = torch.Generator().manual_seed(0), len(reads), []
    for layer, read in enumerate(reads):
        width = read.shape[1]
        encoder, decoder = (torch.randn(WIDER * width, width, generator=generator) / width**0.5 for _ in range(2))
        encoder, decoder = encoder.to(read), decoder.to(read)
        values = (read[FIRST:] @ encoder.T).flatten()
        count = min(ACTIVE * (layer + 1) // layers - ACTIVE * layer // layers, len(values) - 1)
        largest = values.topk(count + 1).values
        # between two values, so that rounding decides nothing
        threshold = ((largest[-1] + largest[-2]) / 2).expand(len(encoder)).contiguous()
        bias = torch.zeros(len(encoder)).to(read)
        made.append(
            {
                "encoder": encoder,
                "decoder": decoder,
                "encoder_bias": bias,
                "decoder_bias": torch.zeros(width).to(read),
                "threshold": threshold,
            }
        )
    return made
