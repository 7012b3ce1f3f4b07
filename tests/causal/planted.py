"""A model of which it is known where its answer stands: in a plane of the last token's residual stream, among noise."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.instrument.walk import model_inputs
from mechscope.subject.load import Subject, load
from tests import families

CLASSES = 5
# token 3 + c is the answer of class c; tokens 8, 9, … carry class (token − 8) mod 5 and noise
FIRST = 3 + CLASSES


@lru_cache(maxsize=1)
def planted() -> tuple[Subject, Tensor]:
    """Build a model whose answer stands in a random plane of the last token's residual stream, among noise; return it and the plane's basis.

    Blocks write nothing, so the embedding reaches the unembedding through a norm without gains: all that the answer depends on is known.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(families.config("llama")).double().eval()
    basis = torch.linalg.qr(torch.randn(families.WIDTH, families.WIDTH, dtype=torch.float64)).Q
    angle = torch.arange(CLASSES, dtype=torch.float64) * 2 * torch.pi / CLASSES
    corners = torch.stack([angle.cos(), angle.sin()], dim=1)
    carriers = torch.arange(FIRST, families.VOCABULARY)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        features = torch.randn(families.VOCABULARY, families.WIDTH, dtype=torch.float64)
        features[carriers, :2] = 3 * corners[(carriers - FIRST) % CLASSES]
        model.model.embed_tokens.weight.copy_(features @ basis.T)
        model.lm_head.weight.zero_()
        model.lm_head.weight[3:FIRST] = 2 * corners @ basis[:, :2].T
    return load(model), basis[:, :2]


def planted_pairs(n: int, *, seed: int, lengths: tuple[int, ...] = (4,)) -> Pairs:
    """Return base and source texts whose last tokens are of different classes; the answer is the source's class."""
    random = np.random.default_rng(seed)
    pairs: list[PromptPair] = []
    while len(pairs) < n:
        length = lengths[len(pairs) % len(lengths)]
        base, source = (random.integers(FIRST, families.VOCABULARY, length).tolist() for _ in range(2))
        labels = [3 + (text[-1] - FIRST) % CLASSES for text in (base, source)]
        if labels[0] != labels[1]:
            pairs.append(PromptPair(f"pair {seed}.{len(pairs)}", tuple(base), tuple(source), (labels[1],), (labels[0],)))
    return Pairs(tuple(pairs), "planted")


TRAIN, TEST = planted_pairs(200, seed=1), planted_pairs(100, seed=2, lengths=(4, 6, 3))


def logits(subject: Subject, ids: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return subject.plain(**model_inputs(torch.tensor([ids]), None), use_cache=False).logits[0, -1]
