"""Circuits into a run folder: `mechscope circuit` and `mechscope circuit-diff`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mechscope.errors import SettingsError
from mechscope.instrument import load, load_pair
from mechscope.progress import Progress
from mechscope.store.run import RunFolder
from mechscope.studies import stages
from mechscope.studies.circuit_checks import check_discovery
from mechscope.studies.circuit_judging import Asked, plain
from mechscope.studies.circuit_stages import change_stage, circuits_stage
from mechscope.studies.interventions import load_pairs
from mechscope.studies.pair_settings import CircuitDiffSettings, CircuitSettings, PairsSettings
from mechscope.studies.settings import VOLATILE
from mechscope.studies.summarization import Study, record_command
from mechscope.subject import Subject


def circuit_run(
    settings: CircuitSettings, out: str | Path, *, command: Sequence[str] | None = None, progress: Progress | None = None
) -> Study:
    """Find and judge a model's circuit: scores of all edges, faithfulness curve, criteria, cards, picture, and the circuit's file.

    Args:
        settings: Which model, pairs and method.
        out: The run folder.
        command: The command line that asked for it, for the report.
        progress: Called with a label, what is done and how much there is.

    Raises:
        MechscopeError: Model, pairs or settings cannot be used, or the folder belongs to another run.
    """
    check_discovery(settings, metric=settings.metric)
    with RunFolder.open(out, asdict(settings), kind="circuit", volatile=VOLATILE) as run:
        record_command(run, command)
        subject = load(settings.model, **_loading(settings))
        pairs = load_pairs(settings, subject)
        asked = Asked.of(pairs, settings, metric=settings.metric, tokens_per_batch=settings.tokens_per_batch, seed=settings.seed)
        _record(run, {"model": subject}, asked, settings)
        circuits_stage(run, {"model": subject}, asked, progress=progress)
        return Study.of(run, stages.report_stage(run))


def circuit_diff_run(
    settings: CircuitDiffSettings, out: str | Path, *, command: Sequence[str] | None = None, progress: Progress | None = None
) -> Study:
    """Find the circuits of a base and a tuned model on the same pairs, and compare them; arguments and errors as for `circuit_run`."""
    check_discovery(settings, metric=settings.metric)
    sources = [part.strip() for part in (settings.checkpoints or "").split(",") if part.strip()]
    if len(set(sources)) < len(sources):
        raise SettingsError(f"setting 'checkpoints' names a model twice: {settings.checkpoints}")
    with RunFolder.open(out, asdict(settings), kind="circuit-diff", volatile=VOLATILE) as run:
        record_command(run, command)
        compared = load_pair(settings.base, settings.tuned, resize=settings.resize, **_loading(settings))
        names = _labels(sources)
        way = {name: load_pair(settings.base, source, resize=settings.resize, **_loading(settings)).tuned for name, source in names.items()}
        pairs = load_pairs(settings, compared.base)
        asked = Asked.of(pairs, settings, metric=settings.metric, tokens_per_batch=settings.tokens_per_batch, seed=settings.seed)
        subjects: dict[str, Subject] = {"base": compared.base, **way, "tuned": compared.tuned}
        _record(run, subjects, asked, settings)
        found = circuits_stage(run, subjects, asked, progress=progress)
        change_stage(run, compared, found, asked, on_the_way=list(way), progress=progress)
        return Study.of(run, stages.report_stage(run))


def _labels(sources: Sequence[str]) -> dict[str, str]:
    """Name checkpoints by the last part of their source, by their whole source where that is taken, and numbered where that is too.

    Labels name files, so they differ from each other and from `base` and `tuned` in these too.
    """
    last = [Path(source).name for source in sources]
    found: dict[str, str] = {}
    taken = {"base", "tuned"}
    for name, source in zip(last, sources, strict=True):
        wanted = [*([name] if last.count(name) == 1 else []), source, *(f"{source} ({number})" for number in range(2, len(sources) + 4))]
        label = next(one for one in wanted if plain(one).lower() not in taken)
        taken.add(plain(label).lower())
        found[label] = source
    return found


def _loading(settings: PairsSettings) -> dict[str, Any]:
    return {"dtype": settings.dtype, "device": settings.device, "unsafe": settings.unsafe}


def _record(run: RunFolder, subjects: dict[str, Subject], asked: Asked, settings: PairsSettings) -> None:
    run.record(
        "models",
        {
            name: {"source": subject.source, "family": subject.family, "fingerprint": subject.fingerprint}
            for name, subject in subjects.items()
        },
    )
    found, judged = asked.found_on, asked.judged_on
    run.record(
        "data",
        {
            "source": found.source,
            "pairs": len(found) + (len(judged) if judged is not found else 0),
            "found_on": len(found),
            "judged_on": len(judged),
            "problems": found.problems,
            "hash": {"found_on": found.hash, "judged_on": judged.hash},
        },
    )
    run.record("seeds", {"study": settings.seed})
