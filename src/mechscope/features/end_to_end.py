"""Training end to end: a dictionary learns to keep what the model predicts, and not only what it holds (Braun et al. 2024).

Every step takes whole texts. The model runs on them once as it is; what stands at the place is encoded, and the model runs on from the place's block with the
reconstruction there:

    L = reconstruction · Σ(v̂ − v)² + end_weight · mean over predicted tokens of KL(p ‖ p̂)        or of −log p̂ of the next token, and penalties

One backward pass through the blocks behind gives ∂L/∂v̂; all other gradients follow from it by the products for sparse codes (`mechscope.features.step`), so
that nothing is differentiated through the dictionary. Logits are held for some hundred tokens at a time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mechscope import ranks
from mechscope.data.pairs import PairBatch, Pairs, collate_pairs
from mechscope.errors import DataError, SettingsError
from mechscope.features.activations import Block, Live
from mechscope.features.batches import Position
from mechscope.features.learner import Learner
from mechscope.features.places import Place
from mechscope.features.rows import blocks
from mechscope.features.step import Ahead
from mechscope.features.trainer import Plan, TrainedDictionary, Training
from mechscope.instrument import Execution, Walk, intervene, record, unembed
from mechscope.settings.features import FeatureTraining, HarvestSettings, Objective, TokenSettings
from mechscope.subject import Subject

# rows of logits held at once
_LOGITS = 256


def train_end_to_end(
    subject: Subject,
    texts: Pairs,
    plans: Mapping[str, Plan],
    folder: str | Path | None = None,
    *,
    training: FeatureTraining | None = None,
    tokens: TokenSettings | None = None,
    keep_every: int = 500,
    execution: Execution = Execution(),
) -> dict[str, TrainedDictionary]:
    """Train dictionaries for what the model predicts; those whose objective has no `end` learn beside them from the same texts.

    Args:
        subject: The model.
        texts: The texts; their clean versions are read, in a new random order in every round.
        plans: The dictionaries by name.
        folder: As for `train`.
        training: Steps, tokens of a step (about: texts are whole), learning rate.
        tokens: Which tokens go through no dictionary.
        keep_every: Steps between states that are kept.
        execution: Seed, progress.

    Raises:
        SettingsError: A plan contradicts itself, or several ranks are to train.
        MechscopeError: As for `train` and `Live`.
    """
    if ranks.size() > 1:
        raise SettingsError("end-to-end training runs in one process: start it without a launcher")
    training, kept = training or FeatureTraining(), tokens or TokenSettings()
    where = tuple(dict.fromkeys(place for plan in plans.values() for place in plan.layout.places))
    settings = HarvestSettings(first=kept.first, outlier=kept.outlier, rows=training.batch)
    live = Live(subject, texts, where, settings=settings, execution=execution)
    return _EndToEnd(subject, texts, live, plans, training, keep_every, execution).kept(folder)


class _EndToEnd(Training):
    """Dictionaries that learn from whole texts and from what the model makes of them."""

    def __init__(
        self,
        subject: Subject,
        texts: Pairs,
        live: Live,
        plans: Mapping[str, Plan],
        training: FeatureTraining,
        keep_every: int,
        execution: Execution,
    ) -> None:
        super().__init__(live, plans, training, subject.device, keep_every, execution)
        self._subject, self._texts, self._live = subject, texts, live
        self._running: _Running
        self.request["end_to_end"] = True

    def stream(self) -> Iterator[tuple[Position, Block]]:
        """Yield whole texts; a round takes each once."""
        number, done = self.position.round, self.position.block
        while True:
            order = list(range(len(self._texts)))
            random.Random(f"{self.execution.seed}/{number}").shuffle(order)
            given = 0
            for at, chosen in enumerate(blocks(self._texts, order, self.training.batch, self._live.settings.first)):
                if at < done:
                    continue
                self._running = _Running(self._subject, self._live, collate_pairs([self._texts.pairs[index] for index in chosen]))
                rows = self._running.rows()
                if len(next(iter(rows.values()))):
                    given += 1
                    yield Position(number, at + 1, 0), rows
            if not given and not done:
                raise DataError("no text has a token that goes through a dictionary: give longer texts, or set first=0")
            number, done = number + 1, 0

    def ahead(self, learner: Learner) -> Ahead | None:
        """Return what the reconstruction leads to."""
        if learner.objective.end == "none":
            return None
        (place,) = learner.layout.outputs
        scale, running, objective = self.maps[place], self._running, learner.objective

        def led(v: Tensor) -> tuple[Tensor, Tensor]:
            loss, gradient = running.led(place, scale.back(v), objective)
            # x̂ is v̂ divided by the scale
            return loss.to(v), (gradient / scale.scale).to(v)

        return led


class _Running:
    """A batch of texts in the model: its own run, and runs with something else at a place."""

    def __init__(self, subject: Subject, live: Live, batch: PairBatch) -> None:
        """Run the model as it is."""
        self._subject, self._batch, self._reader = subject, batch, live.reader
        self._real = None if bool(batch.real.all()) else batch.real
        layers = {place.layer for place in live.places}
        self._before: dict[int, Tensor] = {}
        with torch.no_grad(), record(subject, *dict.fromkeys(place.site for place in live.places), layers=layers) as recording:
            walk = Walk(subject, batch.clean, self._real)
            hidden = walk.hidden
            for layer in range(subject.anatomy.n_layers):
                if layer in layers:
                    self._before[layer] = hidden
                hidden = walk.step(layer, hidden)
        self._last = hidden
        self._streams = {place: place.of(recording) for place in live.places}
        self._kept, _ = live.reader.kept(batch, self._streams)
        self._predicts = batch.real[:, :-1] & batch.real[:, 1:]
        self._targets = batch.clean[:, 1:][self._predicts]

    def rows(self) -> Block:
        """Return what stands at the places for the tokens that go through dictionaries."""
        return {place: value[self._kept.to(value.device)].float() for place, value in self._streams.items()}

    def led(self, place: Place, x: Float[Tensor, "row width"], objective: Objective) -> tuple[Tensor, Tensor]:
        """Return the loss of the model with something else at a place, and its gradient of that."""
        leaf = x.detach().to(self._streams[place].dtype).requires_grad_()

        def put(current: Tensor) -> Tensor:
            new = current.clone()
            new[self._kept.to(current.device)] = leaf.to(current)
            return new

        with intervene(self._subject, place.edit(put)):
            # masks are made for the attention that runs, so that of the first run will not do
            with torch.no_grad():
                walk = Walk(self._subject, self._batch.clean, self._real)
            with torch.enable_grad():
                last = walk.run(self._before[place.layer], start=place.layer)
        loss, gradient = self._ended(last.detach(), objective)
        (towards,) = torch.autograd.grad(last, leaf, gradient.to(last))
        return loss * objective.end_weight, towards.float() * objective.end_weight

    def _ended(
        self, last: Float[Tensor, "batch token d_model"], objective: Objective
    ) -> tuple[Tensor, Float[Tensor, "batch token d_model"]]:
        """Return the mean loss over predicted tokens, and its gradient of the last residual stream."""
        where = self._predicts.to(last.device)
        rows, own, count = last[:, :-1][where], self._last[:, :-1][where], max(len(self._targets), 1)
        found, total = torch.zeros_like(rows), torch.zeros((), device=last.device)
        for start in range(0, len(rows), _LOGITS):
            part = slice(start, start + _LOGITS)
            with torch.enable_grad():
                leaf = rows[part].detach().requires_grad_()
                spoken = unembed(self._subject, leaf).float().log_softmax(-1)
                if objective.end == "kl":
                    with torch.no_grad():
                        said = unembed(self._subject, own[part]).float().log_softmax(-1)
                    loss = (said.exp() * (said - spoken)).sum() / count
                else:
                    loss = -spoken.gather(1, self._targets[part].to(spoken.device)[:, None]).sum() / count
            (found[part],) = torch.autograd.grad(loss, leaf)
            total = total + loss.detach()
        gradient = torch.zeros_like(last)
        gradient[:, :-1][where] = found
        return total, gradient
