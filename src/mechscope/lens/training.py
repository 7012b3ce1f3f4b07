"""Training translators: at every place the affine map after which the lens says what the model will say.

The loss is KL(final ‖ lens), averaged over tokens, of every place by itself (Belrose et al. 2023, eq. 7). The model is run without gradients, a batch's
hidden states are held and serve all places; the loss comes with its derivative from `Projection.loss`, so nothing of the vocabulary's size is
kept for a backward pass.

The paper takes SGD with Nesterov momentum and 2^18 tokens a step. Here it is Adam with decoupled weight decay: steps of a few thousand tokens are what a
study can afford, and residual streams have dimensions that are a hundred times larger than others, which plain SGD answers with steps that are too
large for those or too small for the rest. As in the paper the learning rate falls linearly to zero, gradients are clipped at norm 1, and weight
decay pulls towards the logit lens.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mechscope.data.pairs import PairBatch, Pairs, collate_pairs
from mechscope.data.scoring import check_fits
from mechscope.errors import ModelError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.instrument.kernels import statistics_dtype
from mechscope.lens.logit_lens import logit_lens
from mechscope.lens.places import LensPlace, SiteValues, places_of, places_table, real_rows
from mechscope.lens.projection import Final, Projection
from mechscope.lens.reading import MEASURES
from mechscope.lens.translators import Translator, Translators
from mechscope.settings.lens import TunedLensSettings
from mechscope.shapes import by_shape
from mechscope.stats.convergence import convergence
from mechscope.stats.inference import benjamini_hochberg, estimate, paired_difference
from mechscope.stats.skewness import ThirdMoments
from mechscope.subject import Subject

# gradients of a place are clipped at this norm, as in the paper
_CLIP = 1.0
# gradients shrink a hundredfold within a hundred steps: with Adam's usual memory of a thousand they would still be divided by the first ones
_BETAS = (0.9, 0.95)
_LEVEL = 0.05


@dataclass(frozen=True)
class Trained:
    """Translators and how their training went.

    Attributes:
        translators: The maps.
        curve: One row per step and place: `step`, `component`, `kl` (nats; of the step's tokens, before the step); and of the place `converged`,
            `late_share` (see `mechscope.stats.convergence`) and `unconverged` (why its map has not, or empty), the same in each of its rows.
    """

    translators: Translators
    curve: pd.DataFrame

    __repr__ = by_shape


def train_tuned_lens(
    subject: Subject,
    texts: Pairs,
    *,
    layers: Collection[int] | None = None,
    settings: TunedLensSettings | None = None,
    execution: Execution = Execution(),
) -> Trained:
    """Train a tuned lens: a map from the residual stream after every block but the last, and from the embedding.

    Args:
        subject: The model.
        texts: Any texts; their clean versions are read. Keep some others for `evaluate`.
        layers: Which layers, −1 for the embedding; None for all but the last.
        settings: How to train.
        execution: Seed (of the order of the texts), progress.

    Raises:
        MechscopeError: Settings, layers or texts do not fit, or the training diverged.
    """
    last = LensPlace("residual", subject.anatomy.n_layers - 1)
    places = [place for place in places_of(subject, ("residual",), layers) if place != last]
    if not places:
        raise SettingsError("the tuned lens needs no map behind the last block, and no other layer was asked for: give others")
    return train(subject, texts, dict.fromkeys(places), settings=settings or TunedLensSettings(), execution=execution)


def train(
    subject: Subject,
    texts: Pairs,
    places: Mapping[LensPlace, Tensor | None],
    *,
    settings: TunedLensSettings,
    execution: Execution = Execution(),
) -> Trained:
    """Train a map from each place to the end of the model.

    Args:
        subject: The model.
        texts: Any texts; their clean versions are read.
        places: The places, each with the basis ``(features, d_model)`` of the subspace its map acts on, None for everything.
        settings: How to train.
        execution: Seed (of the order of the texts), progress.

    Raises:
        MechscopeError: The texts do not fit, or the training diverged.
    """
    check_fits(subject, texts)
    projection, site_values = Projection(subject), SiteValues(subject, list(places))
    dtype = statistics_dtype(subject.dtype)
    like = torch.zeros(0, subject.anatomy.d_model, dtype=dtype, device=projection.readout.weight.device)
    maps = {place: Translator.identity(like, None if basis is None else basis.to(like)) for place, basis in places.items()}
    parameters = [value.requires_grad_() for translator in maps.values() for value in (translator.weight, translator.bias)]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=_BETAS, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    curve = []
    for step, batch in zip(range(settings.steps), _drawn(texts, settings, execution.seed), strict=False):
        walk, streams = site_values.run(batch)
        with torch.no_grad():
            final = projection.final(projection.applied(real_rows(streams[-1], batch.real)))
        for place, values in site_values.values(walk, streams, batch.real):
            kl = _backward(projection, maps[place], values, final)
            if not np.isfinite(kl):
                raise ModelError(
                    f"training the translator of {place.component} diverged at step {step + 1}: lower learning_rate={settings.learning_rate}"
                )
            curve.append((step, place.component, kl))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        execution.told("lens training", step + 1, settings.steps)
    done = {place: Translator(translator.weight.detach(), translator.bias.detach(), translator.basis) for place, translator in maps.items()}
    translators = Translators(
        done, subject.fingerprint, subject.anatomy.n_layers, {**asdict(settings), "seed": execution.seed, "texts": texts.hash}
    )
    return Trained(translators, _with_convergence(pd.DataFrame(curve, columns=["step", "component", "kl"]), settings.steps))


def _with_convergence(curve: pd.DataFrame, steps: int) -> pd.DataFrame:
    by_step = curve.pivot(index="step", columns="component", values="kl")
    arrived = {name: convergence(by_step[name], pace=1 - by_step.index / steps) for name in by_step}
    facts = pd.DataFrame([{"component": name, **each.columns, "unconverged": each.reason} for name, each in arrived.items()])
    return curve.merge(facts, on="component", how="left")


def with_training(judged: pd.DataFrame, curve: pd.DataFrame) -> pd.DataFrame:
    """Give what `evaluate_lens` returned the columns `converged`, `late_share` and `unconverged` of the training's curve."""
    facts = curve.drop_duplicates("component")[["component", "converged", "late_share", "unconverged"]]
    return judged.merge(facts, on="component", how="left")


def evaluate_lens(subject: Subject, texts: Pairs, translators: Translators, *, execution: Execution = Execution()) -> pd.DataFrame:
    """Measure on texts that were not trained on how far the lens is from the model's own distribution, with the maps and without.

    Returns:
        One row per place: `site`, `layer`, `head`, `component`, `n` (texts), `kl_logit_lens` and `kl_tuned` (KL(final ‖ lens), nats, mean over texts
        of means over tokens), each with `_se`, `_low`, `_high` (95 %), and their difference `kl_change` with `_p` and `_q` (Benjamini–Hochberg
        over places) too; `verdict`: at q < .05 the map comes `nearer` to the model than no map or lies `farther` from it, else `undecided`.

    Raises:
        MechscopeError: The translators are another model's, or the texts do not fit.
    """
    layers = sorted({place.layer for place in translators.maps})
    sites = sorted({place.site for place in translators.maps})
    options: dict[str, Any] = {"sites": sites, "layers": layers, "k": 1, "execution": execution}
    readings = [logit_lens(subject, texts, translators=chosen, **options) for chosen in (None, translators)]
    plain, tuned = (np.stack([text.means("all")[:, MEASURES.index("kl")] for text in reading.texts]) for reading in readings)
    columns: dict[str, Any] = {"n": len(texts)}
    for name, values in (("kl_logit_lens", plain), ("kl_tuned", tuned)):
        moments = ThirdMoments(values.shape[1:])
        moments.update_many(values)
        stats = estimate(moments)
        columns |= {name: stats.mean, f"{name}_se": stats.standard_error, f"{name}_low": stats.low, f"{name}_high": stats.high}
    change = paired_difference(tuned, plain)
    columns |= {"kl_change": change.mean, "kl_change_se": change.standard_error, "kl_change_low": change.low}
    columns |= {"kl_change_high": change.high, "kl_change_p": change.p, "kl_change_q": benjamini_hochberg(change.p)}
    shown = columns["kl_change_q"] < _LEVEL
    columns["verdict"] = np.select([shown & (change.mean < 0), shown & (change.mean > 0)], ["nearer", "farther"], "undecided")
    return pd.concat([places_table(readings[0].places), pd.DataFrame(columns)], axis=1)


def _backward(projection: Projection, translator: Translator, values: Tensor, final: Final) -> float:
    """Set the clipped gradients of a place's map, and return its loss."""
    with torch.enable_grad():
        rows = projection.applied(translator(values).to(values.dtype))
    kl, derivative = projection.loss(rows.detach(), final)
    parameters = (translator.weight, translator.bias)
    gradients = torch.autograd.grad(rows, parameters, (derivative / len(rows)).to(rows))
    norm = float(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt())
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient * min(1.0, _CLIP / max(norm, 1e-12))
    return float(kl.mean())


def _drawn(texts: Pairs, settings: TunedLensSettings, seed: int) -> Iterator[PairBatch]:
    """Draw the texts in random order, again and again, in batches of a step's size."""
    generator = random.Random(seed)
    waiting: list = []
    while True:
        order = list(texts)
        generator.shuffle(order)
        for pair in order:
            longest = max(len(one.clean) for one in (*waiting, pair))
            if waiting and longest * (len(waiting) + 1) > settings.tokens_per_step:
                yield collate_pairs(waiting)
                waiting = []
            waiting.append(pair)
