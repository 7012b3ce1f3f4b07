"""Attention statistics of one model, and of two in lock-step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from benchmarks.harness import Beside, Job
from benchmarks.jobs.cases import PairsCase, backbone, build, build_two, forward
from benchmarks.settings import FORWARD
from benchmarks.shapes import Size
from mechscope.instrument import AttentionCall, Walk, compare, describe, observed

# rows of logits held at once: 512 × 50,257 × 4 bytes are 98 MiB
_ROWS = 512
_SIZES = {"small": Size(1, 1024), "long": Size(1, 4096)}


@torch.no_grad()
def _entropy(case: PairsCase, model: Any) -> list[Tensor]:
    means: list[Tensor] = []

    def tap(call: AttentionCall) -> None:
        means.append(describe(call).entropy.mean(-1))

    with observed(case.subject, tap):
        model(case.ids, use_cache=False)
    return means


def entropy(case: PairsCase) -> list[Tensor]:
    """Take every head's mean entropy while the model runs, logits included."""
    return _entropy(case, case.subject.plain)


def entropy_backbone(case: PairsCase) -> list[Tensor]:
    """Take every head's mean entropy while the model runs up to the last residual stream."""
    return _entropy(case, case.subject.anatomy.backbone)


@torch.no_grad()
def both(case: PairsCase) -> tuple[tuple[Walk, Tensor], tuple[Walk, Tensor]]:
    """Take both models' entropies and their divergence in lock-step; return the walks and their last residual streams."""
    seen: dict[str, AttentionCall] = {}
    means = []
    with observed(case.subject, lambda call: seen.update(base=call)), observed(case.tuned, lambda call: seen.update(tuned=call)):
        walks = Walk(case.subject, case.ids), Walk(case.tuned, case.ids)
        one, two = walks[0].hidden, walks[1].hidden
        for layer in range(case.subject.anatomy.n_layers):
            one, two = walks[0].step(layer, one), walks[1].step(layer, two)
            found = compare(seen.pop("base"), seen.pop("tuned"))
            kept = (found.base.entropy, found.tuned.entropy, found.kl_base_tuned, found.kl_tuned_base)
            means.append([value.mean(-1) for value in kept])
    return (walks[0], one), (walks[1], two)


def both_backbones(case: PairsCase) -> None:
    """Run both models up to the last residual stream, unobserved."""
    for subject in (case.subject, case.tuned):
        backbone(PairsCase(subject, case.pairs))


@torch.no_grad()
def both_with_logits(case: PairsCase) -> None:
    """Take both models' entropies, their divergence, and the divergence of their next-token distributions a few rows at a time."""
    (first, one), (second, two) = both(case)
    total = 0.0
    for p_rows, q_rows in zip(one[0].split(_ROWS), two[0].split(_ROWS), strict=True):
        log_q = log_softmax(second.logits(q_rows), dim=-1)
        log_p = log_softmax(first.logits(p_rows), dim=-1)
        total += float(kl_div(log_q, log_p, reduction="sum", log_target=True))


def _per_head(means: list[Tensor]) -> np.ndarray:
    return torch.stack(means).flatten().cpu().numpy()


JOBS = (
    Job(
        name="entropy",
        what="entropy of all heads, with logits",
        build=build,
        run=entropy,
        sizes=_SIZES,
        forward=forward,
        numbers=_per_head,
        ratio=1.4,
        memory_ratio=1.3,
        seconds=45,
    ),
    Job(
        name="entropy_backbone",
        what="entropy of all heads, without logits",
        build=build,
        run=entropy_backbone,
        sizes=_SIZES,
        forward=forward,
        beside=Beside("passes without logits", backbone),
        numbers=_per_head,
        ratio=1.4,
        memory_ratio=1.3,
        seconds=50,
    ),
    Job(
        name="both",
        what="both models: entropies and KL",
        build=build_two,
        run=both,
        sizes=_SIZES,
        forward=forward,
        beside=Beside("two passes without logits", both_backbones),
        ratio=1.8,
        seconds=80,
    ),
    Job(
        name="both_with_logits",
        what="both models: entropies, KL, next-token KL",
        build=build_two,
        run=both_with_logits,
        sizes=_SIZES,
        forward=forward,
        beside=Beside(FORWARD, forward, 2),
        ratio=1.8,
        seconds=80,
    ),
)
