"""What a job is, and how it is measured in the process it has for itself.

    1. build the models and texts; run the job on less text, so that thread pools, workspaces and copies of the model belong to nobody;
    2. run it once, for its peak memory above the loaded models; the same for what it is compared with;
    3. let it take turns with the plain forward pass, logits included, of the same batch, so that a drifting clock hits all alike.

What counts is the ratio of medians: to that forward pass, and where a job's target is set against something else (a pass without logits, the bare
unembeddings), to that too. A peer's job is measured in the same way, so that its ratio stands in the same column.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.settings import FORWARD, OWN, ROUNDS, Settings
from benchmarks.shapes import Size
from benchmarks.watch import Watch, resident, settle

GIB = 2**30
# below this, in GiB, a ratio of memory says nothing: a page more or less would decide it
_LEAST_MEMORY = 1 / 1024


class Case(Protocol):
    """The models and texts of a job."""

    @property
    def texts(self) -> int:
        """How many."""

    @property
    def tokens(self) -> int:
        """Of all texts together."""

    @property
    def each(self) -> int | None:
        """Tokens of each text; None where they differ."""

    def small(self) -> Case:
        """Return the same models with less text."""


@dataclass(frozen=True)
class Beside:
    """What a job is compared with, other than one forward pass.

    Attributes:
        name: As the table says it, for example `backbone passes`.
        run: Does it.
        count: How many of them the job stands for: two models are compared with two passes.
    """

    name: str
    run: Callable[[Any], object]
    count: int | Callable[[Any], int] = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something whose cost is measured.

    Attributes:
        name: Its name; a peer's job has the name of mechscope's that does the same work.
        what: One line for the tables.
        build: Makes models and texts.
        run: Does the work.
        sizes: The texts by variant; a job is left out of variants it has none for. `{}` marks a job whose case decides.
        forward: The plain forward pass of the same batch; None for jobs that read no text.
        beside: What the ratio is to, if not one forward pass.
        numbers: Takes from what `run` returned the numbers that a peer's must agree with.
        ratio: Highest ratio allowed, if there is a target.
        gib: Most memory above the models in GiB, likewise.
        memory_ratio: Most memory relative to that of what it is compared with, likewise.
        by: Who does it.
        package: What has to be installed for it.
        rounds: Timed rounds where the command line does not say.
        slow: Time the first round too: it is long enough to need no warm-up.
        part: A part of another job, run only when it is named.
        seconds: About how long its whole measurement takes on two cores.
        measure: Measures job, forward pass and what is beside it, by these names, where taking turns whole is not fine enough.
    """

    name: str
    what: str
    build: Callable[[Settings, Size], Any]
    run: Callable[[Any], Any]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    forward: Callable[[Any], object] | None = None
    beside: Beside | None = None
    numbers: Callable[[Any], np.ndarray] | None = None
    ratio: float | None = None
    gib: float | None = None
    memory_ratio: float | None = None
    by: str = OWN
    package: str = ""
    rounds: int = ROUNDS
    slow: bool = False
    part: bool = False
    seconds: int = 60
    measure: Callable[[Any], dict[str, Taken]] | None = None

    def fits(self, shape_name: str) -> bool:
        """Tell whether the job has texts for a variant."""
        return not self.sizes or shape_name in self.sizes


@dataclass
class Taken:
    """What rounds of one thing took.

    Attributes:
        seconds: Wall time of every round.
        cpu_seconds: CPU time of every round.
        peak: Peak memory above the loaded models, in bytes.
        result: What the first run returned.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak: int = 0
    result: Any = None

    def add(self, watch: Watch) -> None:
        """Add a round."""
        self.seconds.append(watch.seconds)
        self.cpu_seconds.append(watch.cpu_seconds)

    def record(self) -> dict[str, Any]:
        """Return medians, rounds and memory."""
        return {
            "seconds": statistics.median(self.seconds),
            "cpu_seconds": statistics.median(self.cpu_seconds),
            "rounds": self.seconds,
            "memory_gib": self.peak / GIB,
        }


def measure(job: Job, settings: Settings) -> tuple[dict[str, Any], np.ndarray | None]:
    """Measure a job in this process; return its record and the numbers it is compared by."""
    torch.set_num_threads(settings.threads)
    gc.freeze()  # collecting what the imported libraries hold would take longer than a small job
    try:
        case = job.build(settings, settings.size(job.sizes.get(settings.shape_name, Size(1, 1))))
        settle()
        loaded = resident()
        if settings.alone:
            taken = {"job": _first(job.run, case, settings)}
        elif job.measure is not None:
            taken = job.measure(case)
        else:
            taken = take_turns(job, case, settings)
    finally:
        gc.unfreeze()
    record = {**_record(job, case, settings, taken), "loaded_gib": loaded / GIB}
    return record, None if job.numbers is None else np.asarray(job.numbers(taken["job"].result), dtype=np.float64)


def take_turns(job: Job, case: Case, settings: Settings) -> dict[str, Taken]:
    """Measure a job, the forward pass and what is beside it, in rounds."""
    job.run(case.small())
    runs: dict[str, Any] = {"job": job.run, "forward": job.forward, "beside": job.beside and job.beside.run}
    runs = {name: run for name, run in runs.items() if run is not None}
    taken = {name: _first(run, case, settings) for name, run in runs.items()}
    first = taken["job"].seconds[0]
    # a pass takes less than the job: more of them make its median as sure, as long as they cost little beside it
    passes = {name: 1 if name == "job" else max(1, min(5, round(first / of.seconds[0] / 4))) for name, of in taken.items()}
    rounds = settings.repeats or job.rounds
    if not job.slow:  # the first run warmed up
        for of in taken.values():
            of.seconds.clear()
            of.cpu_seconds.clear()
    for _ in range(rounds - job.slow):
        for name in reversed(taken):
            for _ in range(passes[name]):
                with Watch(device=settings.device) as watch:
                    runs[name](case)
                taken[name].add(watch)
    return taken


def _first(run: Callable[[Any], Any], case: Case, settings: Settings) -> Taken:
    """Run once and watch the memory too."""
    taken, watch = Taken(), Watch(device=settings.device, memory=True)
    with watch:
        taken.result = run(case)
    taken.add(watch)
    taken.peak = watch.peak
    return taken


def _record(job: Job, case: Case, settings: Settings, taken: Mapping[str, Taken]) -> dict[str, Any]:
    parts = {name: of.record() for name, of in taken.items()}
    own = parts["job"]
    record: dict[str, Any] = {"job": job.name, "by": job.by, "package": job.package, "what": job.what, "shape": settings.shape_name}
    record |= {"texts": case.texts, "tokens": case.tokens, "each": case.each, **own}
    record |= {"forward": parts.get("forward"), "passes": None, "beside": None, "ratio": None, "cpu_ratio": None, "memory_ratio": None}
    if "forward" in parts:
        record["passes"] = own["seconds"] / parts["forward"]["seconds"]
    compared = parts.get("beside", parts.get("forward"))
    if compared is not None:
        name, count = (job.beside.name, job.beside.count) if job.beside else (FORWARD, 1)
        count = count(case) if callable(count) else count
        record["beside"] = {"name": name, "count": count, **compared}
        record["ratio"] = own["seconds"] / count / compared["seconds"]
        record["cpu_ratio"] = own["cpu_seconds"] / count / max(compared["cpu_seconds"], 1e-9)
        # two models that run one after the other need the memory of one
        if compared["memory_gib"] > _LEAST_MEMORY:
            record["memory_ratio"] = own["memory_gib"] / compared["memory_gib"]
    record["noise"] = spread(own["rounds"])
    record["targets"] = {"ratio": job.ratio, "gib": job.gib, "memory_ratio": job.memory_ratio}
    return record


def spread(rounds: list[float]) -> float | None:
    """Return half of how far rounds lie apart, relative to their median; None for a single one."""
    return None if len(rounds) < 2 else (max(rounds) - min(rounds)) / 2 / statistics.median(rounds)
