"""The slow way to the residual decomposition: Hugging Face with plain hooks, and parts taken away one at a time.

In float64 throughout: RMS norms, which transformers computes in float32, are given a float64 forward.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mechscope.data.pairs import Pairs, PromptPair
from mechscope.instrument import observed
from mechscope.lens.attribution import LogitAttribution, attribute_logits
from mechscope.subject.load import Subject, load
from tests import families

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def make_pairs(answers: bool = True, target: bool = True) -> Pairs:
    """Return three texts of different length, with answers of different number."""
    found = []
    for row, text in enumerate(families.documents()):
        ids = tuple(text.tolist())
        right, wrong = ((5, 6), (7, 8, 9)[: row + 1]) if answers else ((), ())
        span = (3, 5 + row) if target else None
        found.append(PromptPair(f"text {row}", ids, ids, right, wrong, span))
    return Pairs(tuple(found), "test")


def in_float64(model: Any) -> Any:
    """Let RMS norms, which transformers computes in float32, compute in float64."""

    def forward(offset: float, module: Any, x: Tensor) -> Tensor:
        eps = getattr(module, "eps", None) or module.variance_epsilon
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (module.weight + offset)

    offset = float(model.config.model_type.startswith("gemma"))
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(lambda module, x: forward(offset, module, x), module)
    return model


@lru_cache
def subject_of(family: str, **changes: Any) -> Subject:
    return load(in_float64(families.build(family, torch.float64, **changes)))


@lru_cache
def attributed(family: str, metric: str) -> LogitAttribution:
    return attribute_logits(subject_of(family), make_pairs(), metric=metric, neurons=(0, 2))


@torch.no_grad()
def run(subject: Subject, pair: PromptPair) -> Tensor:
    """Return Hugging Face's own logits; where scores are soft-capped its attention is float32 inside, so there the heads are mechscope's."""
    ids = torch.tensor([pair.clean])
    with observed(subject) if subject.family in families.SOFTCAPPED else nullcontext():
        return subject.plain(ids, attention_mask=torch.ones_like(ids)).logits[0]


def metric_by_hand(subject: Subject, pair: PromptPair, metric: str) -> float:
    return float(weighed(run(subject, pair), pair, metric))


def weighed(logits: Tensor, pair: PromptPair, metric: str) -> Tensor:
    """Return a text's metric from whole logits."""
    if metric == "logit-diff":
        return logits[-1, list(pair.answers)].mean() - logits[-1, list(pair.wrong_answers)].mean()
    if pair.target is None:
        return logits[-1, list(pair.answers)].mean() - logits[-1].mean()
    scored = [logits[at - 1, pair.clean[at]] - logits[at - 1].mean() for at in range(*pair.target)]
    return torch.stack(scored).mean()


class Slow:
    """One text, run by Hugging Face with plain hooks; parts are taken away from the last residual stream one at a time."""

    def __init__(self, subject: Subject, pair: PromptPair) -> None:
        self.subject, self.pair = subject, pair
        self.gemma = subject.family.startswith("gemma")
        self.seen: dict[Any, Any] = {}
        handles = [module.register_forward_hook(partial(self._hook, name)) for name, module in subject.plain.named_modules()]
        run(subject, pair)
        for handle in handles:
            handle.remove()
        self.names = {module: name for name, module in subject.plain.named_modules()}
        self.last = self.read(subject.anatomy.final_norm)

    def _hook(self, name: str, _: nn.Module, args: Any, output: Any) -> None:
        self.seen[name] = (args[0] if args else None, output[0] if isinstance(output, tuple) else output)

    def read(self, module: Any) -> Tensor:
        return self.seen[self.names[module]][0].reshape(len(self.pair.clean), -1)

    def wrote(self, module: Any) -> Tensor:
        return self.seen[self.names[module]][1].reshape(len(self.pair.clean), -1)

    def without(self, written: Tensor, metric: str) -> float:
        """Return how far the metric falls if something had not been written, the final norm's scale as it was."""
        return float(self.metric_of(self.last, metric) - self.metric_of(self.last - written, metric))

    def metric_of(self, x: Tensor, metric: str) -> Tensor:
        norm: Any = self.subject.anatomy.final_norm
        rows = []
        for now, before in zip(x, self.last, strict=True):
            if isinstance(norm, nn.LayerNorm):
                y = (now - now.mean()) / torch.sqrt(before.var(unbiased=False) + norm.eps) * norm.weight + norm.bias
            else:
                eps = getattr(norm, "eps", None) or norm.variance_epsilon
                gain = norm.weight + float(self.gemma)
                y = now / torch.sqrt(before.square().mean() + eps) * gain
            rows.append(self.subject.anatomy.unembedding(y))
        return weighed(torch.stack(rows), self.pair, metric)

    def behind(self, norm: Any, whole: Tensor, part: Tensor) -> Tensor:
        """Put part of what a norm reads through it, with the scale that the whole gives."""
        return part / torch.sqrt(whole.square().mean(-1, keepdim=True) + norm.eps) * (norm.weight + 1)

    def head(self, layer: int, head: int) -> Tensor:
        block = self.subject.anatomy.blocks[layer]
        z, kept = self.read(block.output.module), torch.zeros(block.output.width * self.subject.anatomy.n_heads, dtype=torch.bool)
        kept[head * block.output.width : (head + 1) * block.output.width] = True
        project = block.output.module
        part = project(z) - project(torch.where(kept, 0.0, z))
        return self.behind(block.attention_write, project(z), part) if self.gemma else part

    def neuron(self, layer: int, neuron: int) -> Tensor:
        block = self.subject.anatomy.blocks[layer]
        activations = self.read(block.mlp_down)
        silenced = activations.clone()
        silenced[:, neuron] = 0
        part = block.mlp_down(activations) - block.mlp_down(silenced)
        return self.behind(block.mlp_write, block.mlp_down(activations), part) if self.gemma else part
