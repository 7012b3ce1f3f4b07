"""What a model does without what a probe reads: labels are erased where they are read, and the model runs on (Elazar et al. 2021, amnesic probing).

That a probe tells labels does not say that the model uses them. Erased by LEACE at one component, they are told there by no linear probe of the rows that were
learned from; what that changes of the model's next tokens stands beside what erasing as many random directions changes, and as many of labels that mean
nothing. All three are taken out in the same metric. Each text is run without what was learned from other texts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, Runs, check_fits, metric_of
from mechscope.data.splits import folds as dealt
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import CachedRun, Edit, Execution, intervene
from mechscope.instrument.edits import EditSite
from mechscope.probing.activations import Activations, Component, ProbeSite, components_of
from mechscope.probing.erasure import Eraser, erase_random, leace
from mechscope.probing.linear import chosen_penalties
from mechscope.probing.passes import TOKENS_PER_BATCH, Folded, co_moments, together
from mechscope.probing.tasks import CONTROL, LABELS, SHUFFLED, Task
from mechscope.stats.inference import draw_p, paired_difference
from mechscope.subject import Subject

RANDOM = "random directions"
MIN_DRAWS = 5
_METRICS = ("kl", "loss")


@contextlib.contextmanager
def erased(subject: Subject, component: str, eraser: Eraser, *, site: ProbeSite = "residual", at: int = 0) -> Iterator[None]:
    """Take directions out at a component, at every token, in every forward pass inside the context, `generate` included.

    Args:
        subject: The model.
        component: Where: a name of `components_of`.
        eraser: What is taken out.
        site: That the component is of.
        at: Which of the eraser's sites.

    Raises:
        SettingsError: The model has no such component, or it is of another width.
    """
    place = component_of(subject, site, component)[1]
    width = Activations(subject, site, "tokens").width
    if eraser.mean.shape[1] != width:
        raise SettingsError(f"the eraser takes directions out of {eraser.mean.shape[1]} numbers, {component} has {width}")
    with intervene(subject, _edit(place, site, _without(*(each[at] for each in (eraser.mean, eraser.out, eraser.into))))):
        yield


def component_of(subject: Subject, site: ProbeSite, name: str) -> tuple[int, Component]:
    """Return a component of a site and its number; `SettingsError` where the model has none of that name."""
    every = components_of(subject, site)
    for number, each in enumerate(every):
        if each.name == name:
            return number, each
    raise SettingsError(f"the model has no {name!r} among what is read: it has {every[0].name} to {every[-1].name}")


def erasing(
    subject: Subject,
    task: Task,
    component: str,
    *,
    site: ProbeSite = "residual",
    folds: int = 5,
    draws: int = 10,
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Measure what erasing labels at a component changes of the model's next tokens, beside controls.

    Args:
        subject: The model.
        task: What is erased. Of labels of texts every token is changed; of labels of tokens every token but the first, which is none of their rows.
        component: Where: `embed`, `resid3`, `a3`, `m3`, `a3.h5`.
        site: That the component is of.
        folds: Parts of the texts, each run without what was learned from the others.
        draws: How many times labels are shuffled, and random directions drawn.
        execution: Tokens of a batch (2,048 by default), seed, progress.

    Returns:
        One row per metric and what was erased: `component`, `layer`, `metric` (`kl` from the unchanged run's next-token distribution, `loss` of the text's
        tokens; nats per token), `erased` (`labels`, `shuffled labels`, `random directions`), `n` (texts), `draws`, `rank` (directions), `effect` (mean over
        texts of the metric less that of the unchanged run) with `effect_low`, `effect_high`, and of controls `less` (the labels' effect less theirs) with
        `less_low`, `less_high` (over texts) and `less_p` (of "the labels' effect is one more draw of these").

    Raises:
        DataError: A class is too rare, or texts do not fit the model.
        SettingsError: There is no such component, or there are too few draws.
    """
    number, place = component_of(subject, site, component)
    if draws < MIN_DRAWS:
        raise SettingsError(f"{draws} draws of what means nothing are too few to tell how far effects vary: at least {MIN_DRAWS}")
    task.check(folds)
    check_fits(subject, task.texts)
    texts = _all_told(task.texts)
    labelings = [own for kind, own in task.labelings(shuffles=draws, seed=execution.seed) if kind != CONTROL]
    strata = [0 if task.reading == "tokens" else int(own[0]) for own in task.labels]
    fold = dealt([pair.clean for pair in task.texts], folds, execution.seed, strata=strata, source=task.texts.source)
    moments = [each.at(number) for each in co_moments(Activations(subject, site, task.reading), Folded(task, labelings, fold), execution)]
    whole, of_folds = together(moments), []
    for each, judged in enumerate(moments):
        learned, chooses = whole.without(judged), moments[(each + 1) % folds]
        shrinkage = chosen_penalties(learned.without(chooses), chooses)[0]
        made = [leace(learned, labeling, shrinkage=shrinkage) for labeling in range(len(labelings))]
        seeds = (execution.seed * draws + draw for draw in range(draws))
        of_folds.append([*made, *(erase_random(learned, max(made[0].rank), shrinkage=shrinkage, seed=seed) for seed in seeds)])
    # (fold, unit, …); shuffled labels may have one direction fewer, where a class of theirs is missing
    mean, out, into = (
        torch.stack([torch.stack([_wide(getattr(eraser, name)[0], name, len(task.classes)) for eraser in every]) for every in of_folds])
        for name in ("mean", "out", "into")
    )

    def work(batch: PairBatch) -> dict[str, np.ndarray]:
        run = CachedRun(subject, batch.clean, batch.real, sites={_site(place, site)})
        own = torch.from_numpy(fold[list(batch.indices)]).to(mean.device)
        positions = batch.real & ~batch.positions(0) if task.reading == "tokens" else None
        units = [
            [_edit(place, site, _without(mean[own, unit], out[own, unit], into[own, unit]), positions)] for unit in range(mean.shape[1])
        ]
        found = {}
        for metric in _METRICS:
            runs = Runs(run, metric_of(metric, batch, run))
            found[metric] = runs.of(units) - runs.unchanged()
        return found

    per_text = PerText(texts)
    per_text.run(work, execution, tokens=TOKENS_PER_BATCH, label=f"erase at {component}")
    rank = max(of_folds[0][0].rank)
    rows = [row for metric in _METRICS for row in _rows(per_text[metric], metric, draws)]
    table = pd.DataFrame(rows).assign(component=component, layer=place.layer, n=len(task.texts), rank=rank)
    first = ["component", "layer", "metric", "erased", "n", "draws", "rank"]
    return table[[*first, *(name for name in table if name not in first)]]


def _all_told(texts: Pairs) -> Pairs:
    """Return texts all of whose tokens but the first are predicted."""
    for pair in texts:
        if len(pair.clean) < 2:
            raise DataError(f"text {pair.id!r} is one token, of which nothing is predicted: leave it out")
    return replace(texts, pairs=tuple(replace(pair, target=(1, len(pair.clean))) for pair in texts))


def _rows(effect: Float[np.ndarray, "unit text"], metric: str, draws: int) -> Iterator[dict[str, object]]:
    parts = {LABELS: effect[:1], SHUFFLED: effect[1 : 1 + draws], RANDOM: effect[1 + draws :]}
    nothing = np.zeros(effect.shape[1])
    for name, values in parts.items():
        mean, less = paired_difference(values.mean(0), nothing), paired_difference(effect[0], values.mean(0))
        control = name != LABELS
        yield {
            "metric": metric,
            "erased": name,
            "draws": len(values),
            "effect": float(mean.mean),
            "effect_low": float(mean.low),
            "effect_high": float(mean.high),
            "less": float(less.mean) if control else np.nan,
            "less_low": float(less.low) if control else np.nan,
            "less_high": float(less.high) if control else np.nan,
            "less_p": float(draw_p(effect[0].mean(), values.mean(1))) if control else np.nan,
        }


def _wide(value: Tensor, name: str, rank: int) -> Tensor:
    """Bring maps to one rank: directions that are not there are zeros."""
    if name == "mean":
        return value
    axis = value.dim() - (1 if name == "out" else 2)
    shape = list(value.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([value, value.new_zeros(shape)], dim=axis)


def _without(
    mean: Float[Tensor, "*row width"], out: Float[Tensor, "*row width rank"], into: Float[Tensor, "*row rank width"]
) -> Callable[[Tensor], Tensor]:
    """Return what takes directions out of values, the same of all rows of a batch or others of each."""

    def value(part: Tensor) -> Tensor:
        x = part.flatten(1, -2)
        wide = torch.promote_types(x.dtype, torch.float32)
        centre, away, along = (each.to(x.device, wide) for each in (mean, out, into))
        # (row, token, width), one row of the map for all or for each
        centred = x.to(wide) - (centre[None, None] if centre.dim() == 1 else centre[:, None])
        return (x.to(wide) - (centred @ along.transpose(-1, -2)) @ away.transpose(-1, -2)).to(part).view_as(part)

    return value


def _site(place: Component, site: ProbeSite) -> EditSite:
    if site == "head":
        return "z"
    return "embedding" if place.layer < 0 else site


def _edit(place: Component, site: ProbeSite, value: Callable[[Tensor], Tensor], positions: Tensor | None = None) -> Edit:
    heads = (int(place.name.rpartition("h")[2]),) if site == "head" else None
    return Edit(_site(place, site), max(place.layer, 0), value, heads=heads, positions=positions)
