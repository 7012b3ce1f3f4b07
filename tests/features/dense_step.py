"""The loss of a training step written down densely, for autograd: the oracle of `mechscope.features.step`, and of whole trainings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mechscope.features.layout import Layout
from mechscope.features.objective import aux_latents
from mechscope.settings.features import Objective
from tests.features import oracle


class Jump(torch.autograd.Function):
    """pre · 1[pre > θ] with the straight-through gradient of Rajamanoharan et al. (2024, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        pre, threshold = ctx.saved_tensors
        window = (((pre - threshold) / ctx.width).abs() < 0.5).to(pre.dtype)
        return gradient * (pre > threshold), (-threshold / ctx.width * window * gradient).sum(0), None


class Heaviside(torch.autograd.Function):
    """1[pre > θ] with the straight-through gradient of eq. 12."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        pre, threshold = ctx.saved_tensors
        window = (((pre - threshold) / ctx.width).abs() < 0.5).to(pre.dtype)
        return None, (-1 / ctx.width * window * gradient).sum(0), None


def whole(layout: Layout, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return all encoders or decoders as one matrix, differentiable, zero where a latent does not read or write."""
    rows = []
    for number, group in enumerate(layout.groups):
        widths, part = (layout.input_widths, group.reads) if name == "encoder" else (layout.output_widths, group.writes)
        before, after = sum(widths[: part[0]]), sum(widths[part[1] :])
        rows.append(torch.nn.functional.pad(tensors[f"{name}.{number}"], (before, after)))
    return torch.cat(rows)


def loss(
    layout: Layout, tensors: Mapping[str, Tensor], u: Tensor, v: Tensor, objective: Objective, dead: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch and its codes (token, latent)."""
    rule, tokens = layout.rule, len(u)
    encoder, decoder = whole(layout, tensors, "encoder"), whole(layout, tensors, "decoder")
    plain = u @ encoder.T
    pre = plain + tensors["encoder_bias"]
    sizes = torch.ones(layout.latents, dtype=u.dtype)
    if objective.norms == "free":
        sizes = sum(part.norm(dim=1) for part in decoder.split(layout.output_widths, dim=1))
    scores = (pre * sizes if rule.by_norm else pre).detach()
    penalty = torch.zeros((), dtype=u.dtype)
    match rule.name:
        case "relu":
            f = pre.clamp(min=0)
        case "topk":
            f = pre.clamp(min=0) * torch.zeros_like(pre).scatter(1, scores.topk(rule.k or 0).indices, 1.0)
        case "batchtopk":
            best = scores.flatten().topk((rule.k or 0) * tokens).indices
            f = pre.clamp(min=0) * torch.zeros_like(scores.flatten()).scatter(0, best, 1.0).view_as(pre)
        case "gated":
            gate = pre.clamp(min=0)
            f = (pre > 0) * (tensors["magnitude_log"].exp() * plain + tensors["magnitude_bias"]).clamp(min=0)
            penalty = objective.sparsity * (gate * sizes).sum() / tokens
            by_gates = gate @ decoder.detach() + tensors["decoder_bias"].detach()
            penalty = penalty + (v - by_gates - skipped(layout, tensors, u).detach()).square().sum() / tokens
        case _:
            f = Jump.apply(pre, tensors["threshold"], objective.bandwidth)
            active = Heaviside.apply(pre, tensors["threshold"], objective.bandwidth).sum() / tokens
            if objective.penalty == "l0":
                penalty = objective.sparsity * active
            if objective.penalty == "target":
                penalty = objective.sparsity * (active / objective.target - 1).square()
    if rule.name != "gated" and objective.penalty == "l1":
        penalty = objective.sparsity * (f * sizes).sum() / tokens
    if objective.penalty == "tanh":
        penalty = objective.sparsity * torch.tanh(objective.steepness * f * sizes).sum() / tokens
    errors = [
        v - f[:, :end] @ decoder[:end] - tensors["decoder_bias"] - skipped(layout, tensors, u)
        for end in objective.prefixes or (layout.latents,)
    ]
    total = torch.stack([error.square().sum() / tokens for error in errors]).mean() + penalty
    if dead is not None and dead.any() and objective.aux_weight:
        left = errors[-1].detach()
        own = pre[:, dead]
        best = own.topk(aux_latents(objective, layout, own.shape[1])).indices
        chosen = own * torch.zeros_like(own).scatter(1, best, 1.0)
        missed = (left - chosen @ decoder[dead]).square().sum()
        total = total + objective.aux_weight * missed / (left - left.mean(0)).square().sum()
    return total, f


def skipped(layout: Layout, tensors: Mapping[str, Tensor], u: Tensor) -> Tensor:
    """Return what the skip map adds."""
    return u @ tensors["skip"].T if layout.skip else torch.zeros((), dtype=u.dtype)


def random_tensors(layout: Layout, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return random tensors: decoders of different norms, biases and thresholds not zero."""
    return {name: tensor.to(dtype) for name, tensor in oracle.dictionary(layout, seed=seed).tensors.items()}
