"""Dictionaries: one step of training beside the encoder's matrix product, and a harvest beside the pass that it reads.

The step is that of an autoencoder 32 times as wide as the model, with 32 active latents: selection, decoding, all gradients, clipping, Adam and norms. What it
cannot do without is one product of the batch with the encoder.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pandas import DataFrame

from benchmarks.harness import Beside, Job
from benchmarks.jobs.cases import PairsCase, backbone, build, build_two, forward
from benchmarks.models import ACTIVE, WIDER, RowsCase, make_rows
from benchmarks.settings import Settings
from benchmarks.shapes import Size
from mechscope.choices import RuleName
from mechscope.data.pairs import collate_pairs
from mechscope.features.activations import Block
from mechscope.features.affine import Affine
from mechscope.features.batches import batches
from mechscope.features.dictionary import Dictionary
from mechscope.features.diffing.scaling import latent_scaling as scaled
from mechscope.features.layout import autoencoder, crosscoder
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
from mechscope.store.tables import read_tensors, write_tensors

# batches of a block
_BATCHES = 32
_LATENTS = 2048


@dataclass(frozen=True, eq=False, kw_only=True)
class StepCase(RowsCase):
    """A dictionary in training and a batch.

    Attributes:
        learner: The dictionary.
    """

    learner: Learner


def build_step(rule: RuleName, settings: Settings, size: Size) -> StepCase:
    """Make a dictionary of the model's width and random rows of mean squared norm one."""
    width = settings.shape.width
    layout = autoencoder("resid0", width, WIDER * width, Rule(rule, ACTIVE))
    tensors = {name: tensor.to(settings.device) for name, tensor in layout.tensors().items()}
    rows = make_rows(size, width).to(settings.device)
    return StepCase(rows=rows, learner=Learner(layout, Objective(), FeatureTraining(), tensors))


def step(case: StepCase) -> Step:
    """Take one step of training."""
    return case.learner.advance(case.rows, case.rows)


def unexplained(found: Step) -> np.ndarray:
    """Return what the first step's batch leaves unexplained; the step before it, on a few rows, hardly moves a weight."""
    return np.array([found.reconstruction])


@torch.no_grad()
def encoder_product(case: StepCase) -> None:
    """Multiply the batch with the encoder, as many rows at once as the step does."""
    encoder = case.learner.tensors["encoder.0"]
    for rows in case.rows.split(512):
        torch.nn.functional.linear(rows, encoder)


@dataclass(frozen=True, eq=False)
class LoaderCase:
    """A block of activations on disk, as a harvest writes it, and a dictionary that learns from it.

    Attributes:
        source: The block, with the batches that it gives.
        step: The dictionary and a batch.
        folder: Where it lies; gone with this case.
    """

    source: Stored
    step: StepCase
    folder: tempfile.TemporaryDirectory[str]
    texts: int = 1

    @property
    def tokens(self) -> int:
        """Rows of the block."""
        return self.source.rows

    @property
    def each(self) -> int:
        """Rows of a batch."""
        return self.step.tokens

    def small(self) -> LoaderCase:
        """Return the same: one block is what is read at once."""
        return self


@dataclass
class Stored:
    """One block of a harvest.

    Attributes:
        path: Its file.
        rows: How many it holds.
        places: Of what.
    """

    path: Path
    rows: int
    places: tuple[Place, ...] = (Place("residual", 0),)
    blocks: int = 1
    identity: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    def block(self, number: int) -> Block:
        """Read it, as a `Harvest` does."""
        return {self.places[0]: read_tensors(self.path)[0][self.places[0].name]}

    def affine(self, place: Place) -> Affine:
        """Return the map that changes nothing."""
        return Affine.identity(self.block(0)[place].shape[1])


def build_loader(settings: Settings, size: Size) -> LoaderCase:
    """Write a block of half-precision rows for 32 batches."""
    made = build_step("topk", settings, size)
    folder = tempfile.TemporaryDirectory()
    source = Stored(Path(folder.name) / "block.safetensors", _BATCHES * made.tokens)
    rows = torch.randn(source.rows, made.rows.shape[1], generator=torch.Generator().manual_seed(0)).half()
    write_tensors({source.places[0].name: rows}, source.path)
    return LoaderCase(source, made, folder)


def load_block(case: LoaderCase) -> int:
    """Read a block and give all of its batches, shuffled, in single precision."""
    stream, rows = batches(case.source, case.step.tokens, seed=0), 0
    for _ in range(_BATCHES):
        rows += len(next(stream)[1][case.source.places[0]])
    return rows


def one_step(case: LoaderCase) -> Step:
    """Take one step of training."""
    return step(case.step)


def latent_scaling(case: PairsCase) -> DataFrame:
    """Measure how much of each of 2,048 latents of a crosscoder is in what each of two models holds behind its last block."""
    width, last = case.subject.anatomy.d_model, case.subject.anatomy.n_layers - 1
    layout = crosscoder(f"base:resid{last},tuned:resid{last}", (width, width), _LATENTS, Rule("topk", ACTIVE))
    tensors = {name: tensor.to(case.subject.device) for name, tensor in layout.tensors().items()}
    models = {"base": case.subject, "tuned": case.tuned}
    everything = TokenSettings(first=0, outlier=None)
    return scaled(models, Dictionary.plain(layout, tensors), case.pairs, tokens=everything, execution=Execution(case.tokens))


def harvest(layers: float, case: PairsCase) -> Rows:
    """Read the residual stream behind the last block of this share of all, and what its MLP adds."""
    last = max(0, round(layers * case.subject.anatomy.n_layers) - 1)
    reader = Reader(case.subject, (Place("residual", last), Place("mlp_output", last)), TokenSettings(outlier=None))
    return reader.rows(collate_pairs(tuple(case.pairs)))


def dashboard(case: PairsCase) -> Watched:
    """Gather everything that dashboards of 2,048 latents behind the last block show, but for putting it into tables."""
    subject = case.subject
    layout = autoencoder("resid0", subject.anatomy.d_model, _LATENTS, Rule("topk", ACTIVE))
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
        numbers=unexplained,
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
    _harvest(
        name="features_scaling",
        what="how much of 2,048 latents of a crosscoder is in each of two models",
        build=build_two,
        run=latent_scaling,
        beside=Beside("backbone passes", backbone, count=2),
        ratio=1.3,
        rounds=3,
    ),
    Job(
        name="features_loader",
        what="batches of a harvest on disk, read and shuffled",
        build=build_loader,
        run=load_block,
        sizes={"small": Size(4, 512)},
        beside=Beside("steps of training", one_step, count=_BATCHES),
        ratio=0.02,
        rounds=3,
        seconds=90,
    ),
    _harvest(name="harvest_half", what="activations in the middle of the model", run=partial(harvest, 0.5), ratio=0.55),
)
