"""A job over a series: its settings, the models of each step, and its tables as curves.

A step is a stage of its own: its models are loaded, the job is run within the stage's scratch folder (so that a kill in the middle of a step goes on where
the job was) and its tables are kept in `steps/N/`. The next step begins when the last one's model is gone.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mechscope.errors import SettingsError
from mechscope.settings import leaves
from mechscope.store.series import Series, Step
from mechscope.studies.job import Job
from mechscope.studies.run import JobRun

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.subject import Subject

IN_MEMORY = "of the series"
# settings that the series itself has, and hands down
_SHARED = ("dtype", "device", "unsafe", "seed", "tokens_per_batch")
# groups of jobs that train, or are whole studies
_OTHERS = ("tune", "studies")
_MODELS = ("model", "base", "tuned", "tokenizer")


def able(job: Job[Any]) -> bool:
    """Tell whether a job can be run over a series: it measures one model, or a base and a tuned one, by stages of its own."""
    names = {leaf.name for leaf in job.options}
    if job.execute is not None or not job.stages or job.panel in _OTHERS or "series" in names:
        return False
    return "model" in names or {"base", "tuned"} <= names


def job_named(name: str) -> Job[Any]:
    """Return the job that is run over a series.

    Raises:
        SettingsError: There is none of that name, or it cannot be run over a series; the message lists those that can.
    """
    from mechscope.store.paths import nearest
    from mechscope.studies.jobs import jobs

    known = {job.command.replace(" ", "-"): job for job in jobs().values()}
    found = known.get(name.replace(" ", "-"))
    if found is not None and able(found):
        return found
    can = ", ".join(sorted(command for command, job in known.items() if able(job)))
    if found is not None:
        raise SettingsError(f"setting 'job' is {name!r}, which does not measure a model at a time: use one of {can}")
    close = nearest(name, known)
    raise SettingsError(f"setting 'job' is {name!r}, which is not known: {f'did you mean {close}?' if close else f'use one of {can}'}")


def job_settings(job: Job[Any], options: str, shared: Mapping[str, Any]) -> Any:
    """Return the settings of the job at each step, its models to be given in memory.

    Args:
        job: The job.
        options: Its settings as on its own command line: `--documents 16 --gini`.
        shared: Settings of the series that the job has as well.

    Raises:
        SettingsError: An option is not one of the job's, names a model, lacks its value, or is refused by the job.
    """
    kinds = {leaf.name: leaf for leaf in job.options}
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise SettingsError(f"setting 'options' is {options!r}: {error}") from error
    given: dict[str, Any] = {}
    while words:
        flag, joined, value = words.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        off = name.startswith("no_") and name not in kinds and name.removeprefix("no_") in kinds
        name = name.removeprefix("no_") if off else name
        if not flag.startswith("--"):
            raise SettingsError(f"{flag!r} is not an option of {job.command}: options have a name, as --documents 16")
        if name in (*_MODELS, *_SHARED) and name in kinds:
            raise SettingsError(f"option {flag} of {job.command} is given by the series: leave it out of 'options'")
        if name in kinds and kinds[name].hint is bool and not joined:
            given[name] = not off
        elif not joined and (not words or words[0].startswith("--")):
            raise SettingsError(f"option {flag} of {job.command} needs a value" if name in kinds else f"{job.command} has no option {flag}")
        else:
            given[name] = value if joined else words.pop(0)
    given |= {name: shared[name] for name in _SHARED if name in kinds and name in shared}
    return job.resolve(**given, **{name: IN_MEMORY for name in ("model", "base") if name in kinds}, **_tuned(job))


def _tuned(job: Job[Any]) -> dict[str, str]:
    names = {leaf.name for leaf in job.options}
    return {"tuned": IN_MEMORY} if "tuned" in names and "model" not in names else {}


@dataclass(frozen=True)
class Plan:
    """What is run at which steps.

    Attributes:
        job: The job.
        settings: Its settings at every step.
        steps: The steps it is run at, in order.
        base: What steps are compared with: a source, or a model in memory; None where the job compares nothing and no base is known.
        compares: Whether the job is given base and step.
    """

    job: Job[Any]
    settings: Any
    steps: tuple[Step, ...]
    base: Any
    compares: bool

    @property
    def fingerprint(self) -> Any:
        """What of the plan decides a step's result: the job with its settings, files they name, and the base."""
        from mechscope.store.hashing import hash_file, hash_json
        from mechscope.subject import Subject

        values = {leaf.name: leaf.read(self.settings) for leaf in leaves(type(self.settings))}
        files = {
            name: hash_file(path)
            for name, value in values.items()
            if isinstance(value, str) and (path := Path(value).expanduser()).is_file()
        }
        base = None
        if self.compares:
            base = self.base.fingerprint if isinstance(self.base, Subject) else Step(0, str(self.base)).fingerprint
        settings = {name: value for name, value in dataclasses.asdict(self.settings).items() if name != "device"}
        return {"job": self.job.name, "settings": hash_json(settings), "files": files, "base": base, "compares": self.compares}


def plan(job: Job[Any], settings: Any, series: Series, base: Any, *, against_base: bool) -> Plan:
    """Decide which steps are measured, and against what.

    The base is the one that is given, else that of a series of adapters, else the first step. A job of one model also measures it, as step 0, where the
    series has no step 0; a job of two compares every later step with it.

    Raises:
        SettingsError: The job is to compare with a base and cannot; or nothing is left to compare.
    """
    import json

    names = {leaf.name for leaf in job.options}
    if against_base and "tuned" not in names:
        raise SettingsError(f"setting 'against_base' is for jobs of one or two models, and {job.command} takes one: leave it out")
    compares = against_base or "model" not in names
    steps = list(series.steps)
    first = steps[0]
    if base is None and not first.revision and (adapter := first.folder() / "adapter_config.json").is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if compares:
        if base is None:
            base, steps = str(first.folder()), steps[1:]
        elif isinstance(base, str) and any(not step.revision and _same(step.source, base) for step in steps):
            steps = [step for step in steps if not _same(step.source, base)]
        if not steps:
            raise SettingsError(f"series {series.source!r} has no step but the base: nothing is left to compare")
    elif isinstance(base, str) and steps[0].number > 0 and not any(_same(step.source, base) for step in steps):
        steps.insert(0, Step(0, base))
    if compares and "tuned" in names and "model" in names:
        settings = dataclasses.replace(settings, tuned=IN_MEMORY)
    return Plan(job, settings, tuple(steps), base, compares)


def _same(one: str, other: str) -> bool:
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def models(run: JobRun[Any], planned: Plan, step: Step) -> dict[str, Subject]:
    """Load what the job is given at a step, by the names of its settings; an adapter's base is the same weights with the adapter off."""
    from mechscope.instrument import load, load_pair
    from mechscope.studies.inputs import loading
    from mechscope.subject import Subject, pair
    from mechscope.subject.load import is_adapter

    folder = str(step.folder())
    options: dict[str, Any] = {**loading(run.settings), "tokenizer": _tokenizer(run, planned, step)}
    one = "model" if "model" in {leaf.name for leaf in planned.job.options} else "base"
    if not planned.compares:
        if isinstance(planned.base, str) and is_adapter(folder):
            options["base"] = planned.base
        return {one: load(folder, **options)}
    if isinstance(planned.base, Subject):
        both = pair(planned.base, load(folder, **options))
    else:
        resize: Literal["refuse", "truncate"] = getattr(planned.settings, "resize", "refuse")
        both = load_pair(str(planned.base), folder, resize=resize, **options)
    return {one: both.base, "tuned": both.tuned}


def _tokenizer(run: JobRun[Any], planned: Plan, step: Step) -> Any:
    """Return the tokenizer to load with: the given one, else the base's for checkpoints that were saved without one; None for the step's own."""
    from mechscope.studies.inputs import tokenizer_of
    from mechscope.subject import Subject

    given = tokenizer_of(run)
    if given is not None or any(step.folder().glob("*token*")) or (step.folder() / "vocab.json").is_file():
        return given
    if isinstance(planned.base, Subject):
        return planned.base.tokenizer
    return planned.base or "none"


def read_steps(folder: Path, steps: Sequence[Step]) -> dict[str, pd.DataFrame]:
    """Return the tables of all steps by name, those of each below the last one's, with a column `step`."""
    import pandas as pd

    from mechscope.store.tables import read_table

    parts: dict[str, list[pd.DataFrame]] = {}
    for step in steps:
        for file in sorted((folder / str(step.number)).glob("*.parquet")):
            parts.setdefault(file.stem, []).append(read_table(file).assign(step=step.number))
    return {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}
