"""What activation rules make of gradients: from those of values, at active entries, to those of pre-activations and of the rule's own tensors.

Penalties on values are added before the rule, thresholds and magnitudes get theirs beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mechscope.features.codes import Codes
from mechscope.features.dictionary import decoded
from mechscope.features.layout import Layout
from mechscope.features.rules import magnitudes
from mechscope.features.selection import Selected
from mechscope.features.shared_batch import Batch
from mechscope.settings.features import Objective

Tensors = Mapping[str, Tensor]


class Part(NamedTuple):
    """Neighbouring latents of one group, and the gradient of what they write."""

    start: int
    stop: int
    group: int
    gradient: Tensor


class Through(NamedTuple):
    """What the rule makes of gradients: of pre-activations at each entry, and of its own tensors."""

    pre: Tensor
    own: dict[str, Tensor]


def values_of(layout: Layout, tensors: Tensors, codes: Codes) -> Tensor:
    """Return f of entries that hold pre-activations."""
    match layout.rule.name:
        case "gated":
            return magnitudes(codes, tensors)
        case "jumprelu":
            # entries within the thresholds' window are held too, and may be below
            return codes.values * (codes.values > tensors["threshold"][codes.latents])
    return codes.values


def rows_of(layout: Layout, tensors: Tensors, part: Part) -> tuple[Tensor, Tensor]:
    """Return a part's gradient in the columns that it writes, and its decoder."""
    first = layout.spans[part.group][0]
    decoder = tensors[f"decoder.{part.group}"][part.start - first : part.stop - first]
    return part.gradient[:, layout.written_columns(layout.groups[part.group])], decoder


def inner(layout: Layout, tensors: Tensors, codes: Codes, parts: list[Part]) -> Tensor:
    """Return ⟨G_t, D_j⟩ of every entry."""
    found = torch.empty_like(codes.values)
    for part in parts:
        entries, at = codes.between(part.start, part.stop)
        found[at] = entries.inner(*rows_of(layout, tensors, part))
    return found


def penalised(
    layout: Layout, pre: Codes, codes: Codes, df: Tensor, sizes: Tensor | None, objective: Objective, batch: Batch
) -> tuple[Tensor | float, Tensor, Tensor | None]:
    """Return the penalty on values, the gradient of values with it, and that of the decoders' norms."""
    if not objective.sparsity or objective.penalty not in ("l1", "tanh"):
        return 0.0, df, None
    factor = objective.sparsity / batch.tokens
    if layout.rule.name == "gated":
        # what is penalised are gates, not values: `_through_gates` does it but for the norms
        return 0.0, df, None if sizes is None else pre.total(factor * pre.values)
    size = 1.0 if sizes is None else sizes[codes.latents]
    weighed = codes.values * size
    if objective.penalty == "l1":
        # entries are active, so the absolute value is the value
        slope, penalty = torch.full_like(weighed, factor), factor * weighed.sum()
    else:
        height = torch.tanh(objective.steepness * weighed)
        slope, penalty = factor * objective.steepness * (1 - height.square()), factor * height.sum()
    d_sizes = None if sizes is None else codes.total(slope * codes.values)
    return penalty, df + slope * size, d_sizes


def through(
    layout: Layout,
    tensors: Tensors,
    picked: Selected,
    codes: Codes,
    df: Tensor,
    error: Tensor,
    sizes: Tensor | None,
    objective: Objective,
    batch: Batch,
) -> tuple[Through, Tensor | float]:
    """Return what the rule makes of the gradient of values, and the loss terms that are the rule's own."""
    match layout.rule.name:
        case "gated":
            return _through_gates(layout, tensors, picked.codes, codes, df, error, sizes, objective, batch)
        case "jumprelu":
            return _through_jumps(tensors, picked.codes, df, objective, batch)
    return Through(df, {}), 0.0


def _through_jumps(tensors: Tensors, pre: Codes, df: Tensor, objective: Objective, batch: Batch) -> tuple[Through, Tensor | float]:
    threshold = tensors["threshold"][pre.latents]
    above = pre.values > threshold
    window = ((pre.values - threshold).abs() < objective.bandwidth / 2).to(df) / objective.bandwidth
    d_threshold = -threshold * window * df
    penalty: Tensor | float = 0.0
    active = batch.summed(above.sum().to(df)) / batch.tokens
    if objective.sparsity and objective.penalty == "l0":
        penalty = batch.once(objective.sparsity * active)
        d_threshold = d_threshold - window * objective.sparsity / batch.tokens
    if objective.sparsity and objective.penalty == "target":
        off = active / objective.target - 1
        penalty = batch.once(objective.sparsity * off.square())
        d_threshold = d_threshold - window * (objective.sparsity * 2 * off / objective.target / batch.tokens)
    return Through(df * above, {"threshold": pre.total(d_threshold)}), penalty


def _through_gates(
    layout: Layout,
    tensors: Tensors,
    gates: Codes,
    codes: Codes,
    df: Tensor,
    error: Tensor,
    sizes: Tensor | None,
    objective: Objective,
    batch: Batch,
) -> tuple[Through, Tensor]:
    """Magnitudes learn from the reconstruction; gates from the penalty and from reconstructing by themselves, with the decoder held fixed."""
    at, tokens = gates.latents, batch.tokens
    plain = gates.values - tensors["encoder_bias"][at]
    growth = tensors["magnitude_log"][at].exp()
    d_magnitude = df * (codes.values > 0)
    # v̂ of the gates is that of the magnitudes with other values
    by_gates = error + decoded(layout, tensors, gates.with_values(gates.values - codes.values)) - tensors["decoder_bias"]
    gradient = by_gates * (2 / tokens)
    d_gate = inner(layout, tensors, gates, [Part(*span, number, gradient) for number, span in enumerate(layout.spans)])
    weighed = gates.values * (1.0 if sizes is None else sizes[at])
    d_gate = d_gate + objective.sparsity / tokens * (1.0 if sizes is None else sizes[at])
    loss = by_gates.square().sum() / tokens + objective.sparsity / tokens * weighed.sum()
    own = {
        "magnitude_log": gates.total(d_magnitude * growth * plain),
        "magnitude_bias": gates.total(d_magnitude),
        # the gate's bias is no part of what magnitudes read: taken off what all entries will be given
        "encoder_bias": -gates.total(d_magnitude * growth),
    }
    return Through(d_gate + d_magnitude * growth, own), loss
