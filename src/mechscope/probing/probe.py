"""What can be read off a model's activations, component by component, beside controls; and whether fine-tuning made it more readable, or moved it.

Every text is judged by probes that were fitted to other texts. Beside the labels the same probes learn labels that mean nothing
(`mechscope.probing.tasks`), and beside the model stands one of the same architecture that learned nothing. A base and its fine-tuned model are judged on
the same rows and folds; the base's probes also judge the tuned model: where they do as well as its own, what they read is still where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope.data.scoring import check_fits
from mechscope.data.splits import folds as dealt
from mechscope.errors import SettingsError
from mechscope.instrument import Execution
from mechscope.probing.activations import Activations, Component, ProbeSite, components_of
from mechscope.probing.passes import LEARNED, Folded, Method, co_moments, fitted, judged, together
from mechscope.probing.tasks import CONTROL, LABELS, SHUFFLED, Task
from mechscope.shapes import by_shape
from mechscope.stats.co_moments import CoMoments
from mechscope.stats.inference import benjamini_hochberg, draw_p, interval
from mechscope.stats.recalls import Accuracy, balanced_accuracy
from mechscope.subject import Subject

BASE, TUNED, UNTRAINED = "base", "tuned", "random weights"
OWN, BASES = "its own", "the base's"
# fewest folds: one judges, one chooses how much is shrunk, one is learned from
MIN_FOLDS = 3
MIN_SHUFFLES = 5
OVER_SHUFFLED = "over shuffled labels"
_Key = tuple[str, str, str]


@dataclass(frozen=True)
class Probing:
    """What probes found.

    Attributes:
        accuracy: One row per model, whose probe, labels and component: `model`, `probe`, `labels`, `component`, `layer`, `n` (texts), `rows`, `classes`,
            `balanced` (mean over classes of the share of held-out rows told right) with `balanced_low`, `balanced_high`, `chance` (of a guess), `accuracy`
            (share of all rows), `majority` (share of the most frequent class).
        contrasts: One row per model, contrast and component: `model`, `contrast`, `component`, `layer`, `n`, `difference` (of balanced accuracies on the same
            texts) with `difference_low`, `difference_high`, `difference_p`, `difference_q` (over the components).
        directions: One row per component where a base and a tuned model were given: `component`, `layer`, `n`, `folds`, `angle` (degrees between the
            differences of class means of both models) with `angle_low`, `angle_high`, `alike` (between those of two halves of the texts in the base),
            `apart` (between one half in the base and the other in the tuned model).
    """

    accuracy: pd.DataFrame
    contrasts: pd.DataFrame
    directions: pd.DataFrame | None = None

    __repr__ = by_shape


def probe(
    models: Subject | Mapping[str, Subject],
    task: Task,
    *,
    site: ProbeSite = "residual",
    method: Method = "lda",
    folds: int = 5,
    shuffles: int = 20,
    execution: Execution = Execution(),
) -> Probing:
    """Fit probes to the activations of every layer, and judge them on texts that they were not fitted to.

    Args:
        models: The model, or several of one architecture by name: where there are `base` and `tuned`, the base's probes also judge the tuned model, and
            the model `random weights` is a control of the others.
        task: What is told.
        site: What is read of every layer.
        method: The probe: `lda`, `ridge` or `logistic`, shrunk as much as suits other texts; `means`, the difference in means; `mlp`, with one hidden layer.
        folds: Parts of the texts, each judged by probes of the others; classes are dealt out evenly where they are of texts.
        shuffles: How often labels are shuffled for the control.
        execution: Tokens of a batch (2,048 by default), seed of folds and controls, progress.

    Raises:
        DataError: A class is too rare, or texts do not fit the model.
        SettingsError: There are too few folds.
        ModelError: Activations are not finite.
    """
    named = {"model": models} if isinstance(models, Subject) else dict(models)
    if folds < MIN_FOLDS:
        raise SettingsError(f"{folds} folds are too few: one judges, one chooses how much is shrunk, and at least one is learned from")
    if shuffles < MIN_SHUFFLES:
        raise SettingsError(
            f"labels are shuffled {shuffles} times, {MIN_SHUFFLES} are the least that tell how far accuracies vary where there is nothing to tell"
        )
    task.check(folds)
    for subject in named.values():
        check_fits(subject, task.texts)
    labelings = task.labelings(shuffles=shuffles, seed=execution.seed)
    # a text's tokens are of several classes, which every fold has anyway
    strata = [0 if task.reading == "tokens" else int(own[0]) for own in task.labels]
    fold = dealt([pair.clean for pair in task.texts], folds, execution.seed, strata=strata, source=task.texts.source)
    folded = Folded(task, [own for _, own in labelings], fold)
    kinds = [kind for kind, _ in labelings]
    seen, found, moments = folded.seen(), {}, {}
    own_probes = {}
    for name, subject in named.items():
        activations = Activations(subject, site, task.reading)
        held = folded.held(execution.seed) if method in LEARNED else None
        moments[name] = co_moments(activations, folded, execution, held)
        own_probes[name] = fitted(moments[name], method, folded, held, execution.seed)
        sets = {OWN: own_probes[name]} | ({BASES: own_probes[BASE]} if name == TUNED and BASE in own_probes else {})
        for whose, hits in judged(activations, folded, sets, execution).items():
            for kind in dict.fromkeys(kinds):
                which = [number for number, each in enumerate(kinds) if each == kind]
                found[name, whose, kind] = _accuracy(hits[:, which], seen[which])
        if name not in (BASE, TUNED):
            del moments[name]
    components = components_of(next(iter(named.values())), site)
    accuracy = pd.concat([_rows(key, each, components, folded) for key, each in found.items()], ignore_index=True)
    contrasts = _contrasts(found, components, len(task.texts))
    directions = _directions(moments[BASE], moments[TUNED], components, len(task.texts)) if {BASE, TUNED} <= moments.keys() else None
    return Probing(accuracy, contrasts, directions)


@dataclass(frozen=True)
class _Judged:
    """Balanced accuracy at every component, that of each shuffle, the share of all rows that is right, and how often each class was seen."""

    balanced: Accuracy
    draws: Float[np.ndarray, "labeling component"]
    right: Float[np.ndarray, " component"]
    seen: Float[np.ndarray, " class"]


def _accuracy(hits: Float[np.ndarray, "component labeling class text"], seen: Float[np.ndarray, "labeling text class"]) -> _Judged:
    # of few kinds of tokens a control task may have drawn some class for none
    there = seen.sum((0, 1)) > 0
    hits, seen = hits.transpose(0, 1, 3, 2)[..., there], seen[..., there]
    draws = (hits.sum(2) / seen.sum(1)).mean(-1).T
    return _Judged(balanced_accuracy(hits.sum(1), seen.sum(0)), draws, hits.sum((1, 2, 3)) / seen.sum(), seen.sum((0, 1)))


def _rows(key: _Key, found: _Judged, components: tuple[Component, ...], folded: Folded) -> pd.DataFrame:
    model, whose, kind = key
    return pd.DataFrame(
        {
            "model": model,
            "probe": whose,
            "labels": kind,
            "component": [each.name for each in components],
            "layer": [each.layer for each in components],
            "n": len(folded.task.texts),
            "rows": sum(len(own) for own in folded.task.labels),
            "classes": len(found.seen),
            "balanced": found.balanced.value,
            "balanced_low": found.balanced.low,
            "balanced_high": found.balanced.high,
            "chance": 1 / len(found.seen),
            "accuracy": found.right,
            "majority": found.seen.max() / found.seen.sum(),
        }
    )


def _contrasts(found: Mapping[_Key, _Judged], components: tuple[Component, ...], texts: int) -> pd.DataFrame:
    rows = []
    for model, contrast, difference, which in _pairs({key: each.balanced for key, each in found.items()}, components):
        # probes of folds share texts, so that where there is nothing to tell accuracies vary more than their texts do: shuffles show how much
        shuffled = contrast == OVER_SHUFFLED
        p = draw_p(found[model, OWN, LABELS].draws[0], found[model, OWN, SHUFFLED].draws) if shuffled else difference.p
        table = pd.DataFrame(
            {
                "model": model,
                "contrast": contrast,
                "component": [each.name for each in components],
                "layer": [each.layer for each in components],
                "n": texts,
                "difference": difference.value,
                "difference_low": difference.low,
                "difference_high": difference.high,
                "difference_p": p,
            }
        )[which]
        rows.append(table.assign(difference_q=benjamini_hochberg(table["difference_p"])))
    return pd.concat(rows, ignore_index=True)


def _pairs(found: Mapping[_Key, Accuracy], components: tuple[Component, ...]) -> Iterator[tuple[str, str, Accuracy, np.ndarray]]:
    """Yield what is compared: model, contrast, the difference, and at which components it says something."""
    every, behind = np.ones(len(components), dtype=bool), np.array([each.layer >= 0 for each in components])
    for model in dict.fromkeys(name for name, _, _ in found):
        labels = found[model, OWN, LABELS]
        for control, contrast in ((SHUFFLED, OVER_SHUFFLED), (CONTROL, "over the control task")):
            if (model, OWN, control) in found:
                yield model, contrast, labels.minus(found[model, OWN, control]), every
        if model == UNTRAINED:
            continue
        if not behind.all():
            embedding = Accuracy(*(part[:1] for part in (labels.value, labels.low, labels.high, labels.influence)))
            yield model, "over the embedding", labels.minus(embedding), behind
        if (UNTRAINED, OWN, LABELS) in found:
            yield model, "over random weights", labels.minus(found[UNTRAINED, OWN, LABELS]), every
        if model == TUNED and (BASE, OWN, LABELS) in found:
            yield model, "over the base", labels.minus(found[BASE, OWN, LABELS]), every
            yield model, "the base's probe over its own", found[TUNED, BASES, LABELS].minus(labels), every


def _directions(base: list[CoMoments], tuned: list[CoMoments], components: tuple[Component, ...], texts: int) -> pd.DataFrame:
    folds = len(base)
    whole = {name: together(each) for name, each in ((BASE, base), (TUNED, tuned))}
    angle = _angle(whole[BASE], whole[TUNED])
    # jackknife: without each fold once
    without = torch.stack([_angle(whole[BASE].without(one), whole[TUNED].without(two)) for one, two in zip(base, tuned, strict=True)])
    error = ((folds - 1) / folds * (without - without.mean(0)).square().sum(0)).sqrt()
    low, high = interval(angle.numpy(), error.numpy(), folds, fewest=MIN_FOLDS)
    halves = [[together(each[part]) for part in (slice(0, None, 2), slice(1, None, 2))] for each in (base, tuned)]
    (base_even, base_odd), (tuned_even, tuned_odd) = halves
    return pd.DataFrame(
        {
            "component": [each.name for each in components],
            "layer": [each.layer for each in components],
            "n": texts,
            "folds": folds,
            "angle": angle,
            "angle_low": np.maximum(low, 0.0),
            "angle_high": np.minimum(high, 180.0),
            "alike": _angle(base_even, base_odd),
            "apart": (_angle(base_even, tuned_odd) + _angle(base_odd, tuned_even)) / 2,
        }
    )


def _angle(one: CoMoments, other: CoMoments) -> Float[Tensor, " component"]:
    """Return the angle in degrees between two models' class means less their middle, all classes side by side; NaN where they do not differ."""
    x, y = (_spread(each).cpu() for each in (one, other))
    size = x.norm(dim=(1, 2)) * y.norm(dim=(1, 2))
    # what rounding leaves of means that are the same is no direction
    cosine = torch.where(size > 1e-18, (x * y).sum((1, 2)) / size.clamp(min=1e-300), torch.nan)
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))


def _spread(moments: CoMoments) -> Float[Tensor, "component class width"]:
    means = moments.class_means(0)
    return means - means.mean(1, keepdim=True)
