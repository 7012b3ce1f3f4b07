"""The models and texts that most of mechscope's own jobs share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.models import ANSWER, WRONG, make_model, make_texts
from benchmarks.settings import Settings
from benchmarks.shapes import Size
from mechscope.data.pairs import Pairs, from_tokens
from mechscope.subject.load import Subject, load

# what a tuned model's weights moved by, beside weights of spread 0.04
MOVED = 0.002


@dataclass(frozen=True, eq=False)
class PairsCase:
    """A model, pairs of texts, and for the jobs that compare a tuned model.

    Attributes:
        subject: The model.
        pairs: Clean and corrupt texts with a right and a wrong answer.
        changed: The tuned model, if there is one.
    """

    subject: Subject
    pairs: Pairs
    changed: Subject | None = None

    @cached_property
    def ids(self) -> Tensor:
        """The clean texts as one batch."""
        return torch.tensor([pair.clean for pair in self.pairs], device=self.subject.device)

    @cached_property
    def corrupt(self) -> Tensor:
        """The corrupt texts as one batch."""
        return torch.tensor([pair.corrupt for pair in self.pairs], device=self.subject.device)

    @property
    def tuned(self) -> Subject:
        """The tuned model."""
        if self.changed is None:
            raise ValueError("this case was built without a tuned model")
        return self.changed

    @property
    def texts(self) -> int:
        """How many texts."""
        return len(self.pairs)

    @property
    def tokens(self) -> int:
        """Of all texts together."""
        return self.ids.numel()

    @property
    def each(self) -> int:
        """Of each text."""
        return self.ids.shape[1]

    def small(self) -> PairsCase:
        """Return two texts of eight tokens."""
        short = (replace(pair, clean=pair.clean[:8], corrupt=pair.corrupt[:8], target=(1, 8)) for pair in self.pairs.first(2))
        return PairsCase(self.subject, Pairs(tuple(short), self.pairs.source), self.changed)


def build(settings: Settings, size: Size) -> PairsCase:
    """Make the model and random pairs."""
    clean, corrupt = make_texts(settings.shape, size)
    answered = tuple(replace(pair, answers=(ANSWER,), wrong_answers=(WRONG,)) for pair in from_tokens(clean, corrupt))
    return PairsCase(load(make_model(settings.shape, device=settings.device)), Pairs(answered, "random"))


def build_two(settings: Settings, size: Size) -> PairsCase:
    """Make the model, its tuned version and random pairs."""
    return replace(build(settings, size), changed=load(make_model(settings.shape, device=settings.device, noise=MOVED)))


@torch.no_grad()
def forward(case: PairsCase) -> Tensor:
    """Run the plain forward pass, logits included."""
    return case.subject.plain(case.ids, use_cache=False).logits


@torch.no_grad()
def backbone(case: PairsCase) -> None:
    """Run the plain forward pass up to the last residual stream."""
    case.subject.anatomy.backbone(case.ids, use_cache=False)
