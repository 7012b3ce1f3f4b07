"""The roles of all heads, beside the model's own forward pass over the same probes: all random texts and their controls, in the same batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.harness import Job
from benchmarks.models import make_model
from benchmarks.settings import Settings
from benchmarks.shapes import Size
from mechscope.data.pairs import PairBatch
from mechscope.data.scoring import batches
from mechscope.heads import copying_roles, head_roles, pattern_roles, roles_table
from mechscope.heads.pattern_roles import repeated_texts
from mechscope.subject.load import Subject, load

_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, eq=False)
class ProbesCase:
    """The model and how many random texts it reads.

    Attributes:
        subject: The model.
        probes: Random texts; each has a control as long.
    """

    subject: Subject
    probes: int

    @property
    def batches(self) -> list[PairBatch]:
        """The random texts with their controls, as the roles read them."""
        return list(batches(repeated_texts(self.subject, self.probes), _TOKENS_PER_BATCH))

    @property
    def texts(self) -> int:
        """Random texts and controls."""
        return 2 * self.probes

    @property
    def tokens(self) -> int:
        """Of all of them together."""
        return 2 * sum(int(batch.real.sum()) for batch in self.batches)

    @property
    def each(self) -> None:
        """Their lengths differ."""

    def small(self) -> ProbesCase:
        """Return the model with two random texts."""
        return replace(self, probes=min(2, self.probes))


def build(settings: Settings, _: Size) -> ProbesCase:
    """Make the model."""
    return ProbesCase(load(make_model(settings.shape, device=settings.device)), settings.probes)


@torch.no_grad()
def forward(case: ProbesCase) -> None:
    """Run the plain forward pass, logits included, over all probes."""
    for batch in case.batches:
        for ids in (batch.clean, batch.corrupt):
            case.subject.plain(ids.to(case.subject.device), use_cache=False)


def patterns(case: ProbesCase) -> None:
    """Score where heads look."""
    pattern_roles(case.subject, n=case.probes)


def copying(case: ProbesCase) -> None:
    """Score what heads copy, which reads weights and no probes."""
    copying_roles(case.subject)


def role_table(case: ProbesCase) -> None:
    """Score every role that needs no task, and make the table of all heads."""
    roles_table(head_roles(case.subject, probes=case.probes))


JOBS = (
    Job(
        name="role_table",
        what="role table of all heads, random text and OV circuits",
        build=build,
        run=role_table,
        forward=forward,
        ratio=12,
        rounds=1,
        slow=True,
        seconds=145,
    ),
    Job(name="role_patterns", what="where heads look", build=build, run=patterns, forward=forward, rounds=3, part=True, seconds=120),
    Job(
        name="role_copying",
        what="what heads copy, from their weights",
        build=build,
        run=copying,
        forward=forward,
        rounds=1,
        slow=True,
        part=True,
        seconds=120,
    ),
)
