"""Edge attribution patching: what closing every edge would do, to first order, from a few forward and backward passes.

    score(u→v) = Σ (u's value in the other run − u's clean value) · ∂metric/∂(what v reads)         over positions; mean over texts

    eap                  the gradient of the clean run                                                         Syed et al. 2023
    clean-corrupted      the mean of the clean and the corrupt run's gradients                                 Hanna et al. 2024
    eap-ig               the mean over m points between the corrupt and the clean embedding                    Hanna et al. 2024
    eap-ig-activations   for each sender layer, the mean over m points between what it writes in both runs     Marks et al. 2024

Integrated gradients mend what a single gradient misses where the metric is flat at one end. The score of a node is the sum over the edges that
leave it (`EdgeScores.node_table`): attribution patching.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechscope import ranks
from mechscope.choices import GradientMethod, PathPoints
from mechscope.circuits.contraction import Contraction
from mechscope.circuits.graph import Graph
from mechscope.circuits.receiver_gradients import ReceiverGradients
from mechscope.circuits.scores import Cost, EdgeScores
from mechscope.circuits.sender_outputs import SITES, SenderOutputs, Source, differences, require_source, scaled, source_name, written_in
from mechscope.data.metrics import Metric
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, check_fits, metric_of
from mechscope.errors import SettingsError
from mechscope.instrument import CachedRun, Reading
from mechscope.instrument.execution import Execution
from mechscope.instrument.substitutes import stubbed
from mechscope.instrument.walk import Walk
from mechscope.instrument.wiring import Wiring
from mechscope.settings.discovery import check_combination
from mechscope.subject import Subject

METHODS: tuple[GradientMethod, ...] = get_args(GradientMethod)
# those whose scores depend on how many points there are and where
_INTEGRATED = ("eap-ig", "eap-ig-activations")
# most per-text scores that are held: 800 MB in float32
_MOST_PER_TEXT = 200_000_000


def attribute_edges(
    subject: Subject,
    pairs: Pairs,
    *,
    method: GradientMethod = "eap-ig",
    steps: int = 5,
    points: PathPoints = "left",
    metric: str = "logit-diff",
    source: Source = "corrupt",
    execution: Execution = Execution(),
) -> EdgeScores:
    """Score every edge of a model by gradients.

    Args:
        subject: The model.
        pairs: Clean and corrupt prompts.
        method: One of `METHODS`.
        steps: Points m of the integrated gradients.
        points: Where they lie: `left` at k/m from the corrupt end, k = 0 … m − 1, as in the authors' code; `midpoint` at (k + ½)/m, which converges
            faster.
        metric: One of `mechscope.data.metrics.METRICS`.
        source: What edges carry when they are closed: the corrupt run's values, `zero`, or means (`SenderOutputs.mean_over`); `eap-ig` and `clean-corrupted`
            need the corrupt run.
        execution: Tokens of a batch (256 by default; they decide the memory), progress.

    Returns:
        Scores with `per_text` (kept unless there are more than 2·10⁸ of them); negative where closing the edge lowers the metric.

    Raises:
        MechscopeError: Pairs, metric, method or source do not fit the model or each other.
    """
    _check_method(method, steps=steps, points=points, metric=metric, source=source)
    check_fits(subject, pairs)
    require_source(pairs, source)
    graph, wiring = Graph.of(subject), Wiring(subject)
    gathered, keep = PerText(pairs), len(pairs) * len(graph) <= _MOST_PER_TEXT
    total = np.zeros(len(graph))

    def scores(batch: PairBatch) -> dict[str, np.ndarray]:
        nonlocal total
        scored = _Scored(subject, wiring, graph, batch, metric, source)
        if method == "eap-ig-activations":
            scored.along_activations(_fractions(steps, points))
        else:
            scored.along_inputs({"eap": [1.0], "clean-corrupted": [1.0, 0.0]}.get(method) or _fractions(steps, points))
        by_text = graph.flat(scored.scores.float().cpu().numpy() if subject.dtype != torch.float64 else scored.scores.cpu().numpy())
        total += by_text.sum(0, dtype=np.float64)  # nothing can fail after this
        return {"scores": by_text.T} if keep else {}

    gathered.run(scores, execution, tokens=256, label=f"scoring edges by {method}")
    per_text = gathered["scores"].T if keep else None
    total = np.sum(ranks.exchange(total), axis=0)
    integrated = {"steps": steps, "points": points} if method in _INTEGRATED else {}
    notes = {"metric": metric, "source": source_name(source), **integrated, "texts": pairs.hash}
    return EdgeScores(graph, total / len(pairs), per_text, method, _cost(graph, method, steps, points, metric, source), notes)


def _fractions(steps: int, points: PathPoints) -> list[float]:
    """Return the shares of the clean end at which gradients are taken."""
    return [(step + (0.5 if points == "midpoint" else 0.0)) / steps for step in range(steps)]


def _cost(graph: Graph, method: GradientMethod, steps: int, points: PathPoints, metric: str, source: Source) -> Cost:
    # means and zero need no run of their own; the metric kl runs the clean texts once more to compare with
    other, again = int(source == "corrupt" or isinstance(source, Subject)), int(metric == "kl")
    match method:
        case "eap":
            return Cost(1 + other, 1)
        case "clean-corrupted":
            return Cost(3 + again, 2)
        case "eap-ig":
            # the left end gives the corrupt run's values
            return Cost(1 + again + (points == "midpoint") + steps, steps)
    # from the input all blocks run; from each layer's heads it and those behind it; from its MLP those behind it
    passes = steps * (graph.n_layers + 1)
    return Cost(1 + other + passes, passes)


def _check_method(method: str, *, steps: int, points: str, metric: str, source: object) -> None:
    if method not in METHODS:
        raise SettingsError(f"method {method!r} is not known: use one of {', '.join(METHODS)}")
    if points not in get_args(PathPoints):
        raise SettingsError(f"points {points!r} are not known: use {' or '.join(get_args(PathPoints))}")
    if steps < 1:
        raise SettingsError(f"integrated gradients need at least one step, not {steps}")
    check_combination(method, metric=metric, source=source)


class _Scored:
    """The scores of one batch, ``(batch, sender, receiver)``, filled pass by pass."""

    def __init__(self, subject: Subject, wiring: Wiring, graph: Graph, batch: PairBatch, metric: str, source: Source) -> None:
        self.subject, self.wiring, self.graph, self.batch, self.source = subject, wiring, graph, batch, source
        self.clean_run = CachedRun(subject, batch.clean, batch.real, sites=SITES) if metric == "kl" else None
        self.metric: Metric = metric_of(metric, batch, self.clean_run)
        self.reading = Reading.of(self.metric.where)
        self.real = None if bool(batch.real.all()) else batch.real
        self.walk = Walk(subject, batch.clean.to(subject.device), self.real)
        self.scores = torch.zeros(len(batch.pairs), *graph.real.shape, dtype=subject.dtype, device=self.walk.hidden.device)

    def along_inputs(self, fractions: Sequence[float]) -> None:
        """Add the gradients at some points between the corrupt (0) and the clean (1) embedding."""
        given = self.walk.hidden
        corrupt = given if self.source != "corrupt" else Walk(self.subject, self.batch.corrupt.to(self.subject.device), self.real).hidden
        # a gradient pass at an end gives that end's values too
        clean = None if 1.0 in fractions else self._of(self.batch.clean)
        from_pass = clean is not None and 0.0 in fractions
        other = self._of(self.batch.corrupt) if self.source == "corrupt" and not from_pass else None
        summed = Contraction(self.graph, self.wiring, self.reading)
        for fraction in sorted(fractions, key=lambda share: share not in (0.0, 1.0)):
            hidden = given if fraction == 1.0 else corrupt + fraction * (given - corrupt)
            readings = self._read(hidden.detach().requires_grad_(), 0)
            clean = clean or self._written(readings, given)
            other = other or (self._written(readings, corrupt) if from_pass else written_in(self.source, self.batch, clean))
            summed.add(readings, 1 / len(fractions))
        if clean is not None and other is not None:  # as after any point
            summed.into(self.scores, self._apart(other, clean))

    def along_activations(self, fractions: Sequence[float]) -> None:
        """For each layer's heads, each MLP and the input, add gradients at points between what they write in both runs."""
        run = self.clean_run or CachedRun(self.subject, self.batch.clean, self.batch.real, sites=SITES)
        clean = SenderOutputs.by(run, self.wiring)
        other = written_in(self.source, self.batch, clean)
        apart = self._apart(other, clean)
        for stage in self._stages(run, clean, other):
            summed = Contraction(self.graph, self.wiring, self.reading)
            for fraction in fractions:
                summed.add(stage.read(self, fraction), 1 / len(fractions))
            summed.into(self.scores, apart, stage.senders)

    def _stages(self, run: CachedRun, clean: SenderOutputs, other: SenderOutputs) -> Iterator[_Stage]:
        graph = self.graph
        change = (other.embedding.to(clean.embedding.device) - clean.embedding).expand_as(clean.embedding)
        yield _Stage(slice(0, 1), 0, run.input_of(0), change, inside=False)
        for layer in range(graph.n_layers):
            written = run.recording["attention_output", layer]
            change = other.attention(layer).to(written.device) - clean.attention(layer)
            yield _Stage(graph.heads_of(layer), layer, run.input_of(layer), change.expand_as(written), inside=True, written=written)
            place, after = graph.mlp_sender(layer), run.recording["residual", layer]
            change = (other.mlp[layer].to(after.device) - clean.mlp[layer]).expand_as(after)
            yield _Stage(slice(place, place + 1), layer + 1, after, change, inside=False)

    def _read(self, hidden: Tensor, first: int) -> ReceiverGradients:
        return ReceiverGradients(self.walk, self.wiring, self.metric, self.reading, lambda walk: (hidden, first))

    def _of(self, ids: Tensor) -> SenderOutputs:
        return SenderOutputs.by(CachedRun(self.subject, ids, self.batch.real, sites=SITES), self.wiring)

    def _written(self, readings: ReceiverGradients, embedding: Tensor) -> SenderOutputs:
        layers = range(self.graph.n_layers)
        with torch.no_grad():
            z = [scaled(self.wiring, layer, readings.z[layer]) for layer in layers]
            return SenderOutputs(embedding.detach(), z, [readings.mlp[layer] for layer in layers], self.wiring)

    @torch.no_grad()
    def _apart(self, other: SenderOutputs, clean: SenderOutputs) -> Float[Tensor, "sender batch token d_model"]:
        return differences(self.graph, other, clean)


@dataclass(frozen=True)
class _Stage:
    """Senders that write at one place, and the pass that begins there with a mixture of both runs.

    Attributes:
        senders: Which senders.
        layer: First block that runs.
        hidden: The clean stream there.
        change: What they would add to it in the other run.
        inside: Whether they write inside that block (its heads).
        written: What its attention writes in the clean run, for heads.
    """

    senders: slice
    layer: int
    hidden: Tensor
    change: Tensor
    inside: bool
    written: Tensor | None = None

    def read(self, scored: _Scored, fraction: float) -> ReceiverGradients:
        """Run from here with a share of the clean values."""

        def begin(walk: Walk) -> tuple[Tensor, int]:
            if self.written is None:
                return (self.hidden + (1 - fraction) * self.change).requires_grad_(), self.layer
            block = scored.subject.anatomy.blocks[self.layer]
            mixed = (self.written + (1 - fraction) * self.change).requires_grad_()
            if block.attention_write is block.attention:
                with stubbed(block.attention, (mixed, None)):
                    return walk.step(self.layer, self.hidden), self.layer + 1
            with stubbed(block.attention, (self.hidden, None)), stubbed(block.attention_write, mixed):
                return walk.step(self.layer, self.hidden), self.layer + 1

        return ReceiverGradients(scored.walk, scored.wiring, scored.metric, scored.reading, begin)
