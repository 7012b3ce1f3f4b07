"""Distributed alignment search: which directions of a representation carry a variable.

A pair is a base text (clean) and a source text (corrupt); its answers are what a model that holds the variable would say of the base text if the
variable had the source's value. A rotation R is learned so that exchanging the first k rotated dimensions between the two runs,

    h' = h + R_k (R_kᵀ h_source − R_kᵀ h),

makes the model say so (Geiger et al. 2024); the model's weights stay. Boundless: k is learned too, as a soft boundary that sharpens while it is
pulled towards fewer dimensions (Wu et al. 2023). Where that boundary stops says how long it was trained rather than how many dimensions are needed, so
narrower subspaces are learned too, and the narrowest is taken whose interchange accuracy on pairs set aside for this is within noise of the best.
Judged on pairs that were not trained on, beside random subspaces: a subspace that is large enough moves much of anything.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from mechscope.causal.alignment import Alignment, rights
from mechscope.causal.alignment_search import AlignmentSearch
from mechscope.causal.interchange import Interchange, Position, judged_by, judgements
from mechscope.causal.steering import check_vector_place, features_at
from mechscope.causal.subspace import precision, random_rotation
from mechscope.choices import Among
from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import observed
from mechscope.instrument.execution import Execution
from mechscope.stats.inference import share_interval
from mechscope.subject import Subject


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
    epochs: int = 100,
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
    if epochs < 1:
        raise SettingsError(f"epochs is {epochs}: train for at least one")
    search = AlignmentSearch(subject, place, position, epochs, learning_rate, size_penalty, execution)
    if not boundless:
        return search.learned(pairs, dimensions)
    return search.narrowest(pairs)


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
    epochs: int = 100,
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
        `n`, `correct`, `accuracy` (see `Alignment.accuracy`) with Wilson's 95 % interval `low`, `high`; and of the learned subspace `width` (see
        `Alignment.width`), `converged`, `late_share` (see `mechscope.stats.convergence`) and `unconverged` (why it has not, or empty); NaN, true and empty
        for the others.

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
            return [int(rights(subject, text, one, among).sum()) for _, _, one in judged]

        with observed(subject):
            correct = np.sum([*judgements(counts, subject, test_pairs, place, position, quiet, tokens=512)], axis=0).tolist()
        for (method, draw, one), count in zip(judged, correct, strict=True):
            low, high = share_interval(count, len(test_pairs))
            where = {"component": str(place), "site": place.site, "layer": layer, "head": -1 if head is None else head}
            share = {"n": len(test_pairs), "correct": count, "accuracy": count / len(test_pairs), "low": low, "high": high}
            design = {"position": str(position), "among": among, "method": method, "draw": draw, "dimensions": one.dimensions}
            arrived = one.convergence
            training = {"width": one.width, **arrived.columns, "unconverged": arrived.reason}
            rows.append({**where, **design, **share, **training})
        execution.told("aligning", number + 1, len(chosen))
    return pd.DataFrame(rows)
