"""`mechscope circuit-diff`: a task's circuit before and after fine-tuning: overlap, shifts, and which tuned edges carry the gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mechscope.errors import SettingsError
from mechscope.settings import Number, nested, setting
from mechscope.settings.discovery import DiscoverySettings
from mechscope.studies.groups import PromptPairs, TwoModels
from mechscope.studies.inputs import fingerprints, load_both, loading, record_models, tokenizer_of
from mechscope.studies.job import Job, Stage
from mechscope.studies.jobs.circuit import REQUEST, check_request, circuit_stages
from mechscope.studies.pairs import split_names
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.subject import Pair, Subject


@dataclass(frozen=True, kw_only=True)
class CircuitDiffSettings(TwoModels, PromptPairs):
    """Which models, pairs and method."""

    panel: ClassVar[str] = "Circuit"

    checkpoints: str | None = setting(None, "Models on the way from base to tuned, in order, joined by commas: the circuit over time.")
    discovery: DiscoverySettings = nested(DiscoverySettings)
    tokens_per_batch: Number | None = setting(256, "Most tokens of a batch of texts, padding included; decides the memory.")

    def __post_init__(self) -> None:
        """Refuse a checkpoint that is named twice.

        Raises:
            SettingsError: One is, or another setting is out of bounds.
        """
        super().__post_init__()
        if len(set(self.on_the_way)) < len(self.on_the_way):
            raise SettingsError(f"setting 'checkpoints' names a model twice: {self.checkpoints}")

    @property
    def on_the_way(self) -> list[str]:
        """Sources of the checkpoints."""
        return split_names(self.checkpoints or "")


def _models(run: JobRun[CircuitDiffSettings]) -> dict[str, Subject]:
    """Load the base, the checkpoints on the way, and the tuned model."""
    both = load_both(run, "base", "tuned")
    way = {label: _checkpoint(run, source, both.base) for label, source in labels(run.settings.on_the_way).items()}
    return {"base": both.base, **way, "tuned": both.tuned}


def _checkpoint(run: JobRun[CircuitDiffSettings], source: str, base: Subject) -> Subject:
    from mechscope.instrument import load, load_pair
    from mechscope.subject import pair

    settings, options = run.settings, loading(run.settings)
    if "base" in run.given:
        return pair(base, load(source, **options, tokenizer=tokenizer_of(run)), resize=settings.resize).tuned
    return load_pair(settings.base, source, resize=settings.resize, tokenizer=tokenizer_of(run), **options).tuned


def labels(sources: Sequence[str]) -> dict[str, str]:
    """Name checkpoints by the last part of their source, by their whole source where that is taken, and numbered where that is too.

    Labels name files, so they differ from each other and from `base` and `tuned` in these too.

    Returns:
        Sources by label.
    """
    from mechscope.studies.runner import plain

    last = [Path(source).name for source in sources]
    named: dict[str, str] = {}
    taken = {"base", "tuned"}
    for name, source in zip(last, sources, strict=True):
        wanted = [*([name] if last.count(name) == 1 else []), source, *(f"{source} ({number})" for number in range(2, len(sources) + 4))]
        label = next(one for one in wanted if plain(one).lower() not in taken)
        taken.add(plain(label).lower())
        named[label] = source
    return named


COMPARED: Input[dict[str, Subject]] = Input("models", _models, lambda models: list(fingerprints(models).items()), record_models)
"""Base, checkpoints and tuned model by label, in order."""


def _pair(run: JobRun[CircuitDiffSettings]) -> Pair:
    from mechscope.subject import pair

    models = run[COMPARED]
    return pair(models["base"], models["tuned"], resize=run.settings.resize)


def _change(run: JobRun[CircuitDiffSettings]) -> Tables:
    from mechscope.studies.circuit_change import circuits_over_time, compare_circuits
    from mechscope.studies.circuits import read_circuits

    models, request = run[COMPARED], run[REQUEST]
    order = list(models)
    circuits = read_circuits(run.folder, order)
    tables = compare_circuits(_pair(run), circuits, request, execution=run.execution)
    if len(order) > 2:
        tables["circuit_time"] = circuits_over_time(circuits, run.table("circuit_summary"), request, order=order, seed=run.settings.seed)
    return tables


SCORES, OTHER_SEED, CIRCUIT = circuit_stages(COMPARED)
CHANGE = Stage(
    name="circuit-change",
    work=_change,
    hangs_on=("discovery", "seed", "resize"),
    inputs=(COMPARED, REQUEST),
    after=(SCORES, CIRCUIT),
)


def _title(names: Mapping[str, str]) -> str:
    return f"The circuits of {names['base']} before and after fine-tuning"


JOB = Job(
    name="circuit-diff",
    help="Compare a task's circuit before and after fine-tuning: overlap, shifts, and which tuned edges carry the gain.",
    panel="circuits",
    example="mechscope circuit-diff gpt2 runs/tuned --pairs ioi --out runs/circuit-diff",
    settings=CircuitDiffSettings,
    arguments=("base", "tuned"),
    inputs=(COMPARED, REQUEST),
    stages=(SCORES, OTHER_SEED, CIRCUIT, CHANGE),
    sections=("circuit", "circuit-components", "circuit-change", "circuit-time"),
    title=_title,
    check=lambda run: check_request(run, COMPARED),
    first=lambda run: run[COMPARED]["base"],
)
