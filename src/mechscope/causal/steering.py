"""Steering: push a model along a direction of its activations, or take the direction away.

A direction is a vector at one site of one layer: the difference of two sets' mean activations (Marks & Tegmark 2023; Panickssery et al. 2023), a
probe's weight or a sparse feature. Adding it, `h + strength · v`, turns the model (Turner et al. 2023); projecting it out, `h − (h·d̂) d̂`, takes
from the model what it says there (Arditi et al. 2024). Both hold for any forward pass, `generate` included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.causal.effects import effects
from mechscope.causal.marked_prompt import MarkedPrompt
from mechscope.causal.places import Place, site_named
from mechscope.data.pairs import PairBatch, Pairs, Where
from mechscope.data.scoring import PerText, Runs, check_fits, metric_of
from mechscope.errors import SettingsError
from mechscope.instrument import CachedRun, Edit, intervene, record
from mechscope.instrument.edits import EditSite, Value, validate
from mechscope.instrument.execution import Execution
from mechscope.instrument.texts import over_texts
from mechscope.instrument.walk import run_backbone
from mechscope.shapes import by_shape
from mechscope.subject import Subject

# sites that hold one vector per token (of z: per token and head)
VECTOR_SITES = ("embedding", "residual", "attention_output", "mixer_output", "neuron", "mlp_output", "z")


@dataclass(frozen=True)
class Direction:
    """A vector at one site of a model.

    Attributes:
        vector: ``(features)``: d_model, d_mlp of site `neuron`, d_head of site `z`.
        site: Where in the block.
        layer: Which block.
        head: Which head, of site `z`.
        name: What a table calls it.
    """

    vector: Float[Tensor, " features"]
    site: EditSite
    layer: int
    head: int | None = None
    name: str = "direction"

    __repr__ = by_shape

    @classmethod
    def from_vector(
        cls, vector: Float[Tensor, " features"], *, site: str = "residual", layer: int, head: int | None = None, name: str = "direction"
    ) -> Direction:
        """Take a given vector: a probe's weight, a sparse feature's decoder row.

        Args:
            vector: ``(features)``.
            site: `residual`, `attention`, `mlp`, `neuron`, `embedding`, or `head` (its z).
            layer: Which block.
            head: Which head, of site `head`.
            name: What a table calls it.

        Raises:
            SettingsError: The site holds no vectors, the head is missing or too much, or the vector is not one finite vector.
        """
        if vector.ndim != 1:
            raise SettingsError(f"direction {name!r} has shape {tuple(vector.shape)}: give one vector, (features)")
        if not bool(torch.isfinite(vector).all()):
            raise SettingsError(f"direction {name!r} holds values that are NaN or infinite: look at where it comes from")
        return cls(vector.detach(), vector_site(site, head), layer, head, name)

    def unit(self) -> Direction:
        """Return the direction with length 1.

        Raises:
            SettingsError: It has no length.
        """
        norm = self.vector.double().norm()
        if norm == 0:
            raise SettingsError(f"direction {self.name!r} is zero, so it points nowhere: take other texts or another layer")
        return replace(self, vector=(self.vector.double() / norm).to(self.vector.dtype))

    def random_like(self, seed: int) -> Direction:
        """Return a random direction of equal length at the same place: the control."""
        drawn = torch.randn(self.vector.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        drawn = (drawn / drawn.norm()).to(self.vector.device) * self.vector.double().norm()
        return replace(self, vector=drawn.to(self.vector.dtype), name="random")

    def check(self, subject: Subject) -> None:
        """Refuse a model this direction does not fit.

        Raises:
            SettingsError: The model has no such layer or head, or the vector has another width.
        """
        place = Place(self.site, self.layer, self.head)
        validate([place.edit(0.0)], subject.anatomy)
        width = features_at(subject, self.site, self.layer)
        if len(self.vector) != width:
            raise SettingsError(f"direction {self.name!r} has {len(self.vector)} features, {place} of the model has {width}")


def vector_site(site: str, head: int | None) -> EditSite:
    """Return the site a person means, if it holds one vector per token.

    Raises:
        SettingsError: It does not, or a head is missing or too much.
    """
    chosen = site_named(site)
    if chosen not in VECTOR_SITES:
        raise SettingsError(f"site {site!r} does not hold one vector per token: use one of {', '.join(VECTOR_SITES)}")
    if (chosen == "z") != (head is not None):
        problem = "site 'z' belongs to heads: say which, e.g. head=3" if head is None else f"site {site!r} has no heads: leave head out"
        raise SettingsError(problem)
    return chosen


def check_vector_place(subject: Subject, site: str, layer: int, head: int | None, dimensions: int | None = None) -> Place:
    """Return a place that holds one vector per token.

    Args:
        subject: The model.
        site: `residual`, `attention`, `mlp`, `neuron`, `embedding`, or `head` (its z).
        layer: Which block.
        head: Which head, of site `head`.
        dimensions: How many the vector must have at least.

    Raises:
        SettingsError: The model has no such place, it holds no vectors, or they have fewer dimensions.
    """
    place = Place(vector_site(site, head), layer, head)
    validate([place.edit(0.0)], subject.anatomy)
    width = features_at(subject, place.site, layer)
    if dimensions is not None and not 1 <= dimensions <= width:
        raise SettingsError(f"{dimensions} dimensions do not fit {place}, which has {width}: use 1 to {width}")
    return place


def features_at(subject: Subject, site: str, layer: int) -> int:
    """Return how many features a site's vector has (of `z`: one head's)."""
    block = subject.anatomy.blocks[layer]
    return block.d_mlp if site == "neuron" else block.output.width if site == "z" else subject.anatomy.d_model


@torch.no_grad()
def difference_of_means(
    subject: Subject,
    positive: Pairs,
    negative: Pairs,
    *,
    site: str = "residual",
    layer: int,
    positions: Where = "last",
    head: int | None = None,
    execution: Execution = Execution(),
) -> Direction:
    """Subtract the mean activation on one set of texts from that on another (Marks & Tegmark 2023).

    Args:
        subject: The model.
        positive: Texts whose clean versions are read; the direction points to them.
        negative: The texts it points away from.
        site: `residual`, `attention`, `mlp`, `neuron`, `embedding`, or `head` (its z).
        layer: Which block.
        positions: Tokens whose activations are averaged: first within a text, then over texts.
        head: Which head, of site `head`.
        execution: Tokens of a batch (4,096 by default).

    Raises:
        MechscopeError: Texts, positions or place do not fit the model.
    """
    edit_site = check_vector_place(subject, site, layer, head).site

    def summed(batch: PairBatch) -> Float[Tensor, " features"]:
        with record(subject, cast(Any, edit_site), layers=[layer]) as recording:
            run_backbone(subject, batch.clean, batch.real)
        value = recording[edit_site, layer].to(subject.device, torch.float64)
        value = value if head is None else value[:, :, head]
        weight = batch.positions(positions).to(value)
        weight = weight / weight.sum(1, keepdim=True)
        return torch.einsum("bt,btf->f", weight, torch.where(weight[..., None] > 0, value, 0.0))

    means = []
    for texts in (positive, negative):
        check_fits(subject, texts)
        total = torch.zeros(features_at(subject, edit_site, layer), dtype=torch.float64, device=subject.device)
        for _, part in over_texts(texts, summed, execution, tokens=4096):
            total += part
        means.append(total / len(texts))
    name = f"{positive.source} − {negative.source}"
    return Direction((means[0] - means[1]).to(subject.dtype), edit_site, layer, head, name)


@contextlib.contextmanager
def steer(
    subject: Subject, direction: Direction, strength: float, *, positions: Bool[Tensor, "batch token"] | None = None
) -> Iterator[None]:
    """Add strength · vector in every forward pass inside the context.

    Args:
        subject: The model.
        direction: What is added, and where.
        strength: How many times; negative turns the other way.
        positions: ``(batch, token)`` of the prompt, True where it is added; None for every token, those that `generate` makes included.

    Raises:
        SettingsError: The direction does not fit the model, or, when the model runs, the positions do not fit its batch.
    """
    direction.check(subject)
    with _changed(subject, direction, adding(direction, strength), positions):
        yield


@contextlib.contextmanager
def remove(subject: Subject, direction: Direction, *, positions: Bool[Tensor, "batch token"] | None = None) -> Iterator[None]:
    """Project a direction out in every forward pass inside the context: h − (h·d̂) d̂.

    Args:
        subject: The model.
        direction: What is taken away, and where.
        positions: ``(batch, token)`` of the prompt, True where it is taken away; None for every token, those that `generate` makes included.

    Raises:
        SettingsError: The direction is zero or does not fit the model, or, when the model runs, the positions do not fit its batch.
    """
    direction.check(subject)
    unit = direction.unit().vector

    def without(part: Tensor) -> Tensor:
        d = unit.to(part)
        return part - (part @ d)[..., None] * d

    with _changed(subject, direction, without, positions):
        yield


def adding(direction: Direction, strength: float) -> Value:
    """Return the value of an edit that adds a direction."""

    def added(part: Tensor) -> Tensor:
        return part + strength * direction.vector.to(part)

    return added


@contextlib.contextmanager
def _changed(subject: Subject, direction: Direction, value: Value, positions: Tensor | None) -> Iterator[None]:
    """Intervene with a function; positions count from the beginning of the prompt, however it comes to the model."""
    place = Place(direction.site, direction.layer, direction.head)
    if positions is None:
        with intervene(subject, place.edit(value)):
            yield
        return
    prompt = MarkedPrompt(positions)

    def at_positions(part: Tensor) -> Tensor:
        here = prompt.marks(part)
        new = value(part) if callable(value) else value
        return torch.where(here[..., *[None] * (part.ndim - 2)], new, part)

    handle = subject.anatomy.backbone.register_forward_pre_hook(prompt.notice, with_kwargs=True)
    try:
        with intervene(subject, place.edit(at_positions)):
            yield
    finally:
        handle.remove()


def sweep_strength(
    subject: Subject,
    direction: Direction,
    pairs: Pairs,
    neutral: Pairs,
    *,
    strengths: Sequence[float],
    metric: str = "logit-diff",
    controls: int = 1,
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Measure what steering does to a metric, and what it costs on neutral text, at several strengths.

    Args:
        subject: The model.
        direction: What is added, at every token.
        pairs: The texts whose clean versions are steered.
        neutral: Texts with a target whose loss shall stay.
        strengths: How many times the vector is added.
        metric: Of the pairs: `logit-diff`, `probability`, `loss` or `kl`.
        controls: Random directions of equal length.
        execution: Tokens of a batch (1,024 by default), seed (of the random directions).

    Returns:
        One row per direction, strength and set of texts: `direction`, `draw` (−1 for the direction itself), `strength`, `texts` (`pairs` or `neutral`),
        `metric`, `n`, `value` (mean metric of the steered run), and its difference from the unsteered run: `mean`, `se`, `low`, `high` (95 %
        interval over texts).

    Raises:
        MechscopeError: Direction, texts or metric do not fit the model, or there is no strength.
    """
    direction.check(subject)
    if not strengths:
        raise SettingsError("there is no strength to steer with: give at least one, e.g. strengths=(-2, 0, 2)")
    drawn = [(-1, direction), *((draw, direction.random_like(execution.seed + draw)) for draw in range(controls))]
    runs = [(draw, each, strength) for draw, each in drawn for strength in strengths]
    place = Place(direction.site, direction.layer, direction.head)
    units: list[tuple[Edit, ...]] = [(place.edit(adding(each, strength)),) for _, each, strength in runs]
    tables = []
    for texts, of, by in (("pairs", pairs, metric), ("neutral", neutral, "loss")):
        steered, unsteered = _metrics(subject, of, by, direction.site, units, execution)
        rows = [{"direction": each.name, "draw": draw, "strength": strength, "texts": texts} for draw, each, strength in runs]
        tables.append(effects(rows, steered, unsteered, metric=by).table.drop(columns=["p", "q"]).rename(columns={"effect": "mean"}))
    return pd.concat(tables, ignore_index=True)


def _metrics(
    subject: Subject, texts: Pairs, metric: str, site: str, units: Sequence[Sequence[Edit]], execution: Execution
) -> tuple[np.ndarray, np.ndarray]:
    """Return the metric of every changed run, (units, texts), and of the unchanged one."""
    check_fits(subject, texts)
    gathered = PerText(texts)

    def steered(batch: PairBatch) -> dict[str, np.ndarray]:
        run = CachedRun(subject, batch.clean, batch.real, sites={site})
        runs = Runs(run, metric_of(metric, batch, run))
        return {"unchanged": runs.unchanged(), "changed": runs.of(units, progress=gathered.step)}

    gathered.run(steered, execution, tokens=1024, label=f"steering, {metric}", units=len(units))
    return gathered["changed"], gathered["unchanged"]
