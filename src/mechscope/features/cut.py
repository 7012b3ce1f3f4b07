"""A pass in which what stands at some places is cut off from what comes before it, so that gradients hold between neighbours only.

At every place x enters as a leaf of the graph, and what arrived there is kept as a function of the leaves before. The derivative of an arrival by an earlier
leaf is then that along the paths on which no other place lies (Marks et al. 2024, §3.3: gradients stopped at the nodes between), and going back from place to
place gives the whole derivative of the metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.data.metrics import Metric
from mechscope.data.scoring import differentiable_score
from mechscope.features.places import Place
from mechscope.features.standing import Standing, Stream
from mechscope.instrument import CachedRun, Edit, Reading, Walk, intervene
from mechscope.instrument.attention import observed
from mechscope.shapes import by_shape


@dataclass(frozen=True)
class Cut:
    """A pass that was cut at some places.

    Attributes:
        score: ``(batch)``: the metric, a function of the leaves.
        leaves: What stands at each place.
        arrivals: What arrived there, a function of earlier leaves; of the first place a constant.
    """

    score: Float[Tensor, " batch"]
    leaves: dict[Place, Stream]
    arrivals: dict[Place, Stream]

    __repr__ = by_shape

    def back(self, arrived: Place | None, vector: Tensor | None, to: Sequence[Place]) -> dict[Place, Stream]:
        """Carry a vector from where it arrived, or one from the metric (None), to the leaves of earlier places, along the paths between.

        Args:
            arrived: The place; None for the metric of each text.
            vector: ``(batch, token, width)``; None for the metric.
            to: The leaves; those that the end does not depend on get zeros.
        """
        end = self.score if arrived is None else self.arrivals[arrived]
        leaves = [self.leaves[place] for place in to]
        if not leaves or not end.requires_grad:
            return {place: torch.zeros_like(leaf) for place, leaf in zip(to, leaves, strict=True)}
        seed = torch.ones_like(end) if vector is None else vector.to(end)
        found = torch.autograd.grad([end], leaves, [seed], retain_graph=True, allow_unused=True)
        return {
            place: torch.zeros_like(leaf) if gradient is None else gradient for place, leaf, gradient in zip(to, leaves, found, strict=True)
        }

    def total(self) -> dict[Place, Stream]:
        """Return the whole derivative of the metric by what stands at each place, through all later places too."""
        order = list(self.leaves)
        gradients = self.back(None, None, order)
        for at in range(len(order) - 1, 0, -1):
            for place, part in self.back(order[at], gradients[order[at]], order[:at]).items():
                gradients[place] = gradients[place] + part
        return gradients


def cuts(
    standing: Sequence[Standing], given: Mapping[Place, Stream] | None = None
) -> tuple[list[Edit], dict[Place, Stream], dict[Place, Stream]]:
    """Return the edits that cut a pass at some places, and, filled by that pass, the leaves and the arrivals of `Cut`.

    Args:
        standing: What stands there.
        given: What stands at a place instead of what arrives.
    """
    leaves: dict[Place, Tensor] = {}
    arrivals: dict[Place, Tensor] = {}

    def cut(each: Standing, arrived: Stream) -> Stream:
        value = arrived.detach() if given is None or each.place not in given else given[each.place].to(arrived)
        arrivals[each.place], leaves[each.place] = arrived, value.detach().clone().requires_grad_()
        return leaves[each.place]

    return [each.place.edit(partial(cut, each)) for each in standing], leaves, arrivals


class Cuttable:
    """A batch that can be run with cuts, from the block of the first of them on.

    Attributes:
        run: The run of the batch as it is; it holds what stands at the places.
        metric: What it is judged by.
    """

    def __init__(self, run: CachedRun, metric: Metric) -> None:
        """Prepare passes of a run's batch."""
        self.run = run
        self.metric = metric
        self._reading = Reading.of(metric.where)
        with observed(run.subject):
            self._walk = Walk(run.subject, run.input_ids, run.real)

    def cut(self, standing: Sequence[Standing], given: Mapping[Place, Stream] | None = None) -> Cut:
        """Run with cuts at some places, in the order of the run.

        Args:
            standing: What stands there.
            given: What stands at a place instead of what arrives.
        """
        edits, leaves, arrivals = cuts(standing, given)
        start = standing[0].place.layer
        subject = self.run.subject
        with torch.enable_grad(), observed(subject), intervene(subject, *edits):
            hidden = self._walk.run(self.run.input_of(start), start=start)
            read = self._reading.take(hidden[None])[0]
            score = differentiable_score(subject, read, self.metric)
        return Cut(score, leaves, arrivals)


def counted(real: Bool[Tensor, "batch token"], standing: Sequence[Standing], *runs: Mapping[Place, Stream]) -> Bool[Tensor, "batch token"]:
    """Return the tokens at which latents and errors are nodes: those that every dictionary is meant to read, by what stands at its place in every run."""
    return torch.stack([each.reads(real, *(run[each.place] for run in runs)) for each in standing]).all(0)
