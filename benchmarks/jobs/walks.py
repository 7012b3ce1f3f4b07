"""One batch of a difference: two models in lock-step with everything that is measured of them, and three models that three pairs have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from benchmarks.harness import Beside, Job
from benchmarks.jobs.cases import MOVED
from benchmarks.models import make_model, make_texts
from benchmarks.settings import FORWARD, Settings
from benchmarks.shapes import Size
from mechscope.data.prompt import Batch, Example, collate
from mechscope.difference.lockstep import Measured, launch
from mechscope.subject.load import load
from mechscope.subject.pair import Pair, pair


@dataclass(frozen=True, eq=False)
class LockstepCase:
    """Pairs of models and documents.

    Attributes:
        pairs: The models.
        batch: The documents; the last fourth of each is its summary.
    """

    pairs: tuple[Pair, ...]
    batch: Batch

    @property
    def texts(self) -> int:
        """How many documents."""
        return len(self.batch)

    @property
    def tokens(self) -> int:
        """Of all documents together."""
        return self.batch.input_ids.numel()

    @property
    def each(self) -> int:
        """Of each document."""
        return self.batch.input_ids.shape[1]

    def small(self) -> LockstepCase:
        """Return two documents of eight tokens."""
        return replace(self, batch=_batch([example.input_ids[:8] for example in self.batch.examples[:2]]))


def _batch(texts: list[tuple[int, ...]]) -> Batch:
    spans = [(len(ids), len(ids) * 3 // 4) for ids in texts]
    examples = [Example(str(at), ids, (0, cut), (cut, end), False) for at, (ids, (end, cut)) in enumerate(zip(texts, spans, strict=True))]
    return collate(examples, pad_id=0)


def build_of(models: int) -> Callable[[Settings, Size], LockstepCase]:
    """Return what makes a case of so many models and all pairs of them."""

    def build(settings: Settings, size: Size) -> LockstepCase:
        subjects = [load(make_model(settings.shape, device=settings.device, noise=step * MOVED)) for step in range(models)]
        texts = [tuple(row) for row in make_texts(settings.shape, size)[0].tolist()]
        return LockstepCase(tuple(pair(*two) for two in combinations(subjects, 2)), _batch(texts))

    return build


def measure(case: LockstepCase) -> list[Measured]:
    """Measure all pairs over the batch."""
    return [pending.fetch() for pending in launch(case.pairs, case.batch)]


@torch.no_grad()
def forward(case: LockstepCase) -> torch.Tensor:
    """Run one model's plain forward pass, logits included."""
    base = case.pairs[0].base
    return base.plain(case.batch.input_ids.to(base.device), use_cache=False).logits


def _job(name: str, what: str, *, models: int, seconds: int) -> Job:
    return Job(
        name=name,
        what=what,
        build=build_of(models),
        run=measure,
        sizes={"small": Size(4, 512), "long": Size(1, 4096)},
        forward=forward,
        beside=Beside(FORWARD, forward, models),
        seconds=seconds,
    )


JOBS = (
    _job("lockstep", "one batch of a difference: all statistics of two models", models=2, seconds=100),
    _job("lockstep_three", "the same of three models and their three pairs", models=3, seconds=140),
)
