"""Distributed alignment search: which directions of a representation carry a variable.

A pair is a base text (clean) and a source text (corrupt); its answers are what a model that holds the variable would say of the base text if the
variable had the source's value. A rotation R is learned so that exchanging the first k rotated dimensions between the two runs,

    h' = h + R_k (R_kᵀ h_source − R_kᵀ h),

makes the model say so (Geiger et al. 2024); the model's weights stay. Boundless: k is learned too, as a soft boundary that sharpens while it is
pulled towards fewer dimensions (Wu et al. 2023). Judged on pairs that were not trained on, beside random subspaces: a subspace that is large enough
moves much of anything.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechscope.causal.interchange import Interchange, Position, exchange_edit, interchanges, judged_by, judgements
from mechscope.causal.places import Place
from mechscope.causal.steering import check_vector_place, features_at
from mechscope.causal.subspace import Subspace, exchanged, precision, random_rotation
from mechscope.choices import Among
from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, ModelError, RunError, SettingsError
from mechscope.instrument import Edit, observed
from mechscope.instrument.edits import EditSite, validate
from mechscope.instrument.execution import Execution
from mechscope.stats.inference import share_interval
from mechscope.store.tables import read_tensors, write_tensors
from mechscope.subject import Subject

_KIND = "mechscope alignment"


@dataclass(frozen=True)
class Alignment:
    """A subspace of one site that is held to carry a variable.

    Attributes:
        rotation: ``(features, k)``: orthonormal columns that span it.
        site: Where in the block.
        layer: Which block.
        position: Tokens that are exchanged, as `PairBatch.positions` takes them.
        head: Which head, of site `z`.
        curve: How it was learned: one row per epoch with `epoch`, `loss` (nats), `accuracy` (share of training pairs), `dimensions`, `temperature`.
        fingerprint: Of the model it belongs to.
    """

    rotation: Float[Tensor, "features k"]
    site: EditSite
    layer: int
    position: Position
    head: int | None = None
    curve: pd.DataFrame = field(default_factory=pd.DataFrame)
    fingerprint: str = ""

    @property
    def dimensions(self) -> int:
        """Number of dimensions of the subspace."""
        return self.rotation.shape[1]

    def edit(self, source_values: Float[Tensor, "batch token *head features"], mask: Bool[Tensor, "batch token"]) -> Edit:
        """Return the edit that gives the subspace a source's values.

        Args:
            source_values: The site's values in the source's run, as `record` gives them.
            mask: Tokens that are changed.
        """
        return exchange_edit(self.site, self.layer, self.head, source_values, mask, lambda value: exchanged(value, self.rotation))

    def accuracy(self, subject: Subject, pairs: Pairs, *, among: Among = "vocabulary", execution: Execution = Execution()) -> float:
        """Return the interchange accuracy: the share of pairs after whose interchange the likeliest token is an answer.

        Args:
            subject: The model.
            pairs: Base and source texts with the counterfactual answers; not those it was learned from.
            among: The likeliest of the whole `vocabulary`, or of the right and wrong `answers` (for a model that would rather say something else).
            execution: Tokens of a batch (2,048 by default).

        Raises:
            MechscopeError: Model or pairs do not fit.
        """
        self._check(subject)
        with observed(subject):
            place, judged = Place(self.site, self.layer, self.head), judged_by(pairs, among)

            def correct(text: Interchange) -> int:
                return _correct(subject, text, self, among)

            return sum(judgements(correct, subject, judged, place, self.position, execution, tokens=2048)) / len(pairs)

    def save(self, path: Path | str) -> None:
        """Write it to a safetensors file."""
        position = self.position if isinstance(self.position, str | int) else list(self.position)
        place = {"site": self.site, "layer": self.layer, "head": self.head, "position": position}
        meta = {"kind": _KIND, **place, "fingerprint": self.fingerprint, "curve": self.curve.to_dict(orient="list")}
        write_tensors({"rotation": self.rotation}, Path(path), meta=meta)

    @classmethod
    def load(cls, path: Path | str, subject: Subject) -> Alignment:
        """Read what `save` wrote, for the model it was learned on.

        Raises:
            RunError: The file is missing, damaged or something else.
            ModelError: It belongs to another model.
        """
        tensors, meta = read_tensors(Path(path))
        if not isinstance(meta, dict) or meta.get("kind") != _KIND or "rotation" not in tensors:
            raise RunError(f"{path} holds no alignment: give a file that Alignment.save wrote")
        place = {name: meta[name] for name in ("site", "layer", "head", "position", "fingerprint")}
        alignment = cls(tensors["rotation"].to(subject.device), **place, curve=pd.DataFrame(meta["curve"]))
        alignment._check(subject)
        return alignment

    def _check(self, subject: Subject) -> None:
        if self.fingerprint and self.fingerprint != subject.fingerprint:
            raise ModelError(
                f"the alignment was learned on a model with fingerprint {self.fingerprint[:12]}, {subject.source!r} has "
                f"{subject.fingerprint[:12]}: load that model, or learn an alignment for this one"
            )
        validate([Place(self.site, self.layer, self.head).edit(0.0)], subject.anatomy)
        if self.rotation.shape[0] != (width := features_at(subject, self.site, self.layer)):
            raise ModelError(
                f"the alignment is of {self.rotation.shape[0]} features, {self.site} of layer {self.layer} of {subject.source!r} has {width}"
            )


def train_das(
    subject: Subject,
    pairs: Pairs,
    *,
    site: str = "residual",
    layer: int,
    position: Position = "last",
    dimensions: int = 8,
    boundless: bool = False,
    head: int | None = None,
    epochs: int = 20,
    learning_rate: float = 0.01,
    size_penalty: float = 1.0,
    execution: Execution = Execution(),
) -> Alignment:
    """Learn the subspace of a site that carries a variable.

    Args:
        subject: The model; its weights are not changed.
        pairs: Base texts (clean), source texts (corrupt), and as `answers` what is right after the base text with the source's variable.
        site: `residual`, `attention`, `mlp`, `neuron`, `embedding`, or `head` (its z).
        layer: Which block.
        position: Tokens that are exchanged: `last`, `changed`, a segment's name, one or several positions, or `all`.
        dimensions: Dimensions of the subspace; not used if boundless.
        boundless: Learn the number of dimensions too.
        head: Which head, of site `head`.
        epochs: Passes over the pairs.
        learning_rate: Of Adam, falling linearly to zero.
        size_penalty: Of boundless search: what all dimensions together cost, in nats.
        execution: Tokens of a batch (512 by default), seed (of the rotation's beginning and of the order of the pairs), progress.

    Raises:
        MechscopeError: Place, pairs or numbers do not fit the model or each other.
    """
    place = check_vector_place(subject, site, layer, head, None if boundless else dimensions)
    width = features_at(subject, place.site, layer)
    if epochs < 1:
        raise SettingsError(f"epochs is {epochs}: train for at least one")
    order = np.random.default_rng(execution.seed)
    shuffled = Pairs(tuple(pairs.pairs[at] for at in order.permutation(len(pairs))), pairs.source)
    with observed(subject):
        texts = list(interchanges(subject, shuffled, place, position, execution.tokens(512)))
        space = Subspace(width, None if boundless else dimensions, execution.seed, subject)
        parameters = [*space.turn.parameters(), *([space.boundary] if boundless else [])]
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        steps = epochs * len(texts)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        rows: list[dict[str, float]] = []
        for epoch in range(epochs):
            total = correct = 0.0
            for number, at in enumerate(order.permutation(len(texts))):
                space.anneal((epoch * len(texts) + number) / max(1, steps - 1))
                with torch.enable_grad():
                    logits = texts[at].logits(subject, texts[at].edit(space.exchange()))
                    loss = texts[at].loss(logits)
                    gradients = torch.autograd.grad(loss + size_penalty * space.share(), parameters)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
                space.clamp()
                total += loss.item() * texts[at].size
                correct += texts[at].correct(logits)
            means = {"loss": total / len(pairs), "accuracy": correct / len(pairs)}
            rows.append({"epoch": epoch, **means, "dimensions": space.dimensions, "temperature": space.temperature})
            execution.told(f"aligning {place}", epoch + 1, epochs)
    return Alignment(space.rotation(), place.site, layer, position, head, pd.DataFrame(rows), subject.fingerprint)


def random_alignment(
    subject: Subject,
    *,
    site: str = "residual",
    layer: int,
    position: Position = "last",
    dimensions: int,
    head: int | None = None,
    seed: int = 0,
) -> Alignment:
    """Return a random subspace: the control."""
    place = check_vector_place(subject, site, layer, head)
    width = features_at(subject, place.site, layer)
    if not 0 <= dimensions <= width:
        raise SettingsError(f"{dimensions} dimensions do not fit {place}, which has {width}: use 0 to {width}")
    rotation = random_rotation(width, seed)[:, :dimensions].to(subject.device, precision(subject))
    return Alignment(rotation, place.site, layer, position, head, fingerprint=subject.fingerprint)


def das(
    subject: Subject,
    train_pairs: Pairs,
    test_pairs: Pairs,
    *,
    layers: Collection[int] | None = None,
    site: str = "residual",
    position: Position = "last",
    dimensions: int = 8,
    boundless: bool = False,
    head: int | None = None,
    controls: int = 3,
    among: Among = "vocabulary",
    epochs: int = 20,
    learning_rate: float = 0.01,
    size_penalty: float = 1.0,
    execution: Execution = Execution(),
) -> pd.DataFrame:
    """Learn a subspace in each layer and judge it on other pairs.

    Args:
        subject: The model.
        train_pairs: What is learned from.
        test_pairs: What is judged on.
        layers: Which blocks; None for all.
        site: `residual`, `attention`, `mlp`, `neuron`, `embedding`, or `head` (its z).
        position: Tokens that are exchanged: `last`, `changed`, a segment's name, one or several positions, or `all`.
        dimensions: Dimensions of the subspace; not used if boundless.
        boundless: Learn the number of dimensions too.
        head: Which head, of site `head`.
        controls: Random subspaces of the same dimension per layer.
        among: The likeliest of the whole `vocabulary`, or of the right and wrong `answers` (for a model that would rather say something else).
        epochs: Passes over the pairs.
        learning_rate: Of Adam, falling linearly to zero.
        size_penalty: Of boundless search: what all dimensions together cost, in nats.
        execution: Tokens of a batch (512 by default), seed (of rotations, the order of the pairs and the random subspaces), progress.

    Returns:
        Rows per layer: `among`, `method`: `das`, `random` (one row per `draw`), `full` (the whole vector is exchanged) or `none` (nothing is); `dimensions`,
        `n`, `correct`, `accuracy` (see `Alignment.accuracy`) with Wilson's 95 % interval `low`, `high`.

    Raises:
        MechscopeError: Place, pairs or numbers do not fit the model or each other; or the two sets share a pair.
    """
    trained_on = {(pair.clean, pair.corrupt) for pair in train_pairs}
    for pair in test_pairs:
        if (pair.clean, pair.corrupt) in trained_on:
            raise DataError(f"test pair {pair.id!r} is also a training pair: judge on pairs that were not learned from")
    judged_by(test_pairs, among)
    chosen = range(subject.anatomy.n_layers) if layers is None else sorted(layers)
    # all of them before the first is learned
    places = [check_vector_place(subject, site, layer, head, None if boundless else dimensions) for layer in chosen]
    rows: list[dict[str, Any]] = []
    quiet = replace(execution, progress=None)  # progress counts layers, not epochs
    for number, (layer, place) in enumerate(zip(chosen, places, strict=True)):
        learned = train_das(
            subject,
            train_pairs,
            site=site,
            layer=layer,
            position=position,
            dimensions=dimensions,
            boundless=boundless,
            head=head,
            epochs=epochs,
            learning_rate=learning_rate,
            size_penalty=size_penalty,
            execution=quiet,
        )

        def control(k: int, draw: int = 0, layer: int = layer) -> Alignment:
            return random_alignment(
                subject, site=site, layer=layer, position=position, dimensions=k, head=head, seed=execution.seed + 1 + draw
            )

        judged = [
            ("das", -1, learned),
            *(("random", draw, control(learned.dimensions, draw)) for draw in range(controls)),
            ("full", -1, control(learned.rotation.shape[0])),
            ("none", -1, control(0)),
        ]

        def counts(text: Interchange, judged: list[tuple[str, int, Alignment]] = judged) -> list[int]:
            return [_correct(subject, text, one, among) for _, _, one in judged]

        with observed(subject):
            correct = np.sum([*judgements(counts, subject, test_pairs, place, position, quiet, tokens=512)], axis=0).tolist()
        for (method, draw, one), count in zip(judged, correct, strict=True):
            low, high = share_interval(count, len(test_pairs))
            where = {"component": str(place), "site": place.site, "layer": layer, "head": -1 if head is None else head}
            share = {"n": len(test_pairs), "correct": count, "accuracy": count / len(test_pairs), "low": low, "high": high}
            design = {"position": str(position), "among": among, "method": method, "draw": draw, "dimensions": one.dimensions}
            rows.append({**where, **design, **share})
        execution.told("aligning", number + 1, len(chosen))
    return pd.DataFrame(rows)


@torch.no_grad()
def _correct(subject: Subject, text: Interchange, alignment: Alignment, among: Among) -> int:
    return text.correct(text.logits(subject, alignment.edit(text.source, text.mask)), among)
