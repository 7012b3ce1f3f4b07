"""Latents and errors replaced in a run: one at a time, the oracle of what gradients estimate, or all but those of a circuit.

Nodes take their value on the corrupt text, zero, or their mean over reference texts. With f' and ε' for these, and x' for what they make together, a run in
which only the nodes of C are as they are has, place after place,

    x' + Σ_{j in C} (f_j(x) − f'_j) D_j + [ε in C] (ε(x) − ε')

where x is what arrives in that very run; and x minus the same sum is the run without C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.choices import Filling
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, Runs, check_fits, metric_of
from mechscope.errors import SettingsError
from mechscope.features.cut import counted
from mechscope.features.node_effects import TOKENS_PER_BATCH
from mechscope.features.places import Place
from mechscope.features.standing import Node, Standing, Stream, require
from mechscope.instrument import CachedRun, Edit, Execution, Recording
from mechscope.instrument.texts import over_texts
from mechscope.shapes import by_shape
from mechscope.subject import Subject


@dataclass(frozen=True)
class Means:
    """Means over the tokens of reference texts at one place.

    Attributes:
        x: ``(width)``: of what stands there.
        latents: ``(latent)``: of every latent.
    """

    x: Float[Tensor, " width"]
    latents: Float[Tensor, " latent"]

    __repr__ = by_shape


@torch.no_grad()
def node_means(
    subject: Subject, standing: Sequence[Standing], reference: Pairs, *, execution: Execution = Execution()
) -> dict[Place, Means]:
    """Average latents and activations over the clean texts' tokens that count.

    Args:
        subject: The model.
        standing: The autoencoders.
        reference: The texts.
        execution: Tokens of a batch (1,024 by default), progress.

    Raises:
        MechscopeError: The texts do not fit the model, or no token counts.
    """
    check_fits(subject, reference)
    sites = {each.place.site for each in standing}

    def sums(batch: PairBatch) -> tuple[int, list[tuple[Tensor, Tensor]]]:
        run = CachedRun(subject, batch.clean, batch.real, sites=sites)
        x, found = {each.place: each.read(run.recording) for each in standing}, []
        real = counted(batch.real, standing, x)
        for each in standing:
            rows = x[each.place][real]
            codes = each.dictionary.encode([rows])
            found.append((rows.double().sum(0), codes.total(codes.values).double()))
        return int(real.sum()), found

    tokens, totals = 0, list[tuple[Tensor, Tensor]]()
    for _, (number, found) in over_texts(reference, sums, execution, tokens=TOKENS_PER_BATCH, label="means of latents"):
        tokens += number
        totals = [(a + c, b + d) for (a, b), (c, d) in zip(totals, found, strict=True)] if totals else found
    if not tokens:
        raise SettingsError("no token of the reference texts counts: each is shorter than what the dictionaries leave out")
    return {
        each.place: Means((x / tokens).to(each.decoders), (latents / tokens).to(each.decoders))
        for each, (x, latents) in zip(standing, totals, strict=True)
    }


@dataclass(frozen=True)
class Filled:
    """What stands in the place of the nodes of one place that are left out.

    Attributes:
        x: ``(batch, token, width)``, or ``(width)``: all of them together.
        error: The same of the error.
        values: Returns f' of some latents, ``(batch, token, chosen)`` or ``(chosen)``.
    """

    x: Tensor
    error: Tensor
    values: Callable[[Sequence[int]], Tensor]


class Fillings:
    """What stands in the place of nodes that are left out, for one batch."""

    def __init__(
        self,
        subject: Subject,
        standing: Sequence[Standing],
        batch: PairBatch,
        filling: Filling,
        means: Mapping[Place, Means] | None,
        corrupt: CachedRun | None = None,
    ) -> None:
        """Run the corrupt texts where they are needed and are not given; `SettingsError` where means are needed and missing."""
        if filling == "mean" and means is None:
            raise SettingsError("the mean of latents is that over reference texts: give means (node_means)")
        if filling == "corrupt" and corrupt is None:
            corrupt = CachedRun(subject, batch.corrupt, batch.real, sites={each.place.site for each in standing})
        self._standing, self._real = standing, batch.real
        self._corrupt, self._filling, self._means = corrupt, filling, means
        self._found: dict[Place, Filled] = {}

    def counted(self, clean: Recording) -> Bool[Tensor, "batch token"]:
        """Return the tokens at which nodes are filled in, by what stands at the places as it is and in the corrupt run."""
        recordings = (clean,) if self._corrupt is None else (clean, self._corrupt.recording)
        return counted(self._real, self._standing, *({each.place: each.read(own) for each in self._standing} for own in recordings))

    def at(self, each: Standing) -> Filled:
        """Return what stands at a place; worked out once."""
        if each.place not in self._found:
            self._found[each.place] = self._fill(each)
        return self._found[each.place]

    def _fill(self, each: Standing) -> Filled:
        if self._filling == "zero":
            return Filled(each.nothing, torch.zeros_like(each.nothing), lambda latents: each.nothing.new_zeros(len(latents)))
        if self._filling == "mean" and self._means is not None:
            means = self._means[each.place]
            return Filled(means.x, means.x - means.latents @ each.decoders - each.nothing, lambda latents: means.latents[list(latents)])
        assert self._corrupt is not None
        x = each.read(self._corrupt.recording)
        return Filled(x, each.error(x), lambda latents: each.values(x, latents))


@dataclass(frozen=True)
class Chosen:
    """Nodes of one place.

    Attributes:
        latents: Which latents; None for all.
        error: Whether the error is among them.
    """

    latents: tuple[int, ...] | None
    error: bool


def only(standing: Sequence[Standing], chosen: Mapping[Place, Chosen], fillings: Fillings, real: Bool[Tensor, "batch token"]) -> list[Edit]:
    """Return the edits after which only some nodes are as they are, and all others are filled in."""
    edits = []
    for each in standing:
        own = chosen.get(each.place, Chosen((), False))
        if own.latents is None and own.error:
            continue

        def change(x: Stream, each: Standing = each, own: Chosen = own) -> Stream:
            return fillings.at(each).x + _own(each, own, fillings.at(each), x)

        edits.append(each.place.edit(change, real))
    return edits


def without(
    standing: Sequence[Standing], chosen: Mapping[Place, Chosen], fillings: Fillings, real: Bool[Tensor, "batch token"]
) -> list[Edit]:
    """Return the edits after which some nodes are filled in, and all others are as they are."""
    edits = []
    for each in standing:
        own = chosen.get(each.place, Chosen((), False))
        if not own.error and own.latents == ():
            continue

        def change(x: Stream, each: Standing = each, own: Chosen = own) -> Stream:
            return x.to(each.decoders) - _own(each, own, fillings.at(each), x)

        edits.append(each.place.edit(change, real))
    return edits


def _own(each: Standing, chosen: Chosen, filled: Filled, x: Stream) -> Tensor:
    """Return what the chosen nodes of x add beyond what they are filled with."""
    x = x.to(each.decoders)
    # all latents together are x without its error
    error = each.error(x) if chosen.latents is None or chosen.error else torch.zeros_like(x)
    total = torch.zeros_like(x)
    if chosen.latents is None:
        total = (x - error) - (filled.x - filled.error)
    elif chosen.latents:
        change = each.values(x, chosen.latents) - filled.values(chosen.latents)
        total = change @ each.decoders[list(chosen.latents)]
    return total + error - filled.error if chosen.error else total


def patch_nodes(
    subject: Subject,
    standing: Sequence[Standing],
    pairs: Pairs,
    nodes: Sequence[Node],
    *,
    filling: Filling = "corrupt",
    means: Mapping[Place, Means] | None = None,
    metric: str = "logit-diff",
    execution: Execution = Execution(),
) -> Float[np.ndarray, "node text"]:
    """Replace each of some nodes in the clean run, and return by how much the metric changes on each text: the truth that gradients estimate.

    Args:
        subject: The model.
        standing: The autoencoders, in the order of the run.
        pairs: The texts.
        nodes: Which nodes, one at a time.
        filling: What they become.
        means: For the filling `mean` (`node_means`).
        metric: `logit-diff`, `probability`, `loss` or `kl`.
        execution: Tokens of a batch (1,024 by default), progress.

    Raises:
        MechscopeError: Nodes, texts or metric do not fit the model or each other.
    """
    check_fits(subject, pairs)
    require(standing, nodes)
    gathered = PerText(pairs)

    @torch.no_grad()
    def patched(batch: PairBatch) -> dict[str, np.ndarray]:
        clean = CachedRun(subject, batch.clean, batch.real, sites={each.place.site for each in standing})
        runs = Runs(clean, metric_of(metric, batch, clean))
        fillings = Fillings(subject, standing, batch, filling, means)
        real = fillings.counted(clean.recording)
        units = [
            without(standing, {node.place: Chosen(() if node.latent is None else (node.latent,), node.latent is None)}, fillings, real)
            for node in nodes
        ]
        return {"effects": runs.of(units, progress=gathered.step) - runs.unchanged()}

    gathered.run(patched, execution, tokens=TOKENS_PER_BATCH, label="patching latents", units=len(nodes))
    return gathered["effects"]


def patch_places(
    subject: Subject,
    standing: Sequence[Standing],
    pairs: Pairs,
    *,
    filling: Filling = "corrupt",
    means: Mapping[Place, Means] | None = None,
    metric: str = "logit-diff",
    execution: Execution = Execution(),
) -> Float[np.ndarray, "place text"]:
    """Replace all nodes of each place in the clean run, and return by how much the metric changes: what the effects of its nodes should add up to.

    Args:
        subject: The model.
        standing: The autoencoders, in the order of the run.
        pairs: The texts.
        filling: What they become.
        means: For the filling `mean` (`node_means`).
        metric: `logit-diff`, `probability`, `loss` or `kl`.
        execution: Tokens of a batch (1,024 by default), progress.

    Raises:
        MechscopeError: Texts or metric do not fit the model or each other.
    """
    check_fits(subject, pairs)
    gathered = PerText(pairs)

    @torch.no_grad()
    def patched(batch: PairBatch) -> dict[str, np.ndarray]:
        clean = CachedRun(subject, batch.clean, batch.real, sites={each.place.site for each in standing})
        runs = Runs(clean, metric_of(metric, batch, clean))
        fillings = Fillings(subject, standing, batch, filling, means)
        real = fillings.counted(clean.recording)
        units = [only((each,), {}, fillings, real) for each in standing]
        return {"effects": runs.of(units, progress=gathered.step) - runs.unchanged()}

    gathered.run(patched, execution, tokens=TOKENS_PER_BATCH, label="patching places", units=len(standing))
    return gathered["effects"]
