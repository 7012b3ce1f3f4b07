"""The flagship: what fine-tuning to summarize changed in a model, which parts it changed most, and whether LoRA belongs there (paper 1).

    1. documents: load, divide, encode
    2. tuned model: the one given, or fine-tuned here (full, and LoRA beside it)
    3. difference: base against tuned over held-out documents; with a LoRA trained here, the two further pairs of the paper
    4. selection: which layers and heads changed most, and how stable that is
    5. reading: the roles of heads before and after, cards of the selected heads, what each layer already says of a summary
    6. interventions: do these layers and heads carry what fine-tuning brought?
    7. circuits: which edges bring salient content into the summary, before and after, and what changed
    8. bake-off: LoRA there, in the circuit, everywhere, at random places, …, over seeds and at matched budgets
    9. summaries of held-out documents, side by side
    10. claims: the paper's, each with what was measured and a verdict
    11. report

Every stage is skipped when it was done with the same inputs, so a killed study continues with the same command.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mechscope.adapt.settings import check_batch_size
from mechscope.data.sources import is_file_source
from mechscope.instrument import load, load_pair
from mechscope.progress import Progress
from mechscope.store.run import RunFolder
from mechscope.studies import stages
from mechscope.studies.bakeoff_stage import bakeoff_stage, circuit_places
from mechscope.studies.causal_stage import causal_stage
from mechscope.studies.circuit_checks import check_discovery
from mechscope.studies.circuit_stages import summarization_circuit
from mechscope.studies.claims import claims_table
from mechscope.studies.corpora import Splits, encode_for, load_corpus, load_splits
from mechscope.studies.pair_settings import DiscoverySettings
from mechscope.studies.reading_stages import reading_stages
from mechscope.studies.settings import VOLATILE, BakeOffSettings, DiffSettings, ModelSettings, StudySettings
from mechscope.subject import Components, Pair, Subject, pair

log = logging.getLogger(__name__)

_TABLES = (
    "heads",
    "layers",
    "weights",
    "outputs",
    "selection",
    "head_roles",
    "head_role_changes",
    "role_definitions",
    "head_cards",
    "lens_summary",
    "lens_change",
    "logit_attribution",
    "logit_attribution_change",
    "weight_heads",
    "weight_changes",
    "weight_tokens",
    "weight_singular",
    "composition",
    "neurons",
    "neuron_contexts",
    "cross_model",
    "layer_sets",
    "ablation",
    "importance",
    "effects",
    "circuit_summary",
    "circuit_curve",
    "circuit_components",
    "circuit_edges",
    "circuit_nodes",
    "circuit_overlap",
    "circuit_shift",
    "circuit_gain",
    "circuit_time",
    "bakeoff",
    "bakeoff_summary",
    "learning_curves",
    "rouge",
    "pairs",
    "claims",
)


@dataclass(frozen=True)
class Study:
    """A finished study: its folder, its page, and its tables by name.

    Attributes:
        path: The run folder.
        report: The page.
        tables: The tables the study wrote, by name.
    """

    path: Path
    report: Path
    tables: dict[str, pd.DataFrame]

    @classmethod
    def of(cls, run: RunFolder, report: Path) -> Study:
        """Read a finished run."""
        return cls(run.path, report, {name: run.table(name) for name in _TABLES if run.has_table(name)})


def study(settings: StudySettings, out: str | Path, *, command: Sequence[str] | None = None, progress: Progress | None = None) -> Study:
    """Run the whole study, or continue it.

    Args:
        settings: What to study and how.
        out: The run folder.
        command: The command line that asked for it, for the report.
        progress: Called with a label, what is done and how much there is.

    Raises:
        MechscopeError: Models, documents or settings cannot be used, or the folder belongs to another run.
    """
    # what is wrong here is known before hours of other stages
    if settings.bakeoff or settings.tuned is None:
        check_batch_size(settings.batch_size)
    if settings.circuit:
        check_discovery(DiscoverySettings(method=settings.circuit_method, circuit_fraction=settings.circuit_size), metric="loss")
    with RunFolder.open(out, asdict(settings), kind="summarization", volatile=VOLATILE) as run:
        record_command(run, command)
        models, splits = _models(run, settings, progress)
        # read before the long stages, so that a wrong circuit is known at once
        circuit = circuit_places(models["base"], settings)
        compared = pair(models["base"], models["tuned"], resize=settings.resize)
        _record(run, models, splits, settings)
        further = {}
        if "lora" in models:
            further = {f"{name}–LoRA": pair(models[name], models["lora"], resize=settings.resize) for name in ("base", "tuned")}
        stages.difference_stage(run, compared, splits.encoded["test"], settings, further=further, seed=settings.seed, progress=progress)
        layers, heads = stages.selection_stage(run, settings, seed=settings.seed)
        reading_stages(run, compared, splits, settings, heads, progress=progress)
        if settings.causal:
            causal_stage(run, compared, splits.encoded["test"], settings, layers, heads, seed=settings.seed, progress=progress)
        if settings.circuit:
            found = summarization_circuit(run, compared, splits.corpora["test"], settings, progress=progress)
            # what the user names comes before what was found
            circuit = (circuit[0] or found[0], circuit[1] or found[1])
        if settings.bakeoff:
            plain = _plain_base(models["base"], settings)
            contest = settings if circuit[0] else _without_circuit(settings)
            bakeoff_stage(run, plain, splits, contest, layers, heads, *circuit, progress=progress)
        stages.summaries_stage(run, models, splits, settings, progress=progress)
        claims_stage(run, settings)
        return Study.of(run, stages.report_stage(run))


def diff_run(settings: DiffSettings, out: str | Path, *, command: Sequence[str] | None = None, progress: Progress | None = None) -> Study:
    """Measure a difference into a run folder: tables, selection, claims about attention, report.

    Arguments and errors as for `study`.
    """
    with RunFolder.open(out, asdict(settings), kind="diff", volatile=VOLATILE) as run:
        record_command(run, command)
        compared = load_pair(settings.base, settings.tuned, resize=settings.resize, **_loading(settings))
        corpus = load_corpus(
            settings, settings.data, split=document_split(settings, settings.data), limit=settings.documents, name="documents"
        )
        encoded = encode_for(settings, corpus, compared.base)
        splits = Splits({"test": corpus}, {"test": encoded})
        _record(run, {"base": compared.base, "tuned": compared.tuned}, splits, settings)
        stages.difference_stage(run, compared, encoded, settings, seed=settings.seed, progress=progress)
        stages.selection_stage(run, settings, seed=settings.seed)
        claims_stage(run, settings)
        return Study.of(run, stages.report_stage(run))


def document_split(settings: DiffSettings, data: str) -> str | None:
    """Return the split to measure on: the one asked for, else `test`; files have none."""
    return settings.split or (None if is_file_source(data) else "test")


def bakeoff_run(
    settings: BakeOffSettings, out: str | Path, *, command: Sequence[str] | None = None, progress: Progress | None = None
) -> Study:
    """Run a bake-off alone into a run folder: tables and report.

    Arguments and errors as for `study`.
    """
    check_batch_size(settings.batch_size)
    layers = Components.parse(settings.target_layers)
    heads = Components.parse(settings.target_heads or "none")
    with RunFolder.open(out, asdict(settings), kind="bakeoff", volatile=VOLATILE) as run:
        record_command(run, command)
        subject = load(settings.base, **_loading(settings))
        circuit = circuit_places(subject, settings)
        splits = load_splits(settings, subject)
        _record(run, {"base": subject}, splits, settings)
        bakeoff_stage(run, subject, splits, settings, layers, heads, *circuit, progress=progress)
        stages.summaries_stage(run, {"base": subject}, splits, settings, progress=progress)
        return Study.of(run, stages.report_stage(run))


def report_run(path: str | Path) -> Path:
    """Write a run's report again, from its tables, and return the page's path.

    Raises:
        RunError: It is not a run folder, or holds no tables yet.
    """
    found = RunFolder.read(path)
    with RunFolder.open(path, found.settings, kind=found.kind, volatile=VOLATILE) as run:
        return stages.report_stage(run)


def claims_stage(run: RunFolder, settings: Any) -> None:
    """Write the table `claims` from the tables that are there."""
    names = (
        *("bakeoff", "bakeoff_summary", "learning_curves", "layer_sets", "ablation", "importance"),
        *("circuit_overlap", "circuit_gain", "circuit_summary"),
    )
    needed = ("difference", "selection", "bakeoff", "causal", "circuit", "circuit-change")
    inputs = {name: record["outputs"] for name, record in run.manifest["stages"].items() if name in needed}
    with run.stage("claims", {**inputs, "rows": settings.rows, "rule": settings.layer_rule}, alone=True) as stage:
        if stage.done:
            return
        trained = [run.table(name) if run.has_table(name) else None for name in names]
        table = claims_table(
            run.table("heads"), run.table("layers"), run.table("selection"), *trained, rows=settings.rows, rule=settings.layer_rule
        )
        stage.write_table("claims", table)


def _models(run: RunFolder, settings: StudySettings, progress: Progress | None) -> tuple[dict[str, Subject], Splits]:
    """Load the models of a study, fine-tuning those that are missing."""
    loading = _loading(settings)
    if settings.tuned is not None:
        given: Pair = load_pair(settings.base, settings.tuned, resize=settings.resize, **loading)
        return {"base": given.base, "tuned": given.tuned}, load_splits(settings, given.base)
    base = load(settings.base, **loading)
    splits = load_splits(settings, base)
    for name, method in (("tuned", "full"), ("lora", "lora")):
        stages.tune_stage(run, name, base, splits, settings, method=method, seed=settings.seed, progress=progress)
    tuned = load(run.path / "models" / "tuned", tokenizer=base.tokenizer, **loading)
    lora = load(run.path / "models" / "lora", base=settings.base, tokenizer=base.tokenizer, **loading)
    return {"base": base, "tuned": tuned, "lora": lora}, splits


def _plain_base(base: Subject, settings: StudySettings) -> Subject:
    """Return a base without any adapter inside: training starts from plain weights."""
    return load(settings.base, tokenizer=base.tokenizer, **_loading(settings)) if base.is_adapter else base


def _without_circuit(settings: StudySettings) -> StudySettings:
    """Leave out strategies that need a circuit, where none was found: hours of other results should not be lost for it."""
    named = [name.strip() for name in settings.strategies.split(",")]
    kept = [name for name in named if name not in ("circuit", "random_circuit")]
    if len(kept) == len(named) or not settings.circuit or not kept:
        return settings
    log.warning("no circuit was found, so the strategies circuit and random_circuit are left out of the bake-off")
    return replace(settings, strategies=",".join(kept))


def _loading(settings: ModelSettings) -> dict[str, Any]:
    return {"dtype": settings.dtype, "device": settings.device, "unsafe": settings.unsafe}


def record_command(run: RunFolder, command: Sequence[str] | None) -> None:
    """Keep the command line that began a run."""
    if command is not None and "command" not in run.manifest:
        run.record("command", list(command))


def _record(run: RunFolder, models: dict[str, Subject], splits: Splits, settings: Any) -> None:
    run.record(
        "models",
        {
            name: {"source": subject.source, "family": subject.family, "fingerprint": subject.fingerprint}
            for name, subject in models.items()
        },
    )
    run.record("data", splits.record())
    seeds: dict[str, Any] = {"study": settings.seed}
    if hasattr(settings, "seeds"):
        seeds["training"] = list(range(settings.seed, settings.seed + settings.seeds))
    run.record("seeds", seeds)
