"""What a person sees in the terminal: progress while a study runs, a short summary when it ends."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from mechscope import ranks
from mechscope.instrument.execution import Progress as Report

if TYPE_CHECKING:
    from mechscope.instrument import Check
    from mechscope.report.contents import Contents
    from mechscope.report.marks.tables import Cell, Shown, View
    from mechscope.report.section import Section
    from mechscope.report.statements import Finding
    from mechscope.studies.job import Job
    from mechscope.subject import Subject

# rows of a table that the terminal prints, and characters of a column before it is folded
_ROWS, _WIDEST = 10, 32
# seconds between two lines about the same work where there is no terminal
_EVERY = 30.0

out = Console()
err = Console(stderr=True)


def quiet_libraries() -> None:
    """Silence the progress bars and notices of the libraries underneath: they would break ours."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.disable_progress_bar()
    # deprecations inside other libraries are nothing the user can mend
    warnings.filterwarnings("ignore", category=FutureWarning)


class _Warnings(logging.Handler):
    """Shows mechscope's own warnings as yellow lines and, at its level, the run's log; the rest goes to the log only.

    Ranks warn of the same things: of those after the first only what concerns them alone is shown.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            err.print(f"[dim]{escape(record.getMessage())}[/dim]", highlight=False)
        elif ranks.is_first() or getattr(record, "own", False):
            err.print(f"[yellow]warning{ranks.label()}:[/yellow] {escape(record.getMessage())}", highlight=False)


@contextlib.contextmanager
def progress(*, quiet: bool = False, verbose: bool = False) -> Iterator[Report]:
    """Show progress: bars on a terminal, elsewhere a line when something begins and one now and then.

    Args:
        quiet: Show warnings only.
        verbose: Show the run's log too.
    """
    quiet_libraries()
    ours, handler = logging.getLogger("mechscope"), _Warnings(logging.INFO if verbose else logging.WARNING)
    # libraries put a handler on the root logger, which would print every line that is meant for the run's log
    before, ours.propagate = ours.propagate, False
    ours.addHandler(handler)
    try:
        with _reporting(quiet) as report:
            yield report
    finally:
        ours.removeHandler(handler)
        ours.propagate = before


@contextlib.contextmanager
def _reporting(quiet: bool) -> Iterator[Report]:
    if quiet or not ranks.is_first():
        yield lambda label, done, total: None
        return
    if not err.is_terminal:
        said: dict[str, float] = {}

        def line(label: str, done: int, total: int) -> None:
            now = time.monotonic()
            if label not in said:
                err.print(f"{label} …", highlight=False)
            elif now - said[label] > _EVERY:
                err.print(f"{label} … {done} of {total}", highlight=False)
            else:
                return
            said[label] = now

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, TaskID] = {}

        def bar(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            elif done < bars.tasks[tasks[label]].completed:  # the same kind of work again, for the next arm
                bars.reset(tasks[label], total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield bar


def run(job: Job[Any], settings: Any, out: Path, *, command: list[str], progress: Report) -> Any:
    """Run a job as the command line asks for it."""
    from mechscope.studies.runner import run_job

    return (job.execute or run_job)(job, settings, out, command=command, progress=progress)


def show(job: Job[Any], result: Any, *, quiet: bool = False) -> None:
    """Print what a job found (not where `quiet`), and where its run and report are."""
    if job.show is not None:
        job.show(result)
        return
    if not quiet:
        _show_contents(result)
    out.print(f"run     {escape(str(result.path))}", highlight=False, soft_wrap=True)
    show_report(result.report)


def _show_contents(result: Any) -> None:
    from mechscope.report.contents import Contents
    from mechscope.report.summary import Summary

    contents = Contents.read(result.path)
    filled = [section for section in contents.sections if section.present(contents.tables) and section.id != "caveats"]
    summary = Summary.of(contents)
    weakened = dict[str, None]()
    _say(summary.verdict, weakened)
    for group in summary.further:
        out.print(f"[bold]{escape(group.heading)}[/bold]", highlight=False)
        _say(group.findings, weakened, "• ")
    if summary.verdict and not summary.groups:  # two models that are one: there is nothing to tabulate
        return
    tables = [(shown, section) for section in filled for shown in section.views(contents.tables) if shown.terminal]
    # numbers before sentences
    for shown, section in sorted(tables, key=lambda each: (each[0].brief or each[0].view).prose):
        _show_table(shown, section, contents)
    if rest := [text for text in summary.texts if text not in weakened]:
        out.print("[bold]Caveats[/bold]", highlight=False)
        for text in rest:
            out.print(f"• {escape(text)}", highlight=False)


def _say(findings: Sequence[Finding], weakened: dict[str, None], before: str = "") -> None:
    """Print findings, each with what weakens it where that was not said yet, and remember what was."""
    for finding in findings:
        out.print(f"{before}{escape(finding.sentence)}", highlight=False)
        for caveat in finding.caveats:
            if caveat.text not in weakened:
                out.print(f"  [dim]{escape(caveat.text)}[/dim]", highlight=False)
            weakened[caveat.text] = None


def _show_table(shown: Shown, section: Section, contents: Contents) -> None:
    """Print a table of the page, and where the rest of it is; without a heading it is called as its section."""
    view, heading = shown.brief or shown.view, shown.heading or section.heading
    left = len(view.rows) - _ROWS
    if view.prose:
        out.print(f"[bold]{escape(heading)}[/bold]", highlight=False)
        for row in view.rows[:_ROWS]:
            out.print(_entry(view, row))
    else:
        out.print(_table(view, heading))
    if left > 0:
        own = [name for name in section.tables if name in contents.tables]
        name = shown.table or (own[0] if len(own) == 1 else "")
        where = f"all in table {name}: mechscope table {shlex.quote(str(contents.path))} {name}" if name else "all on the page"
        out.print(f"… {left} more; {escape(where)}", highlight=False, soft_wrap=True)


def _entry(view: View, row: tuple[Cell, ...]) -> Table:
    """Return a row of sentences: what it begins with, a verdict, on the left, and the sentences one under another."""
    entry = Table.grid(padding=(0, 1))
    entry.add_column(width=12)
    entry.add_column(overflow="fold")
    first, *others = zip(view.columns, row, strict=True)
    lines = [
        escape(cell.text) if place == 0 else f"[dim]{escape(heading)}:[/dim] {escape(cell.text)}"
        for place, (heading, cell) in enumerate(others)
    ]
    entry.add_row(f"[bold]{escape(first[1].text)}[/bold]", "\n".join(lines))
    return entry


def _table(view: View, heading: str) -> Table:
    """Return a table of the page as one of the terminal: its first rows, and as many of its columns as fit."""
    headings = view.headings
    rows = [[f"{cell.text} {cell.note}".strip() for cell in row] for row in view.rows[:_ROWS]]
    widths = [min(_WIDEST, max(map(len, [name, *(row[place] for row in rows)]))) + 3 for place, (name, _) in enumerate(headings)]
    # columns of numbers that were folded could not be read
    fitting = max(2, sum(total < out.width for total in accumulate(widths)))
    left = len(headings) - fitting
    table = Table(title=escape(heading), caption=f"{left} more column{'s' * (left > 1)} on the page" if left else None)
    for name, is_number in headings[:fitting]:
        table.add_column(escape(name), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row[:fitting]))
    return table


def show_report(page: Path) -> None:
    """Print where the report is."""
    out.print(f"report  [bold]{escape(str(page))}[/bold]", highlight=False, soft_wrap=True)


def show_edited(tables: list[str]) -> None:
    """Print which tables are not as the run wrote them."""
    if tables:
        these = f"{len(tables)} tables are" if len(tables) > 1 else "1 table is"
        out.print(
            f"[yellow]edited[/yellow]  {these} not what the run wrote, as the page says: {escape(', '.join(tables))}", highlight=False
        )


def show_verified(path: Path, files: pd.DataFrame) -> bool:
    """Print what verification found; return whether every recorded file is as it was."""
    wrong = files[files["status"].isin(["changed", "missing", "unreadable"])]
    for row in wrong.to_dict("records"):
        named = ": ".join(filter(None, (row["file"], row["problem"])))
        out.print(f"[red]{row['status']}[/red]  {escape(named)}", highlight=False, soft_wrap=True)
    unrecorded = int((files["status"] == "unrecorded").sum())
    note = f", {unrecorded} not recorded by any finished stage" if unrecorded else ""
    verdict = "[red]not as recorded[/red]" if len(wrong) else "[green]as recorded[/green]"
    out.print(f"{escape(str(path))}: {int((files['status'] == 'ok').sum())} files ok, {len(wrong)} wrong{note}: {verdict}", highlight=False)
    return not len(wrong)


def show_model(subject: Subject, checks: tuple[Check, ...]) -> bool:
    """Print a model's parts and the load-time checks; return whether all passed."""
    anatomy = subject.anatomy
    first = anatomy.blocks[anatomy.attending[0]]
    facts = {
        "family": subject.family,
        "layers": anatomy.n_layers,
        "heads": f"{anatomy.n_heads} query, {anatomy.n_kv_heads} key/value, width {anatomy.d_head}",
        "residual stream": anatomy.d_model,
        "vocabulary": f"{anatomy.vocab_size:,}",
        "positions": f"{anatomy.max_positions:,}" if anatomy.max_positions < 2**31 else "unbounded",
        "parameters": f"{sum(p.numel() for p in subject.plain.parameters()):,}",
        "type, device": f"{subject.dtype}, {subject.device}".removeprefix("torch."),
        "adapter": "yes" if subject.is_adapter else "no",
        **({"do not attend": f"layers {', '.join(map(str, anatomy.mixing))}"} if anatomy.mixing else {}),
        "first block" if not anatomy.mixing else "first block that attends": first.name,
        "query, key, value": ", ".join(dict.fromkeys(part.name for part in (first.query, first.key, first.value))),
        "output projection": first.output.name,
        "MLP": ", ".join(first.mlp_linears) if first.experts is None else f"{first.experts.number} experts ({first.experts.name})",
    }
    table = Table(title=escape(subject.source), show_header=False)
    for name, value in facts.items():
        table.add_row(name, escape(str(value)))
    out.print(table)
    for check in checks:
        mark = "[green]ok[/green]    " if check.passed else "[red]FAILED[/red]"
        note = "" if check.passed else f"; needed for {check.needed_for}"
        out.print(f"{mark} {check.name} (off by {check.error:.1e}, allowed {check.tolerance:.1e}){note}", highlight=False)
    return all(check.passed for check in checks)
