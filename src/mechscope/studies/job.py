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

from mechscope.errors import SettingsError
from mechscope.settings import Leaf, leaves, read_settings, resolve
from mechscope.store.ledger import SETTINGS
from mechscope.store.paths import absent
from mechscope.studies.inputs import first_model
from mechscope.studies.run import Input, JobRun, S, Tables

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.report.contents import Contents
    from mechscope.subject import Subject


# panels of the help about how work is done rather than what is done, which stand last
_LAST = {"Models": 1, "Run": 2}


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
        group: Name of the command under which it stands, such as `study`; empty for the top. A job `features-train` of the group `features` is the
            command `features train`.
        preset: Settings of a job that takes none.
        execute: What runs it in place of the stages, for a job that fills no run folder; called as `run_job`.
        show: Prints what `execute` returned.
        like: Setting that names the folder of a finished run of the same job, whose settings stand where none are given.
        passes: Setting that takes, as one text, the flags of the command line that the job does not have.
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
    like: str = ""
    passes: str = ""
    function: str = ""

    @property
    def command(self) -> str:
        """What it is called on the command line, behind `mechscope`."""
        return " ".join(filter(None, (self.group, self.name.removeprefix(f"{self.group}-"))))

    @property
    def options(self) -> tuple[Leaf, ...]:
        """The settings that a user can give: none of a job that has a preset."""
        return () if self.preset is not None else leaves(self.settings)

    def resolve(self, config: str | Path | None = None, **given: Any) -> S:
        """Build the settings of a run from a configuration file and what was given on top of it, as `mechscope.settings.resolve` does.

        Raises:
            SettingsError: As there; or the run that others are to be taken from is not there.
        """
        if self.preset is not None:
            return self.preset()
        values = read_settings(config, self.settings) if config is not None else {}
        like, beneath = given.get(self.like) or values.get(self.like), {}
        if self.like and like is not None:
            if not Path(like).is_dir():
                raise SettingsError(f"setting {self.like!r} is {str(like)!r}: {absent(str(like)) or 'no such folder'}")
            file = Path(like) / SETTINGS
            # of a training from elsewhere nothing is known; where another was run says nothing of where this one can be
            beneath = (
                {name: value for name, value in read_settings(file, self.settings).items() if name != "device"} if file.is_file() else {}
            )
        return resolve(self.settings, config, beneath=beneath, **given)

    @property
    def about(self) -> tuple[str, ...]:
        """The settings that say what a run is about, by position in Python: models, then documents, pairs or a text; those that must be given first."""
        known = {leaf.name: leaf for leaf in leaves(self.settings)}
        names = dict.fromkeys((*self.arguments, *(name for name in ("base", "tuned", "data", "pairs", "text") if name in known)))
        return tuple(sorted(names, key=lambda name: known[name].default is not MISSING))

    def panel_of(self, leaf: Leaf) -> str:
        """Return the heading under which a setting stands in the help and in a configuration file."""
        return str(getattr(leaf.owner, "panel", self.name.capitalize()))

    @property
    def in_order(self) -> tuple[tuple[Leaf, ...], tuple[Leaf, ...]]:
        """The settings in the order of use: what the run is about and what it reads; then what tunes it, the job's own first, the machine last."""
        about = {name: place for place, name in enumerate(self.about)}
        reads = {self.panel_of(leaf) for leaf in self.options if leaf.name in about and leaf.name not in self.arguments}
        panels = list(dict.fromkeys(self.panel_of(leaf) for leaf in self.options))
        own = {self.panel_of(leaf) for leaf in self.options if leaf.owner is self.settings} | {getattr(self.settings, "panel", "")}

        def panel(leaf: Leaf) -> tuple[bool, bool, int, int]:
            if leaf.name in self.arguments:  # what is given by position stands in its order, whatever panel it is in
                return False, False, 0, self.arguments.index(leaf.name)
            name = self.panel_of(leaf)
            return True, name not in reads, (name not in own) + 2 * _LAST.get(name, 0), panels.index(name)

        def within(leaf: Leaf) -> tuple[int, int]:
            # of texts how many and which part come before how they are written; a job's own settings keep their order
            depth = -len(leaf.owner.__mro__) if self.panel_of(leaf) in reads else 0
            return about.get(leaf.name, len(about)), depth

        ordered = sorted(self.options, key=lambda leaf: (*panel(leaf), *within(leaf)))
        first = tuple(leaf for leaf in ordered if leaf.name in self.arguments or self.panel_of(leaf) in reads)
        return first, tuple(leaf for leaf in ordered if leaf not in first)


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run.

    Attributes:
        path: The run folder.
        report: The page; None where none was written.
        tables: Every table by name, also as attributes: `result.heads`.
        settings: The resolved settings.
        manifest: What the result depends on: models, data, versions, seeds.

    In a notebook it shows the findings of the page and its small tables; `plot` draws the page's figures.
    """

    path: Path
    report: Path | None
    tables: Tables
    settings: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> pd.DataFrame:
        if name.startswith("_") or name not in self.tables:
            raise AttributeError(f"this run has no table {name!r}: it has {', '.join(sorted(self.tables))}")
        return self.tables[name]

    def __repr__(self) -> str:
        from mechscope.report.notebook import as_text

        where = f"\nrun: {self.path}" if self.report is not None else ""
        return as_text(self._contents()) + where

    def _repr_html_(self) -> str:
        from mechscope.report.notebook import as_html

        return as_html(self._contents())

    @property
    def plots(self) -> dict[str, str]:
        """The figures that `plot` draws: their names and what they show."""
        from mechscope.report.notebook import figures

        return {name: figure.title for name, figure in figures(self.tables).items()}

    def plot(self, name: str | None = None) -> Any:
        """Return a figure of the page as an altair chart.

        Args:
            name: Which one of `plots`; may be left out where there is one.

        Raises:
            RunError: There is no such figure, or there are several and none is named; the message lists them.
        """
        from mechscope.report.notebook import plot

        return plot(self.tables, name)

    def _contents(self) -> Contents:
        from mechscope.report.contents import Contents
        from mechscope.report.notebook import shown

        return Contents(self.path, shown(self.tables), self.settings, self.manifest)
