"""Causal scrubbing: is a hypothesis about what components read enough to explain what the model does?

A hypothesis says of components what their values may depend on: nothing (any other text's value will do), or a label (any text with the same label
will do). Values are exchanged accordingly, all components at once and each with partners of its own, and the metric should stay (Chan et al.
2022). Two runs give the scale: the model as it is (1), and the model with every head and MLP taken from other texts (0).

A simplification of the paper: values come from ordinary runs of other texts, not from recursively scrubbed ones, and components that are not named
compute on what they are given, so that an early component is judged by all its effects.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechscope.causal.effects import effects
from mechscope.causal.places import Place, places_of
from mechscope.data.pairs import PairBatch, Pairs, PromptPair
from mechscope.data.scoring import PerText, Runs, check_fits, metric_of
from mechscope.errors import DataError, SettingsError
from mechscope.instrument import CachedRun, Edit
from mechscope.instrument.edits import EditSite
from mechscope.instrument.execution import Execution
from mechscope.instrument.texts import over_texts
from mechscope.shapes import by_shape
from mechscope.subject import Components, Subject
from mechscope.subject.anatomy import Anatomy

Freedom = Sequence[Hashable] | Callable[[PromptPair], Hashable] | None
Hypothesis = Mapping[str, Freedom]
Partners = dict[Place, Int[np.ndarray, "samples text"]]


@dataclass(frozen=True)
class Scrubbed:
    """What is left of a metric when a hypothesis decides what may be exchanged.

    Attributes:
        table: One row per sample: `sample`, `metric`, `n`, `value` (mean metric of the scrubbed run), `effect` (its mean difference from the full model)
            with `se`, `low`, `high`, and `recovered` with `recovered_low`, `recovered_high`.
        summary: One row per `run`: `full` (the model itself), `everything` (every head and MLP exchanged freely), `scrubbed` (the hypothesis); columns as
            in `table`, over the texts' means over samples. `recovered` is (scrubbed − everything) / (full − everything), a ratio of means with
            Fieller's interval over texts; `withheld` says why it is not given, where it is not.
        full: ``(text)``: the metric of the model itself.
        everything: ``(samples, text)``.
        scrubbed: ``(samples, text)``.
        partners: ``(samples, text)`` by component of the hypothesis: from which text each text's value was taken.
        notes: What a reader should know of the run; `alone` counts texts by component that are the only ones with their label.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    full: Float[np.ndarray, " text"]
    everything: Float[np.ndarray, "samples text"]
    scrubbed: Float[np.ndarray, "samples text"]
    partners: dict[str, Int[np.ndarray, "samples text"]]
    notes: dict[str, Any] = field(default_factory=dict)

    __repr__ = by_shape

    @property
    def recovered(self) -> float:
        """The share of the metric that the hypothesis keeps."""
        return float(self.summary.set_index("run")["recovered"]["scrubbed"])


def scrub(
    subject: Subject,
    pairs: Pairs,
    hypothesis: Hypothesis,
    *,
    metric: str = "logit-diff",
    samples: int = 5,
    execution: Execution = Execution(),
) -> Scrubbed:
    """Exchange what a hypothesis allows, and see what it costs.

    Args:
        subject: The model.
        pairs: The texts (their clean versions), equally long.
        hypothesis: By components (`a3.h5`, `m3`, `layers:0-2`): None where they are irrelevant, so that any other text's value may stand there; or a
            label per text (a sequence in the order of the pairs, or a function of a pair), so that values of texts with equal labels may be
            exchanged. A text that is alone with its label keeps its value. Embeddings are never exchanged.
        metric: `logit-diff`, `probability`, `loss` or `kl`.
        samples: How often partners are drawn.
        execution: Tokens of a batch (1,024 by default), seed (of the draws), progress.

    Raises:
        MechscopeError: Texts differ in length, components do not exist or are named twice, or labels do not fit the texts.
    """
    check_fits(subject, pairs)
    _check_texts(pairs)
    if samples < 1:
        raise SettingsError(f"samples is {samples}: draw partners at least once")
    labels = _labels(hypothesis, pairs, subject.anatomy)
    everywhere = dict.fromkeys(places_of(Components.of_layers(range(subject.anatomy.n_layers)), subject.anatomy), (0,) * len(pairs))
    random = np.random.default_rng(execution.seed)
    drawn, free = (_draw(of, samples, random) for of in (labels, everywhere))
    store = _recorded(subject, pairs, execution)
    gathered = PerText(pairs)

    def scrubbed(batch: PairBatch) -> dict[str, np.ndarray]:
        rows = np.array(batch.indices)
        run = CachedRun(subject, batch.clean, batch.real, sites=("z", "mlp_output"))
        runs = Runs(run, metric_of(metric, batch, run))
        values = {"full": runs.unchanged()}
        for name, partners in (("scrubbed", drawn), ("everything", free)):
            values[name] = runs.of([_unit(store, partners, sample, rows) for sample in range(samples)])
        return values

    gathered.run(scrubbed, execution, tokens=1024, label="scrubbing")
    table, summary = _tables(gathered, metric)
    alone = {str(place): sum(of.count(label) == 1 for label in of) for place, of in labels.items()}
    full, everything, values = gathered["full"], gathered["everything"], gathered["scrubbed"]
    partners = {str(place): of for place, of in drawn.items()}
    return Scrubbed(table, summary, full, everything, values, partners, {"seed": execution.seed, "alone": alone})


def _check_texts(pairs: Pairs) -> None:
    if len(pairs) < 2:
        raise DataError(f"values are exchanged between texts, and there is {len(pairs)}: give at least two")
    shortest, longest = (pick(pairs, key=lambda pair: len(pair.clean)) for pick in (min, max))
    if len(shortest.clean) != len(longest.clean):
        raise DataError(
            f"pair {shortest.id!r} has {len(shortest.clean)} tokens, pair {longest.id!r} has {len(longest.clean)}: values are exchanged token by "
            "token, so lengthen the shorter one, shorten the longer one, or scrub texts of each length apart"
        )


def _labels(hypothesis: Hypothesis, pairs: Pairs, anatomy: Anatomy) -> dict[Place, tuple[Hashable, ...]]:
    """Return every text's label at every place; all are equal where a place is irrelevant."""
    by_place: dict[Place, tuple[Hashable, ...]] = {}
    for name, freedom in hypothesis.items():
        if freedom is None:
            labels: tuple[Hashable, ...] = (0,) * len(pairs)
        elif callable(freedom):
            labels = tuple(freedom(pair) for pair in pairs)
        else:
            labels = tuple(freedom)
        if len(labels) != len(pairs):
            raise SettingsError(f"component {name!r} has {len(labels)} labels for {len(pairs)} texts: give one per text")
        for place in places_of(Components.parse(name), anatomy):
            if place in by_place:
                raise SettingsError(f"the hypothesis names {place} twice, the second time in {name!r}: say once what it may depend on")
            by_place[place] = labels
    return by_place


def _draw(labels: Mapping[Place, tuple[Hashable, ...]], samples: int, random: np.random.Generator) -> Partners:
    """Draw for every place, sample and text another text with the same label."""
    by_place: Partners = {}
    for place, of in labels.items():
        groups: dict[Hashable, list[int]] = {}
        for at, label in enumerate(of):
            groups.setdefault(label, []).append(at)
        partners = np.empty((samples, len(of)), dtype=np.int64)
        for members in groups.values():
            own = np.arange(len(members))
            # one of the others: so many steps further on in the circle of those with this label
            steps = random.integers(1, max(2, len(members)), size=(samples, len(members)))
            partners[:, members] = np.array(members)[(own + steps) % len(members)]
        by_place[place] = partners
    return by_place


@torch.no_grad()
def _recorded(subject: Subject, pairs: Pairs, execution: Execution) -> dict[tuple[str, int], Tensor]:
    """Return every text's values, (text, token, …), in the order of the pairs."""
    order: list[int] = []
    parts: dict[tuple[str, int], list[Tensor]] = {}

    def recorded(batch: PairBatch) -> dict[tuple[str, int], Tensor]:
        recording = CachedRun(subject, batch.clean, batch.real, sites=("z", "mlp_output")).recording
        return {key: value for key, value in recording.values.items() if key[0] in ("z", "mlp_output")}

    for batch, values in over_texts(pairs, recorded, execution, tokens=1024):
        order += batch.indices
        for key, value in values.items():
            parts.setdefault(key, []).append(value)
    back = torch.tensor(order).argsort()
    return {key: torch.cat(of_batches)[back.to(of_batches[0].device)] for key, of_batches in parts.items()}


def _unit(store: Mapping[tuple[str, int], Tensor], partners: Partners, sample: int, rows: np.ndarray) -> tuple[Edit, ...]:
    """Return one sample's changes of some texts; their values are put together only when the run reaches them."""
    together: dict[tuple[EditSite, int], list[Place]] = {}
    for place in partners:
        together.setdefault((place.site, place.layer), []).append(place)

    def value(part: Tensor, site: EditSite, layer: int) -> Tensor:
        new = part.clone()
        for place in together[site, layer]:
            given = store[site, layer][torch.as_tensor(partners[place][sample, rows])].to(part)
            if place.head is None:
                new = given
            else:
                new[:, :, place.head] = given[:, :, place.head]
        return new

    return tuple(Edit(site, layer, partial(value, site=site, layer=layer)) for site, layer in together)


def _tables(gathered: PerText, metric: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    full, everything, scrubbed = gathered["full"], gathered["everything"].mean(0), gathered["scrubbed"]
    names = {"normalised": "recovered", "normalised_low": "recovered_low", "normalised_high": "recovered_high"}

    def table(rows: list[dict[str, Any]], values: np.ndarray) -> pd.DataFrame:
        result = effects(rows, values, full, metric=metric, clean=full, corrupt=everything)
        return result.table.drop(columns=["p", "q"]).rename(columns=names)

    samples = [{"sample": at} for at in range(len(scrubbed))]
    runs = [{"run": name} for name in ("full", "everything", "scrubbed")]
    return table(samples, scrubbed), table(runs, np.stack([full, everything, scrubbed.mean(0)]))
