"""Interchange: base texts run up to one place, ready to be run on with a part of the source texts' representation.

A pair is a base text (clean) and a source text (corrupt); its answers are right after the base text if the exchanged variable has the source's value.
What lies before the place is computed once, however often the pairs are run on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechscope.causal.places import Place
from mechscope.choices import Among
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import batches, check_fits
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import Edit, Walk, intervene, record, unembed
from mechscope.instrument.edits import EditSite
from mechscope.instrument.execution import Execution
from mechscope.instrument.texts import over_texts
from mechscope.subject import Subject

Position = str | int | Sequence[int]
R = TypeVar("R")


def exchange_edit(
    site: EditSite, layer: int, head: int | None, source: Tensor, mask: Tensor, projected: Callable[[Tensor], Tensor]
) -> Edit:
    def value(part: Tensor) -> Tensor:
        return part + projected(source.to(part) - part)

    return Place(site, layer, head).edit(value, mask)


@dataclass(frozen=True)
class Interchange:
    """A batch of pairs, run up to the layer in question: what lies before it is never computed again."""

    walk: Walk
    hidden: Float[Tensor, "batch token d_model"]
    source: Tensor
    mask: Bool[Tensor, "batch token"]
    place: Place
    last: Int[Tensor, " batch"]
    answers: Bool[Tensor, "batch vocab"]
    wrong: Bool[Tensor, "batch vocab"]

    @property
    def size(self) -> int:
        return len(self.last)

    def edit(self, projected: Callable[[Tensor], Tensor]) -> Edit:
        return exchange_edit(self.place.site, self.place.layer, self.place.head, self.source, self.mask, projected)

    def logits(self, subject: Subject, edit: Edit) -> Float[Tensor, "batch vocab"]:
        """Run the base texts from the layer on, with the interchange."""
        with intervene(subject, edit):
            hidden = self.walk.run(self.hidden, start=self.place.layer)
        rows = torch.arange(self.size, device=hidden.device)
        return unembed(subject, hidden[rows, self.last.to(hidden.device)])

    def loss(self, logits: Tensor) -> Tensor:
        """Return −log of the answers' summed probability, in nats, averaged over the pairs."""
        log_p = logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
        return -log_p.masked_fill(~self.answers.to(logits.device), -torch.inf).logsumexp(-1).mean()

    def correct(self, logits: Tensor, among: Among = "vocabulary") -> int:
        """Count the pairs whose likeliest token is an answer."""
        return int(self.right(logits, among).sum())

    def right(self, logits: Tensor, among: Among = "vocabulary") -> Bool[Tensor, " batch"]:
        """Tell of each pair whether its likeliest token is an answer."""
        if among == "answers":
            logits = logits.masked_fill(~(self.answers | self.wrong).to(logits.device), -torch.inf)
        return self.answers.to(logits.device).gather(1, logits.argmax(-1, keepdim=True))[:, 0]


def judged_by(pairs: Pairs, among: Among) -> Pairs:
    """Refuse pairs whose answers cannot be judged among these tokens."""
    if among not in ("vocabulary", "answers"):
        raise SettingsError(
            f"among {among!r} is not known: use vocabulary (the likeliest of all tokens) or answers (of right and wrong ones)"
        )
    for pair in pairs if among == "answers" else ():
        if not pair.wrong_answers:
            raise DataError(f"pair {pair.id!r} names no wrong answer: give the base text's label, or judge among='vocabulary'")
    return pairs


@torch.no_grad()
def _interchange(subject: Subject, batch: PairBatch, place: Place, position: Position) -> Interchange:
    walks, hiddens = [], []
    for ids in (batch.clean, batch.corrupt):
        walk = Walk(subject, ids, batch.real)
        hidden = walk.hidden
        for layer in range(place.layer):
            hidden = walk.step(layer, hidden)
        walks.append(walk)
        hiddens.append(hidden)
    with record(subject, cast(Any, place.site), layers=[place.layer]) as recording:
        walks[1].step(place.layer, hiddens[1])
    source = recording[place.site, place.layer]
    answers = torch.zeros(len(batch.pairs), subject.anatomy.vocab_size, dtype=torch.bool, device=subject.device)
    wrong = answers.clone()
    for row, pair in enumerate(batch.pairs):
        answers[row, list(pair.answers)] = True
        wrong[row, list(pair.wrong_answers)] = True
    last = torch.tensor([batch.shift(row) + len(pair.clean) - 1 for row, pair in enumerate(batch.pairs)])
    return Interchange(walks[0], hiddens[0], source, batch.positions(position), place, last, answers, wrong)


def interchanges(subject: Subject, pairs: Pairs, place: Place, position: Position, tokens_per_batch: int) -> Iterator[Interchange]:
    """Yield the batches to learn from: never halved, as a batch is a step."""
    _check(subject, pairs)
    for batch in batches(pairs, tokens_per_batch):
        yield _interchange(subject, batch, place, position)


def judgements(
    judge: Callable[[Interchange], R],
    subject: Subject,
    pairs: Pairs,
    place: Place,
    position: Position,
    execution: Execution,
    *,
    tokens: int,
) -> Iterator[R]:
    """Yield the judgement of every batch, or of its halves where it does not fit into memory."""
    _check(subject, pairs)
    for _, judgement in over_texts(pairs, lambda batch: judge(_interchange(subject, batch, place, position)), execution, tokens=tokens):
        yield judgement


def _check(subject: Subject, pairs: Pairs) -> None:
    check_fits(subject, pairs)
    for pair in pairs:
        if not pair.answers:
            raise DataError(
                f"pair {pair.id!r} names no answer: give what is right after the base text when the variable has the source's value"
            )
