"""What a job is: its settings, what it loads, its stages, and the sections of the page that show what came out.

A technique reaches the command line, Python, a run folder and the page by one file in `mechscope/studies/jobs/` that defines `JOB`. Walk it as a datum: a flag
is a field of `Job.settings`; a stage's function reads it from `JobRun.settings` and calls the technique; the tables it returns are described by a section.
Everything a stage depends on is declared: settings (`hangs_on`), what is loaded (`inputs`), earlier stages (`after`). Its fingerprint follows from that, so
a stage is done again when one of these changes and never otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from mechscope.settings import Leaf, leaves
from mechscope.studies.inputs import first_model
from mechscope.studies.run import Input, JobRun, S, Tables

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.subject import Subject


@dataclass(frozen=True, eq=False, kw_only=True)
class Stage:
    """A body of work that is done once for what it depends on.

    Attributes:
        name: Its name in the manifest: letters, digits and `_.=+-`.
        work: Does it; the tables it returns are written by name, other outputs it writes through `JobRun.stage`.
        hangs_on: Settings that decide the result, by name; whole nested groups may be named.
        inputs: What is loaded and decides the result.
        after: Stages whose outputs it reads.
        when: Whether it is done at all, by the settings.
        each: Models by label, where it is done once for every one of them; `JobRun.label` says for which.
        alone: Whether of several ranks only the first works on it.
    """

    name: str
    work: Callable[[JobRun[Any]], Tables | None]
    hangs_on: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    inputs: tuple[Input[Any], ...] = ()
    after: tuple[Stage, ...] = ()
    when: Callable[[Any], bool] = field(default=lambda settings: True)
    each: Input[Any] | None = None
    alone: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Job(Generic[S]):
    """A command, a Python function and a kind of run folder.

    Attributes:
        name: What it is called: `patch`, `circuit-diff`.
        help: One sentence, for the command line and the function.
        panel: The group of commands it stands in: compare, intervene, circuits, read, tune, studies.
        example: A command line that works.
        settings: The class of its settings.
        arguments: Settings that the command line takes by position: the models.
        inputs: What is loaded before the first stage.
        stages: What is done, in order.
        sections: Sections of the page that show it, by id, in order.
        title: The page's title, by the models' names.
        check: Refuses settings that do not fit what was loaded, before the first forward pass.
        first: The model whose tokenizer and longest text count; by default the first of the run's models.
        group: Name of the command under which it stands, such as `study`; empty for the top.
        preset: Settings of a job that takes none.
        execute: What runs it in place of the stages, for a job that fills no run folder; called as `run_job`.
        show: Prints what `execute` returned.
        function: What it is called in Python where its name is that of a package (`mechscope.lens`).
    """

    name: str
    help: str
    panel: str
    example: str
    settings: type[S]
    arguments: tuple[str, ...] = ()
    inputs: tuple[Input[Any], ...] = ()
    stages: tuple[Stage, ...] = ()
    sections: tuple[str, ...] = ()
    title: Callable[[Mapping[str, str]], str] = field(default=lambda names: "A run of mechscope")
    check: Callable[[JobRun[S]], None] = field(default=lambda run: None)
    first: Callable[[JobRun[S]], Subject] = first_model
    group: str = ""
    preset: Callable[[], S] | None = None
    execute: Callable[..., Any] | None = None
    show: Callable[[Any], None] | None = None
    function: str = ""

    @property
    def options(self) -> tuple[Leaf, ...]:
        """The settings that a user can give: none of a job that has a preset."""
        return () if self.preset is not None else leaves(self.settings)

    @property
    def about(self) -> tuple[str, ...]:
        """The settings that say what a run is about, by position in Python: models, then documents, pairs or a text; those that must be given first."""
        known = {leaf.name: leaf for leaf in leaves(self.settings)}
        names = dict.fromkeys((*self.arguments, *(name for name in ("base", "tuned", "data", "pairs", "text") if name in known)))
        return tuple(sorted(names, key=lambda name: known[name].default is not MISSING))


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        path: The run folder.
        report: The page; None where none was written.
        tables: Every table by name, also as attributes: `result.heads`.
    """

    path: Path
    report: Path | None
    tables: Tables

    def __getattr__(self, name: str) -> pd.DataFrame:
        if name.startswith("_") or name not in self.tables:
            raise AttributeError(f"this run has no table {name!r}: it has {', '.join(sorted(self.tables))}")
        return self.tables[name]
