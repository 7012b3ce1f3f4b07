"""Training dictionaries: several of them at once, on the same batches, so that activations are read once for all widths, rules and penalties.

    maps      centre and scale of every place, known before the first step
    memory    weights, gradients and moments, said before anything is allocated
    steps     each dictionary on each batch, its own learning rate and revival
    state     every few hundred steps in one file, from which training goes on to the last bit: the same weights as without the interruption
    ranks     each takes a part of every batch; gradients are added up, and all hold the same weights, those of one process but for rounding

A loss that is no number ends the training with one error; the last state before it is kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mechscope import ranks
from mechscope.errors import RunError, SettingsError
from mechscope.features.activations import Block, Source
from mechscope.features.batches import Position, batches
from mechscope.features.dictionary import Dictionary
from mechscope.features.layout import Layout
from mechscope.features.learner import DivergedError, Learner, memory_of
from mechscope.features.objective import checked
from mechscope.features.places import Place
from mechscope.features.step import Ahead
from mechscope.instrument import Execution
from mechscope.instrument.memory import free_memory
from mechscope.settings.features import FeatureTraining, Objective
from mechscope.shapes import by_shape
from mechscope.stats.convergence import Convergence, convergence
from mechscope.store.artifact import Artifact, Work
from mechscope.store.tables import read_table, write_table

log = logging.getLogger(__name__)

# what is noted of every step
COLUMNS = ("loss", "reconstruction", "l0", "dead")
_KIND = "mechscope training of dictionaries"
# steps between two lines of the log
_TOLD_EVERY = 100


@dataclass(frozen=True)
class Plan:
    """A dictionary to train.

    Attributes:
        layout: What it reads and writes.
        objective: What it is trained for.
        learning_rate: Its own peak learning rate; None for that of the training.
        seed: Of its own first weights; None for that of the training.
        apart: Whether the models that it reads start with decoders of their own (`Layout.tensors`).
    """

    layout: Layout
    objective: Objective = field(default_factory=Objective)
    learning_rate: float | None = None
    seed: int | None = None
    apart: bool = False


@dataclass(frozen=True)
class TrainedDictionary:
    """A dictionary and how its training went.

    Attributes:
        dictionary: The dictionary, with the maps of its places.
        curve: One row per step: `step`, `loss` (before the step; in units in which activations have mean squared norm one), `reconstruction` (its part
            without penalties: the fraction of variance unexplained), `l0` (mean active latents of a token), `dead` (latents silent for
            `dead_after` tokens).
        convergence: Whether it arrived (`mechscope.stats.convergence`).
    """

    dictionary: Dictionary
    curve: pd.DataFrame
    convergence: Convergence

    __repr__ = by_shape


def train(
    source: Source,
    plans: Mapping[str, Plan],
    folder: str | Path | None = None,
    *,
    training: FeatureTraining | None = None,
    keep_every: int = 500,
    device: str | torch.device = "cpu",
    execution: Execution = Execution(),
) -> dict[str, TrainedDictionary]:
    """Train dictionaries on one harvest.

    Args:
        source: The activations: a `Harvest` or a `Live`.
        plans: The dictionaries by name.
        folder: Where they are kept: a training that was killed goes on there, and a finished one of the same request is read. None to keep nothing.
        training: Steps, batch, learning rate.
        keep_every: Steps between states that are kept.
        device: Where they are trained.
        execution: Seed (of first weights and orders), progress.

    Returns:
        Dictionaries and curves by name.

    Raises:
        SettingsError: A plan contradicts itself or the source.
        RunError: The memory does not suffice, or the folder holds something else.
        DivergedError: A loss is no number; the last state before is kept.
    """
    training = training or FeatureTraining()
    run = Training(source, plans, training, torch.device(device), keep_every, execution)
    if ends := sorted(name for name, plan in plans.items() if plan.objective.end != "none"):
        raise SettingsError(
            f"dictionary {ends[0]!r} is trained for the model's predictions, which activations do not give: use train_end_to_end"
        )
    return run.kept(folder)


class Training:
    """Dictionaries on their way."""

    def __init__(
        self,
        source: Source,
        plans: Mapping[str, Plan],
        training: FeatureTraining,
        device: torch.device,
        keep_every: int,
        execution: Execution,
    ) -> None:
        if not plans:
            raise SettingsError("there is no dictionary to train: give at least one plan")
        self.source, self.plans, self.training, self.device = source, dict(plans), training, device
        self.keep_every, self.execution = keep_every, execution
        for name, plan in self.plans.items():
            missing = [str(place) for place in plan.layout.places if place not in source.places]
            if missing:
                raise SettingsError(
                    f"dictionary {name!r} needs activations of {', '.join(missing)}, harvested are {', '.join(map(str, source.places))}: harvest these too"
                )
            checked(plan.objective, plan.layout)
        self.curves = {name: np.full((training.steps, len(COLUMNS)), np.nan) for name in self.plans}
        self.position = Position()
        self.request: dict[str, Any] = {
            "kind": _KIND,
            "source": source.identity,
            "plans": {name: _plan_json(plan) for name, plan in self.plans.items()},
            "training": asdict(training),
            "seed": execution.seed,
        }

    def kept(self, folder: str | Path | None) -> dict[str, TrainedDictionary]:
        """Train and keep the result in a folder; read it where it is there."""
        if folder is None:
            self.go(None)
            return self.results()
        folder = Path(folder)
        with Artifact(folder.parent, self.request, name=folder.name) as artifact:
            if not artifact.done:
                self.go(artifact.work)
                _write(self.results(), artifact.result)
        return _read(folder, self.plans, self.training)

    def stream(self) -> Iterator[tuple[Position, Block]]:
        """Yield batches from the position on."""
        return batches(self.source, self.training.batch, self.execution.seed, self.position)

    def ahead(self, learner: Learner) -> Ahead | None:
        """Return what the last batch's reconstruction leads to further on."""
        return None

    def go(self, work: Work | None) -> None:
        """Train to the end, from the last state that was kept in the folder."""
        self._require_memory()
        self.maps = {place: self.source.affine(place) for plan in self.plans.values() for place in plan.layout.places}
        for name, plan in self.plans.items():
            for place, width in zip(
                (*plan.layout.inputs, *plan.layout.outputs), (*plan.layout.input_widths, *plan.layout.output_widths), strict=True
            ):
                if len(self.maps[place].centre) != width:
                    raise SettingsError(
                        f"dictionary {name!r} has width {width} at {place}, its activations have {len(self.maps[place].centre)}"
                    )
        self.learners = {name: self._learner(plan) for name, plan in self.plans.items()}
        start = self._resumed(work)
        stream = self.stream()
        began, told = time.monotonic(), start
        for at in range(start, self.training.steps):
            self.position, rows = next(stream)
            self._step(at, rows, work)
            done = at + 1
            self.execution.told("training dictionaries", done, self.training.steps)
            if done % _TOLD_EVERY == 0 or done == self.training.steps:
                now = time.monotonic()
                self._log(at, (done - told) * self.training.batch / max(now - began, 1e-9))
                began, told = now, done
            if work is not None and done % self.keep_every == 0 and done < self.training.steps:
                self._keep(work, done)

    def _learner(self, plan: Plan) -> Learner:
        seed = self.execution.seed if plan.seed is None else plan.seed
        tensors = {name: tensor.to(self.device) for name, tensor in plan.layout.tensors(seed=seed, apart=plan.apart).items()}
        rate = plan.learning_rate or self.training.learning_rate
        return Learner(plan.layout, plan.objective, replace(self.training, learning_rate=rate), tensors)

    def _require_memory(self) -> None:
        needed = memory_of([plan.layout for plan in self.plans.values()], self.training.batch)
        # ranks of one machine share its memory unless each has a device of its own
        free = min(ranks.exchange(free_memory(self.device))) // (min(ranks.size(), ranks.local_size()) if self.device.type == "cpu" else 1)
        told = (
            f"{len(self.plans)} {'dictionary' if len(self.plans) == 1 else 'dictionaries'} of "
            f"{', '.join(f'{plan.layout.latents:,}' for plan in self.plans.values())} latents need{'s' if len(self.plans) == 1 else ''} "
            f"{needed.total / 2**30:.2f} GiB (weights, gradients and moments {needed.held / 2**30:.2f}), {free / 2**30:.1f} GiB are free"
        )
        log.info(told)
        if needed.total > free:
            raise RunError(f"{told}: train fewer at once, or narrower ones")

    def _step(self, at: int, rows: Block, work: Work | None) -> None:
        own, tokens = _share(len(rows[self.source.places[0]]))
        mapped = {place: self.maps[place](value[own].to(self.device)) for place, value in rows.items() if place in self.maps}
        for name, learner in self.learners.items():
            u = _beside(mapped, learner.layout.inputs)
            v = u if learner.layout.outputs == learner.layout.inputs else _beside(mapped, learner.layout.outputs)
            try:
                done = learner.advance(u, v, tokens=tokens, ahead=self.ahead(learner))
            except DivergedError as error:
                kept = at // self.keep_every * self.keep_every
                state = f"the state of step {kept} is kept in {work.folder}" if work is not None and kept else "no state was kept yet"
                raise DivergedError(f"training dictionary {name!r} diverged ({error}): lower its learning_rate; {state}") from error
            self.curves[name][at] = (done.loss, done.reconstruction, int(done.active.sum()) / tokens, int(learner.dead.sum()))

    def _log(self, at: int, speed: float) -> None:
        lines = (
            f"{name}: loss {row[0]:.4g}, L0 {row[2]:.1f}, dead {row[3]:.0f}"
            for name, row in ((name, curve[at]) for name, curve in self.curves.items())
        )
        log.info("step %d of %d, %s tokens/s; %s", at + 1, self.training.steps, f"{speed:,.0f}", "; ".join(lines))

    def _keep(self, work: Work, done: int) -> None:
        tensors: dict[str, Tensor] = {}
        numbers = {}
        for name, learner in self.learners.items():
            own, numbers[name] = learner.state()
            tensors |= {f"{name}/{key}": tensor for key, tensor in own.items()}
            tensors[f"{name}/curve"] = torch.from_numpy(self.curves[name][:done])
        work.checkpoint(tensors, {"done": done, "position": asdict(self.position), "numbers": numbers})

    def _resumed(self, work: Work | None) -> int:
        """Take up the last state that was kept; return how many steps were done."""
        kept = None if work is None else work.resume()
        if kept is None:
            return 0
        tensors, meta = kept
        for name, learner in self.learners.items():
            learner.restore(
                {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")}, meta["numbers"][name]
            )
            self.curves[name][: meta["done"]] = tensors[f"{name}/curve"].numpy()
        self.position = Position(**meta["position"])
        return int(meta["done"])

    def results(self) -> dict[str, TrainedDictionary]:
        """Return what was trained."""
        found = {}
        for name, learner in self.learners.items():
            layout = learner.layout
            about = {**self.request, "plans": {name: _plan_json(self.plans[name])}, "limits": self.source.limits}
            dictionary = Dictionary(
                layout,
                {key: tensor.detach().cpu() for key, tensor in learner.tensors.items()},
                tuple(self.maps[place] for place in layout.inputs),
                tuple(self.maps[place] for place in layout.outputs),
                self.source.identity["models"].get(layout.outputs[-1].model, ""),
                about,
            )
            curve = pd.DataFrame(self.curves[name], columns=COLUMNS)
            curve.insert(0, "step", np.arange(len(curve)))
            found[name] = TrainedDictionary(dictionary, curve, _judged(curve, self.training))
        return found


def _share(rows: int) -> tuple[slice, int]:
    """Return which rows of a batch are this rank's, and how many there are."""
    ends = [rows * rank // ranks.size() for rank in range(ranks.size() + 1)]
    return slice(ends[ranks.rank()], ends[ranks.rank() + 1]), rows


def _judged(curve: pd.DataFrame, training: FeatureTraining) -> Convergence:
    return convergence(curve["loss"], pace=[training.pace(at) for at in range(training.steps)])


def _beside(mapped: Mapping[Place, Tensor], where: Sequence[Place]) -> Tensor:
    return mapped[where[0]] if len(where) == 1 else torch.cat([mapped[place] for place in where], dim=1)


def _plan_json(plan: Plan) -> dict[str, Any]:
    own: dict[str, Any] = ({} if plan.seed is None else {"seed": plan.seed}) | ({"apart": True} if plan.apart else {})
    return {"layout": plan.layout.to_json(), "objective": asdict(plan.objective), "learning_rate": plan.learning_rate, **own}


def _write(found: Mapping[str, TrainedDictionary], folder: Path) -> None:
    if not ranks.is_first():
        return
    for name, each in found.items():
        each.dictionary.save(folder / f"{name}.safetensors")
        write_table(each.curve, folder / f"{name}.curve.parquet")


def _read(folder: Path, plans: Mapping[str, Plan], training: FeatureTraining) -> dict[str, TrainedDictionary]:
    found = {}
    for name in plans:
        curve = read_table(folder / f"{name}.curve.parquet")
        found[name] = TrainedDictionary(Dictionary.load(folder / f"{name}.safetensors"), curve, _judged(curve, training))
    return found
