"""Dictionaries: one step of training beside the encoder's matrix product, and a harvest beside the pass that it reads.

The step is that of an autoencoder 32 times as wide as the model, with 32 active latents: selection, decoding, all gradients, clipping, Adam and norms. What it
cannot do without is one product of the batch with the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Beside, Job
from benchmarks.jobs.cases import PairsCase, backbone, build, forward
from benchmarks.settings import Settings
from benchmarks.shapes import Size
from mechscope.choices import RuleName
from mechscope.data.pairs import collate_pairs
from mechscope.features.dictionary import Dictionary
from mechscope.features.layout import autoencoder
from mechscope.features.learner import Learner
from mechscope.features.observed import Latents
from mechscope.features.places import Place
from mechscope.features.reservoirs import Span
from mechscope.features.rows import Reader, Rows
from mechscope.features.rules import Rule
from mechscope.features.step import Step
from mechscope.features.windows import Watched, watch
from mechscope.instrument import Execution
from mechscope.settings.features import FeatureTraining, Objective, TokenSettings

_WIDER, _ACTIVE = 32, 32
_LATENTS = 2048


@dataclass(frozen=True, eq=False)
class StepCase:
    """A dictionary in training and a batch.

    Attributes:
        learner: The dictionary.
        rows: ``(token, width)``.
    """

    learner: Learner
    rows: Tensor
    texts: int = 1

    @property
    def tokens(self) -> int:
        """Rows of the batch."""
        return len(self.rows)

    @property
    def each(self) -> int:
        """The same: there is one batch."""
        return len(self.rows)

    def small(self) -> StepCase:
        """Return the same dictionary with a batch of a few rows."""
        return StepCase(self.learner, self.rows[:16])


def build_step(rule: RuleName, settings: Settings, size: Size) -> StepCase:
    """Make a dictionary of the model's width and random rows of mean squared norm one."""
    width = settings.shape.width
    layout = autoencoder("resid0", width, _WIDER * width, Rule(rule, _ACTIVE))
    tensors = {name: tensor.to(settings.device) for name, tensor in layout.tensors().items()}
    rows = torch.randn(size.texts * size.tokens, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    return StepCase(Learner(layout, Objective(), FeatureTraining(), tensors), rows.to(settings.device))


def step(case: StepCase) -> Step:
    """Take one step of training."""
    return case.learner.advance(case.rows, case.rows)


@torch.no_grad()
def encoder_product(case: StepCase) -> None:
    """Multiply the batch with the encoder, as many rows at once as the step does."""
    encoder = case.learner.tensors["encoder.0"]
    for rows in case.rows.split(512):
        torch.nn.functional.linear(rows, encoder)


def harvest(layers: float, case: PairsCase) -> Rows:
    """Read the residual stream behind the last block of this share of all, and what its MLP adds."""
    last = max(0, round(layers * case.subject.anatomy.n_layers) - 1)
    reader = Reader(case.subject, (Place("residual", last), Place("mlp_output", last)), TokenSettings(outlier=None))
    return reader.rows(collate_pairs(tuple(case.pairs)))


def dashboard(case: PairsCase) -> Watched:
    """Gather everything that dashboards of 2,048 latents behind the last block show, but for putting it into tables."""
    subject = case.subject
    layout = autoencoder("resid0", subject.anatomy.d_model, _LATENTS, Rule("topk", _ACTIVE))
    last = replace(layout, inputs=(place := Place("residual", subject.anatomy.n_layers - 1),), outputs=(place,))
    tensors = {name: tensor.to(subject.device) for name, tensor in layout.tensors().items()}
    everything = TokenSettings(first=0, outlier=None)
    observed = Latents(subject, Dictionary.plain(last, tensors), case.pairs, heads=True, tokens=everything)
    return watch(observed, case.pairs, top=8, drawn=60, span=Span(16, 8), sample=16_384, execution=Execution(case.tokens))


_step = partial(Job, run=step, sizes={"small": Size(4, 512)}, beside=Beside("product with the encoder", encoder_product), seconds=90)
_harvest = partial(Job, build=build, sizes={"small": Size(8, 128)}, forward=forward, beside=Beside("backbone passes", backbone), seconds=60)
JOBS = (
    _step(
        name="features_step",
        what="one step of training a dictionary, 32 × the width, top 32",
        build=partial(build_step, "topk"),
        ratio=2.5,
        gib=0.23,
        rounds=5,
    ),
    _step(
        name="features_step_batch",
        what="the same with the largest of the whole batch",
        build=partial(build_step, "batchtopk"),
        rounds=3,
        part=True,
    ),
    _harvest(name="harvest", what="activations behind the last block", run=partial(harvest, 1.0), ratio=1.1),
    _harvest(
        name="features_dashboard",
        what="what dashboards show of 2,048 latents behind the last block",
        run=dashboard,
        sizes={"small": Size(32, 128)},
        ratio=1.3,
        rounds=3,
    ),
    _harvest(name="harvest_half", what="activations in the middle of the model", run=partial(harvest, 0.5), ratio=0.55),
)
