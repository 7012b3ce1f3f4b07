"""Reading heads off their weights: vocabulary-space top-k, copying, composition.

Random weights are the worst case for the search in vocabulary space: trained circuits have few strong directions and tokens of very different length,
so more of their vocabulary × vocabulary matrix is skipped (`--model` takes a real one). What times are compared with is one head's whole matrix, made
block by block and thrown away: what any search must do that skips nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.harness import Beside, Job
from benchmarks.models import make_model
from benchmarks.settings import Settings
from benchmarks.shapes import Size
from mechscope.subject.components import chosen_heads
from mechscope.subject.load import Subject, load
from mechscope.subject.pair import Pair, pair
from mechscope.weights import composition, head_changes, ov_tokens, qk_tokens, singular_tokens, weight_heads

# rows and columns of the whole matrix made at once in the reference, as in the search
_ROWS, _COLUMNS = 512, 1024


@dataclass(frozen=True, eq=False)
class WeightsCase:
    """The model, a changed copy for the jobs that compare, and which heads; no text.

    Attributes:
        subject: The model.
        both: Base and tuned; None for jobs of one model.
        heads: Which heads, as text; None for all.
    """

    subject: Subject
    both: Pair | None
    heads: str | None
    texts: int = 0
    tokens: int = 0
    each: int | None = None

    @property
    def models(self) -> Pair:
        """Base and tuned."""
        if self.both is None:
            raise ValueError("this case was built without a tuned model")
        return self.both

    @property
    def n_heads(self) -> int:
        """How many heads are read."""
        return len(chosen_heads(self.subject.anatomy, self.heads))

    def small(self) -> WeightsCase:
        """Return the same models with one head; their vocabulary cannot be made smaller."""
        return replace(self, heads="a0.h0")


def build(settings: Settings, _: Size, *, compares: bool = False) -> WeightsCase:
    """Make or load the model, and a changed copy where jobs compare."""
    subject = load(make_model(settings.shape, device=settings.device) if settings.model is None else settings.model, device=settings.device)
    some = ",".join(f"a0.h{head}" for head in range(min(4, subject.anatomy.n_heads)))
    heads = None if settings.components == "all" else settings.components or some
    if not compares:
        return WeightsCase(subject, None, heads)
    tuned = copy.deepcopy(subject.plain)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=1e-3)
    return WeightsCase(subject, pair(subject, load(tuned, tokenizer=subject.tokenizer)), heads)


def whole(case: WeightsCase) -> None:
    """Make a head's whole matrix block by block."""
    anatomy = case.subject.anatomy
    a, b = (torch.rand(anatomy.vocab_size, anatomy.d_head, device=case.subject.device) for _ in range(2))
    for rows in a.split(_ROWS):
        for columns in b.split(_COLUMNS):
            rows @ columns.T


def ov(case: WeightsCase) -> None:
    """Find the top 10 entries of heads' whole OV circuits."""
    ov_tokens(case.subject, heads=case.heads, k=10)


def qk(case: WeightsCase) -> None:
    """Find the top 10 entries of heads' whole QK circuits."""
    qk_tokens(case.subject, heads=case.heads, k=10)


def ov_sources(case: WeightsCase) -> None:
    """Find the top 10 targets of 100 sources."""
    ov_tokens(case.subject, heads=case.heads, sources=range(min(100, case.subject.anatomy.vocab_size)), k=10)


def ov_change(case: WeightsCase) -> None:
    """Find the top 10 entries of what changed in heads' OV circuits."""
    ov_tokens(case.models, heads=case.heads, k=10)


def copying(case: WeightsCase) -> None:
    """Describe heads by norms, eigenvalues and 512 tokens' ranks."""
    weight_heads(case.subject, heads=case.heads)


def singular(case: WeightsCase) -> None:
    """Name heads' singular vectors."""
    singular_tokens(case.subject, heads=case.heads)


def composed(case: WeightsCase) -> None:
    """Score composition of all heads, whichever are chosen."""
    composition(case.subject)


def changes(case: WeightsCase) -> None:
    """Rank heads by their change."""
    head_changes(case.models, heads=case.heads)


def _all_heads(case: WeightsCase) -> int:
    return case.subject.anatomy.n_layers * case.subject.anatomy.n_heads


def _job(
    name: str,
    what: str,
    run: Callable[[WeightsCase], None],
    seconds: int,
    *,
    gib: float | None = None,
    compares: bool = False,
    count: Callable[[WeightsCase], int] = lambda case: case.n_heads,
) -> Job:
    """Define a job: half a minute each, once, as nothing here is quick enough for chance to matter."""
    return Job(
        name=f"weights_{name}",
        what=what,
        build=partial(build, compares=compares),
        run=run,
        beside=Beside("whole matrices, one per head", whole, count),
        gib=gib,
        rounds=1,
        slow=True,
        seconds=seconds,
    )


JOBS = (
    _job("ov", "top 10 entries of heads' whole OV circuits", ov, 35, gib=3),
    _job("qk", "top 10 entries of heads' whole QK circuits", qk, 35, gib=3),
    _job("ov_sources", "top 10 targets of 100 sources", ov_sources, 20, gib=3),
    _job("ov_change", "top 10 entries of what changed in OV circuits", ov_change, 45, gib=3, compares=True),
    _job("copying", "norms, eigenvalues, 512 tokens' ranks", copying, 20),
    _job("singular", "singular vectors in vocabulary space", singular, 20),
    _job("composition", "composition of all pairs of heads", composed, 30, count=_all_heads),
    _job("changes", "heads ranked by their change", changes, 20, compares=True),
)
