"""The logit lens of all layers, beside the unembeddings it cannot do without.

The lens's time includes the forward pass that makes what is read. Its target is set against the plain unembeddings of as many layers as it reads,
linear maps of all rows and nothing else.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from benchmarks.harness import Beside, Job
from benchmarks.jobs.cases import PairsCase, build, forward
from benchmarks.shapes import Size
from mechscope.data.pairs import collate_pairs
from mechscope.instrument.readout import Readout
from mechscope.lens.logit_lens import logit_lens
from mechscope.lens.places import SiteValues, places_of
from mechscope.lens.projection import Projection
from mechscope.lens.reading import LensReading
from mechscope.lens.training import train_tuned_lens
from mechscope.settings.lens import TunedLensSettings

_SIZES = {"small": Size(8, 128), "long": Size(1, 4096)}


@torch.no_grad()
def unembeddings(case: PairsCase) -> None:
    """Unembed as many rows as there are tokens, once for each layer."""
    weight = Readout.of(case.subject).weight
    rows = torch.randn(case.ids.numel(), weight.shape[1], device=weight.device)
    for _ in range(case.subject.anatomy.n_layers):
        torch.nn.functional.linear(rows, weight)


@torch.no_grad()
def lens_backbone(case: PairsCase) -> None:
    """Run the forward pass up to the last residual stream, as the lens does."""
    SiteValues(case.subject, places_of(case.subject, ("residual",))).run(collate_pairs(tuple(case.pairs)))


@torch.no_grad()
def _projected(case: PairsCase, *, everything: bool) -> None:
    projection, targets = Projection(case.subject), case.ids.flatten()
    rows = torch.randn(len(targets), case.subject.anatomy.d_model, device=targets.device)
    final = projection.final(rows) if everything else None
    for _ in range(case.subject.anatomy.n_layers):
        projection.read(rows, targets, ranks=everything, entropy=everything, final=final)


def projection(case: PairsCase) -> None:
    """Take the five likeliest tokens of given rows, once for each layer."""
    _projected(case, everything=False)


def projection_all(case: PairsCase) -> None:
    """Take the five likeliest tokens, ranks, entropies and divergences of given rows, once for each layer."""
    _projected(case, everything=True)


def _blocks(case: PairsCase) -> range:
    return range(case.subject.anatomy.n_layers)


@torch.no_grad()
def lens(case: PairsCase) -> LensReading:
    """Read the five likeliest tokens behind every block."""
    return logit_lens(case.subject, case.pairs, layers=_blocks(case), statistics=False)


@torch.no_grad()
def lens_all(case: PairsCase) -> LensReading:
    """Read the five likeliest tokens, ranks, entropies and divergences behind every block."""
    return logit_lens(case.subject, case.pairs, layers=_blocks(case))


def training_step(case: PairsCase) -> None:
    """Take one step of training a tuned lens, all layers but the last."""
    settings = TunedLensSettings(steps=1, tokens_per_step=case.ids.numel())
    train_tuned_lens(case.subject, case.pairs, layers=_blocks(case), settings=settings)


def _top(found: LensReading) -> np.ndarray:
    """Take the log-probabilities of the first text's likeliest tokens, (layer, token, k)."""
    return found.texts[0].top_log_probability.ravel()


_job = partial(Job, build=build, sizes=_SIZES, forward=forward, beside=Beside("unembeddings of all layers", unembeddings))
JOBS = (
    _job(name="lens", what="logit lens of all layers, top 5", run=lens, numbers=_top, ratio=1.3, gib=0.5, rounds=3, seconds=90),
    _job(name="lens_all", what="the same with rank, entropy and KL", run=lens_all, gib=0.5, rounds=2, slow=True, seconds=65),
    _job(name="lens_training_step", what="one step of training a tuned lens", run=training_step, rounds=2, slow=True, seconds=80),
    _job(name="lens_backbone", what="the pass that the lens reads", run=lens_backbone, rounds=3, part=True, seconds=60),
    _job(name="lens_projection", what="top 5 of given rows, all layers", run=projection, rounds=3, part=True, seconds=80),
    _job(
        name="lens_projection_all",
        what="top 5, rank, entropy and KL of given rows, all layers",
        run=projection_all,
        rounds=3,
        part=True,
        seconds=90,
    ),
)
