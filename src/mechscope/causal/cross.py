"""Cross-model patching: which components carry what fine-tuning brought?

Two models of one architecture read the same text. A component's activation in one is put into the other (Prakash et al. 2024), or its weights are:

    into_base    the tuned component in the base model: how much of the gain does it carry alone?
    into_tuned   the base component in the tuned model: how much of the gain is lost without it?

Both are shares of the whole change of the metric, m(tuned) − m(base): 0 nothing, 1 all of it. Shares of parts need not add up to one, as parts
work together; the two directions bracket what a part does. Activations go through what the other model makes of them further up; weights let
the component answer to the other model's residual stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from mechscope.causal.effects import Effects, effects
from mechscope.causal.parts import Index, Part, parts_of, set_of
from mechscope.causal.places import edits_of
from mechscope.data.pairs import PairBatch, Pairs
from mechscope.data.scoring import PerText, Runs, check_fits, fetched, metric_of
from mechscope.errors import ModelError, SettingsError
from mechscope.instrument import CachedRun
from mechscope.instrument.execution import Execution
from mechscope.subject import Components, Pair, Subject
from mechscope.subject.linear import acting, adds, base_layer

By = Literal["activations", "weights"]
Into = Literal["into_base", "into_tuned"]


def cross_patch(
    pair: Pair,
    texts: Pairs,
    *,
    levels: Sequence[str] = ("layer", "attention", "mlp", "head"),
    sets: Sequence[Components | str] = (),
    by: By = "activations",
    metric: str = "loss",
    execution: Execution = Execution(),
) -> dict[Into, Effects]:
    """Exchange components between a base and a tuned model, one at a time, in both directions.

    Args:
        pair: The two models.
        texts: What both read (the clean texts).
        levels: `layer` (attention, or what mixes tokens instead, and MLP output together), `attention`, `mixer` (of layers that do not attend), `mlp`,
            `head` (z), `residual` (all up to a layer; activations only), `embedding`, `unembedding` (with the final norm; weights only).
        sets: Further sets of heads, MLPs and layers, each exchanged as one.
        by: `activations` or `weights`.
        metric: What fine-tuning was to improve; `loss` of the target tokens.
        execution: Tokens of a batch (1,024 by default), progress.

    Returns:
        For each direction one row per part; `normalised` is the share of the gain that is carried (`into_base`) or lost (`into_tuned`), withheld where
        fine-tuning is not shown to have improved the metric on these texts.

    Raises:
        MechscopeError: Texts, levels or sets do not fit the models.
    """
    check_fits(pair.base, texts)
    if by not in ("activations", "weights"):
        raise SettingsError(f"parts are exchanged by activations or by weights, not by {by!r}")
    parts = [*parts_of(pair.base, levels, by), *(set_of(pair.base, chosen) for chosen in sets)]
    if not parts:
        raise SettingsError("nothing to exchange: name levels or sets of components")
    sites = {place.site for part in parts for place in part.places}
    receivers: dict[Into, Subject] = {"into_base": pair.base, "into_tuned": pair.tuned}
    gathered = PerText(texts)

    def exchanged(batch: PairBatch) -> dict[str, np.ndarray]:
        recorded = sites if by == "activations" else ()
        runs = {into: CachedRun(receiver, batch.clean, batch.real, sites=recorded) for into, receiver in receivers.items()}
        judged = metric_of(metric, batch, runs["into_base"])
        values: dict[str, np.ndarray] = {}
        for into in receivers:
            run, giver = Runs(runs[into], judged), runs[_other(into)]
            values[f"{into}.unchanged"] = run.unchanged()
            values[into] = (_activations if by == "activations" else _weights)(run, giver, parts, gathered.step)
        return values

    gathered.run(exchanged, execution, tokens=1024, label=f"exchanging {by}", units=2 * len(parts))
    columns = [part.columns for part in parts]
    # an improvement is a lower loss, or more of what the other metrics count
    rises = -1 if metric == "loss" else 1
    absent = f"fine-tuning did not {'lower' if rises < 0 else 'raise'} the {metric} on these texts"
    results: dict[Into, Effects] = {}
    for into in receivers:
        values, own, other = gathered[into], gathered[f"{into}.unchanged"], gathered[f"{_other(into)}.unchanged"]
        results[into] = effects(
            columns,
            values,
            own,
            metric=metric,
            clean=other,
            corrupt=own,
            better=rises if into == "into_base" else -rises,
            absent=absent,
            by=by,
        )
    return results


def _other(into: Into) -> Into:
    return "into_tuned" if into == "into_base" else "into_base"


def _activations(run: Runs, giver: CachedRun, parts: Sequence[Part], step: Callable[[int], None]) -> np.ndarray:
    def value(site: str, layer: int) -> Tensor:
        return giver.recording[site, layer]

    return run.of([edits_of(part.places, value) for part in parts], progress=step)


@torch.no_grad()
def _weights(run: Runs, giver: CachedRun, parts: Sequence[Part], step: Callable[[int], None]) -> np.ndarray:
    receiver = run.base.subject
    given, own = dict(giver.subject.weights()), dict(receiver.weights())
    values = []
    for part in parts:
        with swapped(receiver, {name: _mixed(own[name], given[name], where) for name, where in part.weights.items()}, own):
            values.append(run.resumed(part.start))
        step(1)
    return fetched(torch.stack(values))


@contextlib.contextmanager
def swapped(subject: Subject, weights: Mapping[str, Tensor], own: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Let a model run with other weights for a while; restores them in any case.

    Args:
        subject: The model.
        weights: By name in the plain model, as they are to act (an active adapter's change included).
        own: The weights as they act now, if they are at hand.
    """
    subject.require_in_memory("exchanging weights")
    for layer in subject.plain.modules() if subject.adapted else ():
        if isinstance(layer, BaseTunerLayer) and not adds(layer):
            raise ModelError(
                f"exchanging weights under {type(layer).__name__} of this adapter: it does more than add to its map; merge the adapter first"
            )
    own = dict(subject.weights()) if own is None else own
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for name, value in weights.items():
            parameter = _parameter(subject, name)
            before.append((parameter, parameter.detach().clone()))
            # an active adapter adds its change to whatever stands here
            adapter = own[name].to(parameter.device) - parameter.detach() if subject.adapted else None
            parameter.data.copy_(value if adapter is None else value.to(parameter.device) - adapter)
        yield
    finally:
        for parameter, value in before:
            parameter.data.copy_(value)


def _parameter(subject: Subject, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    parameter: Tensor = getattr(base_layer(acting(subject.plain.get_submodule(path))), key)
    return parameter


def _mixed(own: Tensor, given: Tensor, where: Sequence[Index]) -> Tensor:
    """Return a parameter with a part of it from the other model."""
    mixed = own.clone()
    for index in where:
        mixed[index] = given.to(own.device)[index]
    return mixed
