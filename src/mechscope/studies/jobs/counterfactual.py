"""`mechscope counterfactual`: runs declared by where each component takes its value from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mechscope.choices import MetricName
from mechscope.errors import SettingsError
from mechscope.settings import setting
from mechscope.studies.declared import read_mapping
from mechscope.studies.groups import ModelAndTuned, PromptPairs
from mechscope.studies.inputs import MODELS, PAIRS
from mechscope.studies.job import Job, Stage
from mechscope.studies.pairs import check_pairs
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.causal import Source

_NAMED = ("clean", "corrupt", "zero", "resample", "mean", "tuned:clean", "tuned:corrupt")
Declared = dict[str, dict[str, str | float]]


@dataclass(frozen=True, kw_only=True)
class CounterfactualSettings(ModelAndTuned, PromptPairs):
    """Which runs are made."""

    panel: ClassVar[str] = "Counterfactual"

    runs: str = setting(
        ...,
        "JSON or YAML file of runs by name, each with components and where they take their values from: clean, corrupt, zero, resample (another "
        "text), mean (over the clean texts), a number, tuned:clean or tuned:corrupt (the model of --tuned). "
        'For example {"no mover": {"a9.h9,a9.h6": "corrupt", "m0": "mean"}}.',
    )
    reads: Literal["clean", "corrupt"] = setting(
        "clean", "The text that is read; components that are not named compute on what they are given."
    )
    metric: MetricName = setting("logit-diff", "What is measured; loss is of a target span, kl compares with the clean run.")


def _read_runs(run: JobRun[CounterfactualSettings]) -> Declared:
    """Read the file of runs; components and sources are checked by their text, so that a slip costs no model's time."""
    from mechscope.subject import Components

    file = run.settings.runs
    declared: Declared = {}
    for name, parts in read_mapping(file, "the file of runs").items():
        if not isinstance(parts, dict):
            raise SettingsError(f'run {name!r} of {file} is {parts!r}: write components and their sources, such as {{"a3.h5": "zero"}}')
        for components, source in parts.items():
            Components.parse(str(components))
            number = isinstance(source, int | float) and not isinstance(source, bool)
            if not number and source not in _NAMED:
                raise SettingsError(f"run {name!r} of {file} takes {components} from {source!r}: use {', '.join(_NAMED)} or a number")
            if str(source).startswith("tuned:") and run.settings.tuned is None:
                raise SettingsError(f"run {name!r} of {file} takes {components} from the tuned model: name it by --tuned")
        declared[name] = {str(components): source for components, source in parts.items()}
    return declared


RUNS: Input[Declared] = Input("runs", _read_runs, lambda declared: declared, lambda declared: {"runs": declared})
"""The declared runs: by name, components in text form with their sources."""


def _check(run: JobRun[CounterfactualSettings]) -> None:
    check_pairs(run.first, run[PAIRS], metric=run.settings.metric)


def _sources(run: JobRun[CounterfactualSettings], declared: Declared) -> dict[str, dict[str, str | Source]]:
    """Turn the names of sources into sources."""
    from mechscope.causal import Text, Vector, mean_of
    from mechscope.subject import Components

    means = None
    if any(source == "mean" for parts in declared.values() for source in parts.values()):
        experts = any(Components.parse(components).experts for parts in declared.values() for components in parts)
        sites = ("z", "mlp_output", *(("expert_output",) if experts else ()))
        means = mean_of(run.first, run[PAIRS], sites, execution=run.execution)

    def source_of(named: str | float) -> str | Source:
        if named == "mean" and means is not None:
            return means
        if not isinstance(named, str):
            return Vector(float(named))
        if named.startswith("tuned:"):
            return Text("clean" if named == "tuned:clean" else "corrupt", model=run[MODELS]["tuned"])
        return named

    return {name: {components: source_of(named) for components, named in parts.items()} for name, parts in declared.items()}


def _run(run: JobRun[CounterfactualSettings]) -> Tables:
    from mechscope.causal import run_counterfactuals

    settings = run.settings
    declared = run[RUNS]
    effects = run_counterfactuals(
        run.first, run[PAIRS], _sources(run, declared), base=settings.reads, metric=settings.metric, execution=run.execution
    )
    run.folder.record("notes", effects.notes)
    changed = {
        name: "; ".join(f"{components}: {source}" for components, source in parts.items()) or "nothing" for name, parts in declared.items()
    }
    return {"counterfactual": effects.table.assign(changed=[changed[name] for name in effects.table["component"]])}


def _title(names: Mapping[str, str]) -> str:
    return f"Counterfactual runs of {names.get('model', names.get('base'))}"


# resampling takes values from the texts of a batch, so its size decides too
_DECIDING = ("reads", "metric", "seed", "tokens_per_batch")

JOB = Job(
    name="counterfactual",
    help="Counterfactual runs: say of components which run, model or mean they take their values from, and see what the metric becomes.",
    panel="intervene",
    example="mechscope counterfactual gpt2 --pairs ioi --runs runs.yaml --out runs/counterfactual",
    settings=CounterfactualSettings,
    arguments=("model",),
    inputs=(RUNS, MODELS, PAIRS),
    stages=(Stage(name="counterfactual", work=_run, hangs_on=_DECIDING, inputs=(RUNS, MODELS, PAIRS)),),
    sections=("counterfactual",),
    title=_title,
    check=_check,
)
