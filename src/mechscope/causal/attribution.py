"""Attribution patching: what patching every place would do, to first order, from one forward and one backward pass.

    effect(place) ≈ Σ (source value − value) · ∂metric/∂value, over the place's tokens and features        (Nanda 2023)

The gradient is that of the run which would be changed. AtP* (Kramár et al. 2024) mends its two known failures:

    softmax     a saturated softmax has no gradient: for queries and keys, attention is computed again with the patched ones, and only what lies
                behind z is linearised
    grad_drop   effects of opposite sign through different layers cancel: the gradient is taken once per layer with that layer left out, and the
                absolute values are averaged
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats as distributions
from torch import Tensor

from mechscope.causal.effects import Effects, effects, place_columns
from mechscope.causal.patching import Direction, Positions, position_labels, position_masks
from mechscope.causal.places import LATENT, LatentPlace, Place, chosen_places, edits_of
from mechscope.causal.sources import source_named
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, Runs, check_fits, differentiable_score, metric_of
from mechscope.errors import SettingsError
from mechscope.features import Standing
from mechscope.instrument import AttentionCall, CachedRun, Gradients, Reading, attend, gradients
from mechscope.instrument.edits import HEAD_SITES
from mechscope.instrument.execution import Execution
from mechscope.subject import Components, Subject
from mechscope.subject.placement import sent


def attribution_patch(
    subject: Subject,
    pairs: Pairs,
    *,
    site: str = "head",
    direction: Direction = "denoise",
    metric: str = "logit-diff",
    positions: Positions = "all",
    components: Components | str | None = None,
    softmax: bool = False,
    grad_drop: bool = False,
    check: int = 0,
    standing: Sequence[Standing] = (),
    execution: Execution = Execution(),
) -> Effects:
    """Estimate the effect of patching every place of a site.

    Args:
        subject: The model.
        pairs: Clean and corrupt prompts.
        site: `head` (z), `query`, `key`, `value`, `pattern`, `attention`, `mlp`, `neuron`, `residual`, `embedding`, or `latent` of dictionaries.
        direction: `denoise` or `noise`.
        metric: `logit-diff`, `probability` or `loss`; the gradient of `kl` is zero in the clean run, so there it needs `denoise`.
        positions: Tokens that are patched: `all`, `last`, `changed`, a segment's name, a position or several; `each` makes one row per
            position, a list of names one row per name.
        components: Only these.
        softmax: For sites `query` and `key`: compute attention again instead of linearising the softmax.
        grad_drop: Average absolute effects over backward passes that each leave out one layer; effects are then not signed.
        check: Also patch this many places exactly, drawn at random.
        standing: Dictionaries whose latents are meant.
        execution: Tokens of a batch (2,048 by default), seed (of the places to check), progress.

    Returns:
        One row per place and set of positions. With `check`, a column `exact` (NaN where not measured) and the notes `correlation` (Pearson),
        `rank_correlation` (Spearman) and `mean_absolute_error` over the checked places.

    Raises:
        MechscopeError: Pairs, positions, components or options do not fit the model or each other.
    """
    where = chosen_places(subject.anatomy, site, components, standing)
    if where[0].site == "expert_output":
        raise SettingsError(
            "single experts are patched exactly, not estimated: which of them a token is sent to has no gradient; use method exact"
        )
    if softmax and where[0].site not in ("query", "key"):
        raise SettingsError(f"softmax is computed again for sites query and key, not for {where[0].kind!r}: leave softmax out")
    sites = list(dict.fromkeys(place.site for place in where))
    if direction not in ("denoise", "noise"):
        raise SettingsError(f"direction {direction!r} is not known: use denoise (clean into corrupt) or noise (corrupt into clean)")
    if metric == "kl" and direction == "noise":
        raise SettingsError("metric 'kl' has no gradient in the clean run, where it is smallest: use direction denoise, or exact patching")
    if grad_drop and subject.anatomy.n_layers < 2:
        raise SettingsError("grad_drop leaves out one layer at a time, and this model has only one: leave grad_drop out")
    check_fits(subject, pairs)
    labels = position_labels(positions, pairs)
    gathered = PerText(pairs)
    checked = _drawn(len(where) * len(labels), check, execution.seed)
    given, changed = ("clean", "corrupt") if direction == "denoise" else ("corrupt", "clean")

    def estimated(batch: PairBatch) -> dict[str, np.ndarray]:
        recorded = set(sites) if checked else set()
        runs = {given: CachedRun(subject, getattr(batch, given), batch.real, sites=set(sites))}
        if metric == "kl" or checked:
            runs.setdefault("clean", CachedRun(subject, batch.clean, batch.real, sites=recorded))
        judged = metric_of(metric, batch, runs.get("clean", runs[given]))
        ids, real = getattr(batch, changed).to(subject.device), batch.real.to(subject.device)
        scored = partial(differentiable_score, subject, metric=judged)
        sets = list(position_masks(positions, batch, pairs))
        masks, reading = [mask for _, mask, _ in sets], Reading.of(judged.where)
        parts = []
        for at in sites:  # several only of latents, whose dictionaries stand at different ones
            backward = gradients(subject, ids, real, at, reading, scored, drop=grad_drop)
            own = [place for place in where if place.site == at]
            if site == LATENT:
                parts.append(
                    _of_latents(backward, runs[given], [place for place in own if isinstance(place, LatentPlace)], masks, batch.real)
                )
            else:
                parts.append(_estimates(backward, runs[given], own, masks, softmax=softmax))
        unchanged = backward.score.double().cpu().numpy()
        order = np.argsort(np.concatenate([[number for number, place in enumerate(where) if place.site == at] for at in sites]))
        estimate = np.concatenate([part.reshape(-1, len(sets), len(batch)) for part in parts])[order].reshape(-1, len(batch))
        values = estimate + unchanged
        values[np.stack([absent for _, _, absent in sets] * len(where))] = np.nan
        measured = {changed: unchanged, given: Runs(runs[given], judged).unchanged(), "estimate": values}
        if checked:
            value = source_named(given).bind(subject, batch, recorded, runs)
            base = runs[changed] if changed in runs else CachedRun(subject, getattr(batch, changed), batch.real, sites=recorded)
            changes = [(where[at // len(sets)], sets[at % len(sets)][1]) for at in checked]
            units = [edits_of((place,), value, mask) for place, mask in changes]
            whole = Runs(base, judged)  # its own unchanged run: the differentiated one may round differently
            exact = whole.of(units) - whole.unchanged()
            exact[np.stack([sets[at % len(sets)][2] for at in checked])] = np.nan  # no such position: nothing was patched
            measured["exact"] = exact
        return measured

    gathered.run(estimated, execution, tokens=2048, label=f"attributing {where[0].kind}")
    rows = [place_columns(place, label) for place in where for label in labels]
    estimate, unchanged, clean, corrupt = (gathered[name] for name in ("estimate", changed, "clean", "corrupt"))
    method = "attribution" + (" with softmax" if softmax else "") + (" with grad_drop" if grad_drop else "")
    notes: dict[str, Any] = {"direction": direction, "method": method}
    result = effects(rows, estimate, unchanged, metric=metric, clean=clean, corrupt=corrupt, **notes)
    return _with_exact(result, checked, gathered["exact"], absolute=grad_drop) if checked else result


def _drawn(n: int, check: int, seed: int) -> list[int]:
    if not check >= 0:
        raise SettingsError(f"check is {check}: give the number of places to patch exactly, or 0")
    return sorted(np.random.default_rng(seed).choice(n, min(check, n), replace=False).tolist()) if check else []


def _estimates(backward: Gradients, source: CachedRun, where: Sequence[Place], masks: Sequence[Tensor], *, softmax: bool) -> np.ndarray:
    """Return (place × set of positions, batch), places outermost."""
    site = where[0].site
    rows: dict[int, Tensor] = {}  # (mask, batch, component) by layer
    for layer in sorted({place.layer for place in where}):
        if softmax:
            rows[layer] = torch.stack([_by_softmax(backward, source, site, layer, mask) for mask in masks])
        else:
            parts = [_by_token(source, site, layer, backward.values[layer], one[layer]) for one in backward.gradients]
            pooled = torch.stack([_pooled(part, masks) for part in parts])
            rows[layer] = pooled[0] if len(parts) == 1 else _averaged(pooled, site)
    columns = [place.head if place.head is not None else place.feature or 0 for place in where]
    estimates = [rows[place.layer][:, :, column] for place, column in zip(where, columns, strict=True)]
    return torch.cat([one.to(estimates[0].device) for one in estimates]).double().cpu().numpy()


def _of_latents(backward: Gradients, source: CachedRun, where: Sequence[LatentPlace], masks: Sequence[Tensor], real: Tensor) -> np.ndarray:
    """Return (f' − f) · ⟨∂metric/∂x, D⟩ of latents of one site, pooled over tokens that their dictionaries are meant to read.

    Only active latents are held, token by token.
    """
    found: dict[Standing, Tensor] = {}  # (mask, batch, latent)
    for each in dict.fromkeys(place.standing for place in where):
        layer, site = each.place.layer, each.place.site
        value, given = (each.place.flat(x).to(each.decoders) for x in (backward.values[layer], source.recording[site, layer]))
        read = each.reads(real, value, given)
        weights = (sent(torch.stack(list(masks)), read.device) & read).flatten(1).to(each.decoders)
        counts = weights.any(0).view_as(read)[..., None]
        changes = [(sign, each.codes(torch.where(counts, x, 0.0))) for sign, x in ((1.0, given), (-1.0, value))]
        passes = []
        for one in backward.gradients:
            gradient = torch.where(counts, each.place.flat(one[layer]).to(each.decoders), 0.0)
            passes.append(each.attributions(changes, gradient, weights).dense())
        pooled = torch.stack(passes)
        found[each] = pooled[0] if len(pooled) == 1 else _averaged(pooled, site)
    chosen = [found[place.standing][:, :, place.latent] for place in where]
    return torch.cat([one.to(chosen[0].device) for one in chosen]).cpu().numpy()


def _by_token(source: CachedRun, site: str, layer: int, value: Tensor, gradient: Tensor) -> Tensor:
    """Return (source − value) · gradient, per text, token and component: ``(batch, token, component)``."""
    given = source.recording[site, layer].to(value.device)
    if site in HEAD_SITES and site != "pattern":
        given = given.repeat_interleave(value.shape[2] // given.shape[2], dim=2)
    product = (given - value) * gradient
    if site == "pattern":
        return product.sum(-1).transpose(1, 2)
    if site in HEAD_SITES:
        return product.sum(-1)
    return product if site == "neuron" else product.sum(-1, keepdim=True)


def _pooled(part: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Sum over each set of tokens: ``(mask, batch, component)``."""
    where = sent(torch.stack(list(masks)), part.device).to(part)
    # padding may hold anything; zero times infinity is not zero
    return torch.einsum("mbt,btc->mbc", where, torch.where(where.any(0)[..., None], part, 0.0))


def _averaged(pooled: Tensor, site: str) -> Tensor:
    """Average absolute values over the layers left out (Kramár et al. 2024, eq. 8).

    A place in a layer is zero when that layer is left out, so one pass does not count; the residual stream between layers is in none of them.
    """
    return pooled.abs().sum(0) / (len(pooled) - (site not in ("embedding", "residual")))


def _by_softmax(backward: Gradients, source: CachedRun, site: str, layer: int, mask: Tensor) -> Tensor:
    """Return (z with patched queries or keys − z) · ∂metric/∂z: ``(batch, head)``."""
    call: AttentionCall = backward.calls[layer]
    z, passes = backward.z[layer]
    own: Tensor = getattr(call, site)
    given = source.recording[site, layer].transpose(1, 2)
    given = given.repeat_interleave(call.query.shape[1] // given.shape[1], dim=1)
    own = own.repeat_interleave(call.query.shape[1] // own.shape[1], dim=1)
    mixed: dict[str, Any] = {site: torch.where(sent(mask, own.device)[:, None, :, None], given, own)}
    change = attend(replace(call, **mixed)) - z
    each = torch.stack([(change * gradient).sum((1, 3)) for gradient in passes])
    return each[0] if len(passes) == 1 else _averaged(each, site)


def _with_exact(result: Effects, checked: Sequence[int], exact: np.ndarray, *, absolute: bool) -> Effects:
    table = result.table.copy()
    table["exact"] = np.nan
    counted = ~np.isnan(exact)
    # as `effect`: over the texts that have the position
    means = np.where(counted.any(1), np.where(counted, exact, 0.0).sum(1) / np.maximum(counted.sum(1), 1), np.nan)
    table.loc[list(checked), "exact"] = means
    estimates, truth = table["effect"].to_numpy()[list(checked)], np.abs(means) if absolute else means
    measured = np.isfinite(estimates) & np.isfinite(truth)
    estimates, truth = estimates[measured], truth[measured]
    notes: dict[str, Any] = {"mean_absolute_error": float(np.abs(estimates - truth).mean())}
    if len(truth) > 2 and np.ptp(estimates) > 0 and np.ptp(truth) > 0:
        notes["correlation"] = float(distributions.pearsonr(estimates, truth)[0])
        notes["rank_correlation"] = float(distributions.spearmanr(estimates, truth)[0])
    return replace(result, table=table, notes={**result.notes, **notes})
