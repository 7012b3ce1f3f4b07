"""The one runner: it opens the folder, records the command, loads what a job names, does its stages and draws the page."""

from __future__ import annotations

import dataclasses
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mechscope.errors import RunError, SettingsError
from mechscope.instrument import Progress
from mechscope.report.theme import model_name
from mechscope.settings import Settings, leaves
from mechscope.store.run import RunFolder
from mechscope.studies.job import Job, Result, Stage
from mechscope.studies.noted import noting
from mechscope.studies.places import table_names
from mechscope.studies.run import JobRun

log = logging.getLogger(__name__)

S = TypeVar("S", bound=Settings)
REPORT, CAVEATS = "report", "caveats"


def run_job(
    job: Job[S],
    settings: S,
    out: str | Path | None,
    *,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
    given: Mapping[str, Any] | None = None,
    page: bool = True,
) -> Result:
    """Run a job into a folder, or continue it there.

    Args:
        job: The job.
        settings: Its settings.
        out: The run folder; None for a run that leaves nothing behind but its tables.
        command: The command line that begins or continues it, for the report.
        progress: Called with a label, what is done and how much there is.
        given: Models and documents in memory, by the name of the setting that would name their source.
        page: Whether a page is drawn; a run without a folder has none.

    Raises:
        MechscopeError: Models, data or settings cannot be used, or the folder belongs to another run.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="mechscope-") as folder:
            return dataclasses.replace(_run(job, settings, folder, command, progress, given, page=False), path=Path(folder))
    return _run(job, settings, out, command, progress, given, page=page)


def _run(
    job: Job[S],
    settings: S,
    out: str | Path,
    command: Sequence[str] | None,
    progress: Progress | None,
    given: Mapping[str, Any] | None,
    *,
    page: bool,
) -> Result:
    with RunFolder.open(out, dataclasses.asdict(settings), kind=job.name, identity=job.about) as folder:
        if command is not None:
            folder.record_command(command)
        run = JobRun(settings, folder, first=job.first, progress=progress, given=given)
        with noting() as noted:
            for wanted in job.inputs:
                run[wanted]
            job.check(run)
        if noted or "caveats" in folder.manifest:
            folder.record("caveats", noted)
        folder.record("seeds", _seeds(settings))
        done = {REPORT, CAVEATS}
        for stage in job.stages:
            if stage.when(settings):
                done.update(_do(run, stage))
        # what an earlier command on the folder did beside this one may be of other settings: it stays there and is not shown
        left_out = [name for stage in folder.manifest["stages"] if stage not in done for name in _tables_of(folder, stage)]
        folder.record("page", {"title": job.title(_names(run)), "sections": list(job.sections), "left_out": sorted(left_out)})
        _weigh(folder)
        report = draw(folder) if page else None
        return Result(folder.path, report, _tables(folder), folder.settings, dict(folder.manifest))


def _do(run: JobRun[Any], stage: Stage) -> list[str]:
    """Do a stage where it is not done, and return its names in the manifest."""
    labels = list(run[stage.each]) if stage.each is not None else [""]
    if len({plain(label).lower() for label in labels}) < len(labels):
        raise SettingsError(f"the labels {', '.join(labels)} of the models would share a file: name them differently")
    for label in labels:
        run.label = label
        with run.folder.stage(_name(stage, label), _depends(run, stage), alone=stage.alone) as stored:
            if not stored.done:
                run._stage = stored
                with noting() as stored.caveats:
                    for name, table in (stage.work(run) or {}).items():
                        stored.write_table(name, table)
    run.label, run._stage = "", None
    return [_name(stage, label) for label in labels]


def _name(stage: Stage, label: str) -> str:
    return f"{stage.name}_{plain(label)}" if label else stage.name


def _depends(run: JobRun[Any], stage: Stage) -> dict[str, Any]:
    """Return everything that decides a stage's result."""
    names = stage.hangs_on(run.settings) if callable(stage.hangs_on) else stage.hangs_on
    inputs = {wanted.name: wanted.fingerprint(run[wanted]) for wanted in stage.inputs}
    if stage.each is not None:
        inputs[stage.each.name] = stage.each.fingerprint({run.label: run[stage.each][run.label]})
    return {
        "settings": run.settings.part(names),
        **inputs,
        "after": {name: outputs for one in stage.after for name, outputs in _outputs(run, one)},
    }


def _outputs(run: JobRun[Any], stage: Stage) -> Iterator[tuple[str, Any]]:
    """Yield the outputs of a stage by its names in the manifest; nothing for one that was not done."""
    for name in [_name(stage, label) for label in run[stage.each]] if stage.each is not None else [stage.name]:
        if (record := run.folder.manifest["stages"].get(name)) is not None and stage.when(run.settings):
            yield name, record["outputs"]


def _names(run: JobRun[Any]) -> dict[str, str]:
    return {label: model_name(model["source"]) for label, model in run.folder.manifest.get("models", {}).items()}


def _seeds(settings: Settings) -> dict[str, Any]:
    known = {leaf.name: leaf.read(settings) for leaf in leaves(type(settings)) if leaf.name in ("seed", "seeds")}
    seed = known.get("seed", 0)
    return {"study": seed, **({"training": list(range(seed, seed + known["seeds"]))} if "seeds" in known else {})}


def _tables(folder: RunFolder) -> dict[str, Any]:
    """Read the tables of a run but for those that the page leaves out."""
    names = {name for stage in folder.manifest["stages"] for name in _tables_of(folder, stage)}
    return {name: folder.table(name) for name in sorted(names - set(folder.manifest["page"]["left_out"]))}


def _tables_of(folder: RunFolder, stage: str) -> list[str]:
    return [Path(name).stem for name in folder.manifest["stages"][stage]["outputs"] if name.startswith("tables/")]


def _weigh(folder: RunFolder) -> None:
    """Write the table `caveats` of an open run: what weakens its statements, by its tables and by what was noted while they were made."""
    from mechscope.report.contents import Contents
    from mechscope.report.summary import Summary

    stages = {name: record["outputs"] for name, record in folder.manifest["stages"].items() if name not in (REPORT, CAVEATS)}
    if not any(_tables_of(folder, name) for name in stages):
        return
    about = {"noted": folder.manifest.get("caveats"), "page": folder.manifest.get("page"), "code": folder.ledger.code}
    with folder.stage(CAVEATS, {**stages, **about}, alone=True) as stage:
        if not stage.done:
            stage.write_table("caveats", Summary.of(Contents.read(folder.path)).table())


def draw(folder: RunFolder) -> Path:
    """Write `report.html` and the figures of an open run, and return the page's path."""
    from mechscope.report.page import FURTHER, render

    inputs = {name: record["outputs"] for name, record in folder.manifest["stages"].items() if name != REPORT}
    # another version of mechscope may draw otherwise
    about = {"page": folder.manifest.get("page"), "commands": folder.manifest.get("commands"), "code": folder.ledger.code}
    with folder.stage(REPORT, {**inputs, **about}, alone=True) as stage:
        if not stage.done:
            page = render(folder.path)
            stage.add(page)
            stage.add(folder.path / "figures")
            if (folder.path / FURTHER).is_dir():
                stage.add(folder.path / FURTHER)
    return folder.path / "report.html"


def draw_again(path: str | Path) -> tuple[Path, list[str]]:
    """Write a run's report again, from its tables; those that are not as the run wrote them are named on the page.

    Returns:
        The page's path, and the names of the tables that were edited.

    Raises:
        RunError: It is not a run folder, holds no tables yet, or tables are missing or damaged; the message names them all.
    """
    from mechscope.report.contents import Contents

    held = RunFolder.read(path)
    names = table_names(held)
    if not names:
        raise RunError(f"{path} holds no table to report on: run the job again with --out {path}")
    if spoilt := [f"{name} ({problem})" for name in names if name != CAVEATS and (problem := _problem(held, name))]:
        raise RunError(f"{path} has tables that cannot be read: {', '.join(spoilt)}; the same command with --out {path} makes them again")
    with RunFolder.open(path, held.settings, kind=held.kind) as folder:
        for stage in (REPORT, CAVEATS):
            folder.manifest["stages"].pop(stage, None)
        _weigh(folder)
        return draw(folder), Contents.read(path).edited


def _problem(run: RunFolder, table: str) -> str:
    """Return why a table of a run cannot be read; empty where it can."""
    if not (run.path / "tables" / f"{table}.parquet").is_file():
        return "missing"
    try:
        run.table(table)
    except RunError:
        return "damaged"
    return ""


def plain(label: str) -> str:
    """Return a label as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", label)
