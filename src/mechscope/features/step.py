"""One step of training: the loss of a batch and its gradients, written for sparse codes.

No autograd: the gradient of a squared error through a sparse code is known, and only entries that are active have one.

    G = 2 (v̂ − v) / tokens                      of the reconstruction
    ∂/∂f_tj = ⟨G_t, D_j⟩                        at active entries                          `Codes.inner`
    ∂/∂D_j  = Σ_t f_tj G_t                      over active entries                        `ByLatent.outer`
    ∂/∂pre  = ∂/∂f through the rule             penalties added before, thresholds beside
    ∂/∂E_j  = Σ_t (∂/∂pre_tj) u_t               over active entries                        `ByLatent.outer`

What the model makes of the reconstruction (`mechscope.features.end_to_end`) adds its own gradient to G, and all else follows.

What dead latents get from AuxK goes through the same products: their entries are put beside the active ones, with a gradient of their own, so that
nothing of size latents × width is held twice. Several ranks may each hold some of the batch's rows (`mechscope.features.shared_batch`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear

from mechscope import ranks
from mechscope.features.codes import ByLatent, Codes
from mechscope.features.dictionary import decoded, decoder_sizes
from mechscope.features.layout import Layout
from mechscope.features.objective import aux_latents
from mechscope.features.selection import select
from mechscope.features.shared_batch import Batch
from mechscope.features.through import Part, Tensors, inner, penalised, through, values_of
from mechscope.settings.features import Objective
from mechscope.shapes import by_shape

# given the reconstruction (token, written), a further loss and its gradient of it
Ahead = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Step:
    """What a batch gives.

    Attributes:
        loss: All terms together.
        reconstruction: Mean over tokens of the squared error; with prefixes of all latents together.
        gradients: Of the loss, by the names of the tensors.
        codes: Active latents and their values, of this rank's rows.
        active: ``(latent)``: by how many tokens of the whole batch each is used.
        cut: Smallest score that was kept (`batchtopk`), or None.
    """

    loss: float
    reconstruction: float
    gradients: dict[str, Tensor]
    codes: Codes
    active: Tensor
    cut: float | None

    __repr__ = by_shape


@torch.no_grad()
def step(
    layout: Layout,
    tensors: Tensors,
    u: Float[Tensor, "token read"],
    v: Float[Tensor, "token written"],
    objective: Objective,
    *,
    dead: Bool[Tensor, " latent"] | None = None,
    cut: float = 0.0,
    tokens: int | None = None,
    ahead: Ahead | None = None,
) -> Step:
    """Return a batch's loss and gradients.

    Args:
        layout: What the dictionary reads and writes.
        tensors: Its tensors.
        u: What it reads, in the units of the tensors.
        v: What it is to write.
        objective: The terms, checked.
        dead: Latents that AuxK revives; None for nobody.
        cut: `batchtopk`: a guess of the smallest score that will be kept, such as the last batch's; only the speed depends on it.
        tokens: Rows of the whole batch, where ranks hold some each; None where these are all.
        ahead: What the reconstruction leads to further on: given v̂, returns a loss and its gradient.
    """
    batch = Batch.of(len(u), tokens)
    sizes = decoder_sizes(layout, tensors) if objective.norms == "free" else None
    k = 0 if dead is None or not objective.aux_weight else aux_latents(objective, layout, int(dead.sum()))
    picked = select(layout, tensors, u, sizes if layout.rule.by_norm else None, objective.bandwidth, batch, dead=dead, aux_k=k, cut=cut)
    codes = picked.codes.with_values(values_of(layout, tensors, picked.codes))
    parts, error, reconstruction, all_prefixes = _reconstructed(layout, tensors, codes, u, v, objective, batch)
    beyond: Tensor | float = 0.0
    if ahead is not None:
        beyond, towards = ahead(error + v)
        # parts without prefixes share one gradient
        for gradient in {id(part.gradient): part.gradient for part in parts}.values():
            gradient += towards
    written = parts[0].gradient  # of what is added whole: bias and skip
    df = inner(layout, tensors, codes, parts)
    penalty, df, d_sizes = penalised(layout, picked.codes, codes, df, sizes, objective, batch)
    by_rule, more = through(layout, tensors, picked, codes, df, error, sizes, objective, batch)
    loss = objective.reconstruction * all_prefixes + beyond + penalty + more
    aux_gradient, aux_pre = None, None
    if picked.aux is not None and (len(picked.aux) or batch.shared):
        auxiliary, aux_gradient, aux_pre = _revival(layout, tensors, picked.aux, error, objective.aux_weight, batch)
        loss += auxiliary
    gradients = dict(by_rule.own)
    gradients |= _of_maps(layout, codes, picked.aux, parts, aux_gradient, by_rule.pre, aux_pre, u)
    if d_sizes is not None:
        _add_through_sizes(layout, tensors, gradients, d_sizes)
    gradients["encoder_bias"] = gradients.get("encoder_bias", 0) + codes.total(by_rule.pre)
    if aux_pre is not None and picked.aux is not None:
        gradients["encoder_bias"] += picked.aux.total(aux_pre)
    gradients["decoder_bias"] = written.sum(0)
    if layout.skip:
        gradients["skip"] = written.T @ u
    active = codes.values > 0
    if not bool(active.all()):
        codes = Codes.of(codes.rows[active], codes.latents[active], codes.values[active], len(u), layout.latents)
    if batch.shared:
        ranks.add_up(*gradients.values())
    losses = batch.summed(torch.stack([torch.as_tensor(each, dtype=u.dtype, device=u.device) for each in (loss, reconstruction)]))
    used = batch.summed(torch.bincount(codes.latents, minlength=layout.latents))
    return Step(float(losses[0]), float(losses[1]), gradients, codes, used, picked.cut)


def _reconstructed(
    layout: Layout, tensors: Tensors, codes: Codes, u: Tensor, v: Tensor, objective: Objective, batch: Batch
) -> tuple[list[Part], Tensor, Tensor, Tensor]:
    """Return the gradients of what latents write, the error v̂ − v of all together, its loss, and the mean loss over prefixes."""
    factor = 2 * objective.reconstruction / batch.tokens
    if not objective.prefixes:
        error = decoded(layout, tensors, codes)
        if layout.skip:
            error += linear(u, tensors["skip"])
        error -= v
        loss = error.square().sum() / batch.tokens
        gradient = error * factor
        return [Part(*span, number, gradient) for number, span in enumerate(layout.spans)], error, loss, loss
    ends = (0, *objective.prefixes)
    error = tensors["decoder_bias"] - v
    if layout.skip:
        error = error + linear(u, tensors["skip"])
    gradients, losses = [], []
    for start, stop in pairwise(ends):
        error = error + codes.between(start, stop)[0].decoded(tensors["decoder.0"][start:stop])
        losses.append(error.square().sum() / batch.tokens)
        gradients.append(error * (factor / len(objective.prefixes)))
    # a latent is part of its own prefix and of all longer ones
    for shorter in range(len(gradients) - 2, -1, -1):
        gradients[shorter] += gradients[shorter + 1]
    parts = [Part(start, stop, 0, each) for (start, stop), each in zip(pairwise(ends), gradients, strict=True)]
    return parts, error, losses[-1], torch.stack(losses).mean()


def _revival(layout: Layout, tensors: Tensors, aux: Codes, error: Tensor, weight: float, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return AuxK's loss, its gradient of what dead latents write, and that of their pre-activations."""
    left = -error
    mean = batch.summed(left.sum(0)) / batch.tokens
    variance = batch.summed((left - mean).square().sum()).clamp(min=torch.finfo(left.dtype).tiny)
    missed = decoded(layout, tensors, aux) - tensors["decoder_bias"] - left
    gradient = missed * (2 * weight / variance)
    parts = [Part(*span, number, gradient) for number, span in enumerate(layout.spans)]
    return weight * missed.square().sum() / variance, gradient, inner(layout, tensors, aux, parts)


def _of_maps(
    layout: Layout,
    codes: Codes,
    aux: Codes | None,
    parts: list[Part],
    aux_gradient: Tensor | None,
    pre: Tensor,
    aux_pre: Tensor | None,
    u: Tensor,
) -> dict[str, Tensor]:
    """Return the gradients of encoders and decoders."""
    found: dict[str, Tensor] = {}
    for part in parts:
        group, first = layout.groups[part.group], layout.spans[part.group][0]
        entries, at = codes.between(part.start, part.stop)
        columns = layout.written_columns(group)
        latents, values, rows, d_pre = entries.latents, entries.values, entries.rows, pre[at]
        table, read_rows = part.gradient[:, columns], rows
        if aux is not None and aux_gradient is not None and aux_pre is not None:
            dead, dead_at = aux.between(part.start, part.stop)
            latents, values = torch.cat([latents, dead.latents]), torch.cat([values, dead.values])
            d_pre = torch.cat([d_pre, aux_pre[dead_at]])
            read_rows = torch.cat([rows, dead.rows])
            # the second half of the table is what dead latents learn from
            rows = torch.cat([rows, dead.rows + codes.tokens])
            table = torch.cat([table, aux_gradient[:, columns]])
        by = ByLatent.of(latents, part.stop - part.start)
        made = {
            f"decoder.{part.group}": by.outer(rows, values, table.contiguous()),
            f"encoder.{part.group}": by.outer(read_rows, d_pre, u[:, layout.read_columns(group)].contiguous()),
        }
        for name, gradient in made.items():
            if (part.start, part.stop) == layout.spans[part.group]:
                found[name] = gradient
            else:
                whole = found.setdefault(name, gradient.new_empty(group.latents, gradient.shape[1]))
                whole[part.start - first : part.stop - first] = gradient
    return found


def _add_through_sizes(layout: Layout, tensors: Tensors, gradients: dict[str, Tensor], d_sizes: Tensor) -> None:
    """Add what decoders get through their norms: ∂‖D‖/∂D = D / ‖D‖ at every place."""
    for number, (group, (start, stop)) in enumerate(zip(layout.groups, layout.spans, strict=True)):
        widths = layout.output_widths[slice(*group.writes)]
        for gradient, rows in zip(
            gradients[f"decoder.{number}"].split(widths, dim=1), tensors[f"decoder.{number}"].split(widths, dim=1), strict=True
        ):
            length = torch.linalg.vector_norm(rows, dim=1).clamp(min=torch.finfo(rows.dtype).tiny)
            gradient.addcmul_(rows, (d_sizes[start:stop] / length)[:, None])
