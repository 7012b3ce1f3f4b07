"""`mechscope dynamics`: any job over the checkpoints of a training, as curves with intervals: what changed when."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mechscope import ranks
from mechscope.errors import SettingsError
from mechscope.settings import setting
from mechscope.store.series import Series, Step
from mechscope.studies.groups import Loading
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import Input, JobRun, Tables
from mechscope.studies.series import Plan, job_named, job_settings, models, plan, read_steps

if TYPE_CHECKING:
    from mechscope.subject import Subject

_STEPS = "steps"


@dataclass(frozen=True, kw_only=True)
class DynamicsSettings(Loading):
    """Which checkpoints, and which job at each of them."""

    panel: ClassVar[str] = "Series"

    series: str = setting(
        ...,
        "The checkpoints: a folder of checkpoint-N (models or adapters), folders joined by commas, or a model on the hub with branches stepN.",
    )
    job: str = setting(..., "The job that is run at every step, such as roles, probe, diff or circuit; its own options may follow.")
    options: str | None = setting(
        None,
        'Options of the job, as on its own command line: "--data articles.jsonl --documents 16"; there they may also stand by themselves.',
    )
    base: str | None = setting(
        None,
        "The model before training: step 0 of a job of one model, and what others compare with; by default an adapter's base, or the first step.",
    )
    at_steps: str | None = setting(None, "Numbers of the steps that are read, joined by commas; by default all.")
    against_base: bool = setting(
        False, "Give a job of one or two models (roles, probe, weights) the base and the step, rather than the step alone."
    )

    def __post_init__(self) -> None:
        """Refuse a job that cannot be run, options it does not have, and numbers of steps that are none.

        Raises:
            SettingsError: One of these.
        """
        super().__post_init__()
        job_settings(job_named(self.job), self.options or "", self.handed_down)
        _ = self.only

    @property
    def only(self) -> list[int] | None:
        """The numbers of the steps that are read; None for all."""
        if self.at_steps is None:
            return None
        try:
            return [int(part) for part in self.at_steps.split(",")]
        except ValueError:
            raise SettingsError(f"setting 'at_steps' is {self.at_steps!r}: write numbers of steps joined by commas, as 0,100,400") from None

    @property
    def handed_down(self) -> dict[str, Any]:
        """Settings that the job has as well."""
        given = {"dtype": self.dtype, "device": self.device, "unsafe": self.unsafe, "seed": self.seed}
        return given if self.tokens_per_batch is None else {**given, "tokens_per_batch": self.tokens_per_batch}


def _plan(run: JobRun[DynamicsSettings]) -> Plan:
    from mechscope.studies.places import check_paths

    settings = run.settings
    job = job_named(settings.job)
    own = job_settings(job, settings.options or "", settings.handed_down)
    check_paths(job, own)
    series = Series.find(settings.series, only=settings.only)
    series.check_alike()
    return plan(job, own, series, run.source("base"), against_base=settings.against_base)


PLAN: Input[Plan] = Input(
    "plan",
    _plan,
    lambda planned: planned.fingerprint,
    lambda planned: {"series": [{"step": step.number, "source": step.source, "revision": step.revision} for step in planned.steps]},
)
"""What is run at which steps."""
STEPS: Input[Mapping[str, Step]] = Input(
    "step", lambda run: {str(step.number): step for step in run[PLAN].steps}, lambda steps: [step.fingerprint for step in steps.values()]
)
"""The steps by their numbers."""


def _first(run: JobRun[DynamicsSettings]) -> Subject:
    raise RuntimeError("a series has no first model: each step loads its own")


def _step(run: JobRun[DynamicsSettings]) -> Tables:
    """Run the job at one step, and keep its tables and a sketch of the weights."""
    from mechscope.store.tables import write_table
    from mechscope.studies.runner import run_job
    from mechscope.subject.series import sketch

    planned, steps = run[PLAN], run[STEPS]
    step = steps[run.label]
    run.tell("steps", list(steps).index(run.label), len(steps))
    given = models(run, planned, step)
    subject = given.get("tuned", next(iter(given.values())))
    run.stage.write_tensors(f"step_{step.number}", sketch(subject), {"step": step.number, "fingerprint": subject.fingerprint})
    inner = run.stage.path("job")
    result = run_job(planned.job, planned.settings, inner, given=given, progress=run.execution.progress, page=False)
    for name, table in result.tables.items():
        if name != "caveats":
            path = run.folder.path / _STEPS / str(step.number) / f"{name}.parquet"
            if ranks.is_first():
                write_table(table, path)
            run.stage.add(path)
    del given, subject, result
    gc.collect()  # models hold circles, and the next step's is about to be loaded
    return {}


def _course(run: JobRun[DynamicsSettings]) -> Tables:
    import pandas as pd

    from mechscope.errors import RunError
    from mechscope.report.course import curves, meaning
    from mechscope.studies.course import changes
    from mechscope.subject.series import survey

    steps = run[PLAN].steps
    kept = [run.folder.tensors(f"step_{step.number}") for step in steps]
    surveyed = survey([step.number for step in steps], [facts["fingerprint"] for _, facts in kept], [tensors for tensors, _ in kept])
    tables: dict[str, pd.DataFrame] = {"series_steps": surveyed.assign(source=[step.source for step in steps])}
    values = curves(read_steps(run.folder.path / _STEPS, steps))
    if values.empty:
        raise RunError(f"{run.settings.job} gave no number at two steps or more: name another job, or more steps")
    changed = changes(values, seed=run.settings.seed)
    told = [meaning(table, quantity) for table, quantity in zip(changed["table"], changed["quantity"], strict=True)]
    changed.insert(2, "meaning", told)
    return {**tables, "series_values": values, "series_changes": changed}


STEP = Stage(name="step", work=_step, hangs_on=("dtype", "seed"), inputs=(PLAN,), each=STEPS)
COURSE = Stage(name="course", work=_course, hangs_on=("seed",), after=(STEP,))


JOB = Job(
    name="dynamics",
    help="Run any job over the checkpoints of a training: what changed when, as curves with intervals and change points.",
    panel="compare",
    example="mechscope dynamics runs/tuned diff --data articles.jsonl --out runs/dynamics",
    settings=DynamicsSettings,
    arguments=("series", "job"),
    inputs=(PLAN, STEPS),
    stages=(STEP, COURSE),
    sections=("dynamics",),
    title=lambda names: "What training changed when",
    first=_first,
    passes="options",
)
