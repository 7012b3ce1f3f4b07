"""The same jobs by nnsight, as its documentation does them: a trace around each pass."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Job
from benchmarks.models import logit_difference
from benchmarks.peers.cases import PeerCase, builder, forward, last_token, stacked
from benchmarks.shapes import HEAD_WIDTH, Size

BY = "nnsight"


def wrapped(model: Any) -> Any:
    """Wrap the model."""
    return importlib.import_module("nnsight").NNsight(model)


@torch.no_grad()
def recording(case: PeerCase) -> list[Tensor]:
    """Save every residual stream, z and MLP output in one trace."""
    nnsight, model = importlib.import_module("nnsight"), case.wrapped
    with model.trace(case.ids):
        found = nnsight.save([])
        for block in model.transformer.h:
            found.append(block.attn.c_proj.input)
            found.append(block.mlp.output)
            found.append(block.output)
    z, mlps, residual = (list(found[start::3]) for start in range(3))
    return [*residual, *z, *mlps]


@torch.no_grad()
def patch_heads(case: PeerCase) -> list[Tensor]:
    """Patch every head, clean into corrupt, a trace each."""
    nnsight, model = importlib.import_module("nnsight"), case.wrapped
    with model.trace(case.ids):
        clean = nnsight.save([])
        for block in model.transformer.h:
            clean.append(block.attn.c_proj.input)
    found = []
    for layer in case.layers:
        for head in case.heads:
            begin, end = head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH
            value = clean[layer][..., begin:end]
            with model.trace(case.corrupt):
                model.transformer.h[layer].attn.c_proj.input[..., begin:end] = value
                logits = model.lm_head.output.save()
            found.append(logit_difference(logits))
    return found


JOBS = (
    Job(
        name="recording",
        what="the same in one trace",
        build=builder(wrapped),
        run=recording,
        sizes={"small": Size(8, 64), "long": Size(1, 4096)},
        forward=forward,
        numbers=last_token,
        by=BY,
        package="nnsight",
        seconds=35,
    ),
    Job(
        name="patch_heads",
        what="the same, a trace each",
        build=builder(wrapped),
        run=patch_heads,
        sizes={"small": Size(8, 16), "long": Size(1, 1024)},
        forward=forward,
        numbers=stacked,
        by=BY,
        package="nnsight",
        rounds=1,
        slow=True,
        seconds=60,
    ),
)
