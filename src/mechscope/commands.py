"""Commands about runs, models and settings that exist already; no logic of their own, and nothing heavy imported before one is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

Run = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]


def add(app: typer.Typer, *, panel: str) -> None:
    """Add these commands, and `--version`, to the command line."""
    for name, command in (("report", report), ("verify", verify), ("table", table), ("inspect", inspect_model), ("config", config)):
        app.command(name, rich_help_panel=panel)(command)
    app.callback()(_root)


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=lambda given: _version(given))
    ] = False,
) -> None:
    """A microscope for what fine-tuning does to GPT-like language models."""


def _version(given: bool) -> None:
    if given:
        from importlib.metadata import version

        typer.echo(f"mechscope {version('mechscope')}")
        raise typer.Exit()


def report(run: Run) -> None:
    """Write a run's report again, from its tables; those that were edited are named there, damaged ones are refused."""
    from mechscope.store.ledger import read_manifest

    read_manifest(run)  # what is no run is refused before anything heavy is imported
    from mechscope.studies.console import progress, show_edited, show_report
    from mechscope.studies.runner import draw_again

    with progress():  # the library's warnings as lines of ours
        page, edited = draw_again(run)
    show_edited(edited)
    show_report(page)


def verify(run: Run) -> None:
    """Hash every file of a run again and compare with its manifest; exit code 1 if one was changed or is missing."""
    from mechscope.store.ledger import read_manifest

    read_manifest(run)
    from mechscope.store.run import verify as verify_run
    from mechscope.studies.console import show_verified

    raise typer.Exit(0 if show_verified(run, verify_run(run)) else 1)


def table(
    run: Run,
    name: Annotated[str | None, typer.Argument(help="A table of the run; without, their names are listed.", show_default=False)] = None,
    form: Annotated[Literal["csv", "json"], typer.Option("--as", help="CSV, or JSON with one record per row.")] = "csv",
) -> None:
    """Print a table of a run, such as: mechscope table runs/diff heads > heads.csv."""
    from mechscope.errors import RunError
    from mechscope.store.ledger import read_manifest

    read_manifest(run)
    from mechscope.store.run import RunFolder
    from mechscope.studies.places import table_names

    folder = RunFolder.read(run)
    if name is None:
        typer.echo("\n".join(table_names(folder)))
        return
    if name not in (known := table_names(folder)):
        raise RunError(f"{run} has no table {name!r}: it has {', '.join(known)}")
    rows = folder.table(name)
    sys.stdout.write(rows.to_csv(index=False) if form == "csv" else rows.to_json(orient="records", indent=1, force_ascii=False) + "\n")


def inspect_model(
    model: Annotated[str, typer.Argument(help="Hub id, directory, or adapter.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="Type of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run: auto, cpu, cuda, cuda:N, spread.")] = "auto",
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Also accept pickled checkpoints.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Hub id or directory of a tokenizer, where the model has none.")] = None,
) -> None:
    """Show a model's parts and what the load-time checks say of them; exit code 1 if one fails."""
    from mechscope.studies.places import check_model

    check_model("MODEL", model)
    from mechscope.instrument import check_subject, load
    from mechscope.studies.console import quiet_libraries, show_model
    from mechscope.studies.flags import flags_in_errors

    quiet_libraries()
    with flags_in_errors(("tokenizer", "dtype", "device", "unsafe")):
        subject = load(model, tokenizer=tokenizer, dtype=dtype, device=device, unsafe=unsafe, check=False)
    raise typer.Exit(0 if show_model(subject, check_subject(subject)) else 1)


def config(
    job: Annotated[str, typer.Argument(help="A command, such as diff or summarization.", show_default=False)],
) -> None:
    """Print a YAML file with every setting of a command, to be changed and given back by --config."""
    from mechscope.studies.templates import config_template

    typer.echo(config_template(job), nl=False)
