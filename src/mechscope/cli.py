"""The command line: flags in, one function call, a summary out; no logic of its own.

A command's flags are the fields of its settings class (`mechscope.studies.settings`), so name, type, default and help are written once. Heavy
imports happen inside the commands: `--help` answers at once. An expected error is one red line and exit code 2; anything else is a bug
and keeps its traceback.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mechscope import ranks
from mechscope.errors import MechscopeError
from mechscope.studies.pair_settings import AblateSettings, CircuitDiffSettings, CircuitSettings, PatchSettings
from mechscope.studies.reading_settings import HeadsSettings, LensSettings, WeightsSettings
from mechscope.studies.resolving import resolve
from mechscope.studies.settings import BakeOffSettings, DiffSettings, StudySettings, TuneSettings

app = typer.Typer(
    name="mechscope",
    help="A microscope for what fine-tuning does to GPT-like language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
studies = typer.Typer(help="Whole studies: from models and documents to a report.", no_args_is_help=True)
app.add_typer(studies, name="study")

Out = Annotated[
    Path, typer.Option("--out", help="Folder of the run; the same command on the same folder continues it.", rich_help_panel="Run")
]
Config = Annotated[
    Path | None, typer.Option("--config", help="YAML file with any of these settings; flags go before it.", rich_help_panel="Run")
]


# panels of `--help` that are not called as their settings class
_PANELS = {
    "Lora": "LoRA",
    "Model": "Models",
    "ReadModels": "Models",
    "Split": "Data",
    "Document": "Data",
    "CircuitStudy": "Circuit",
    "ReadingStudy": "Roles and lens",
}


def _with_flags(kind: type, *positional: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of a settings class as flags; it is called with `given`, those that were set.

    Args:
        kind: The settings class.
        positional: Fields that are arguments rather than flags.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(kind)
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
        flags = [_flag(item, hints[item.name], _panel(kind, item.name), positional) for item in dataclasses.fields(kind)]
        # positional arguments first, in the order asked for
        flags.sort(key=lambda flag: positional.index(flag.name) if flag.name in positional else len(positional))

        def wrapped(**values: Any) -> None:
            given = {flag.name: values.pop(flag.name) for flag in flags}
            command(**values, given=given)

        parameters = [*flags, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]
        annotations = {parameter.name: parameter.annotation for parameter in parameters}
        # how inspect lets a function declare its signature
        vars(wrapped).update(__signature__=inspect.Signature(parameters))
        wrapped.__annotations__, wrapped.__doc__, wrapped.__name__ = annotations, command.__doc__, command.__name__
        return wrapped

    return decorate


def _flag(item: dataclasses.Field[Any], hint: Any, panel: str, positional: tuple[str, ...]) -> inspect.Parameter:
    text = item.metadata["help"]
    kind = _plain_type(hint)
    if item.name in positional:
        argument = typer.Argument(help=text, show_default=False)
        # not required by the parser: a configuration file may hold it
        return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, argument])
    # the default is part of the text: the parser's own stays None, "not given", so that a configuration file is not overruled
    if item.default is dataclasses.MISSING:
        text += " (required)"
    elif item.default not in (None, False):
        text += f" (default: {str(item.default).encode('unicode_escape').decode()})"
    name = item.name.replace("_", "-")
    names = [f"--{name}/--no-{name}"] if kind is bool else [f"--{name}"]
    option = typer.Option(*names, help=text, show_default=False, rich_help_panel=panel)
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _plain_type(hint: Any) -> Any:
    """Return what the parser should read: a choice is text, checked with the other settings."""
    inner = [part for part in typing.get_args(hint) if part is not type(None)] or [hint]
    return inner[0] if inner[0] in (bool, int, float, str) else str


def _panel(kind: type, name: str) -> str:
    """Name the group of flags by the settings class that declares the field."""
    owner = next(base for base in reversed(kind.__mro__) if name in getattr(base, "__annotations__", {}))
    if owner is kind:
        return "Run"
    title = owner.__name__.removesuffix("Settings")
    return _PANELS.get(title, title)


def _job(group: typer.Typer, name: str, kind: type, *positional: str, run: str, show: str) -> None:
    """Add a command that fills a run folder.

    Args:
        group: Where it is added.
        name: What it is called.
        kind: Its settings.
        positional: Fields that are arguments rather than flags.
        run: `module:function` in `mechscope.studies`: takes settings, folder, command line and progress.
        show: Function of `mechscope.studies.console` that prints what came out.
    """

    def command(out: Out, given: dict[str, Any], config: Config = None) -> None:
        settings: Any = resolve(kind, config, **given)
        from mechscope.studies import console

        module, function = run.split(":")
        with console.progress() as report:
            found = getattr(importlib.import_module(f"mechscope.studies.{module}"), function)(
                settings, out, command=_command(), progress=report
            )
        if ranks.is_first():
            getattr(console, show)(found)

    # the settings say what the command does, behind its name
    command.__doc__ = (kind.__doc__ or "").partition(": ")[2]
    command.__name__ = name.replace("-", "_")
    group.command(name)(_with_flags(kind, *positional)(command))


_job(studies, "summarization", StudySettings, run="summarization:study", show="show_study")
_job(app, "diff", DiffSettings, "base", "tuned", run="summarization:diff_run", show="show_study")
_job(app, "bakeoff", BakeOffSettings, "base", run="summarization:bakeoff_run", show="show_study")
_job(app, "heads", HeadsSettings, "model", "tuned", run="heads:heads_run", show="show_roles")
_job(app, "lens", LensSettings, "model", "tuned", run="lens:lens_run", show="show_lens")
_job(app, "weights", WeightsSettings, "model", "tuned", run="weights:weights_run", show="show_weights")
_job(app, "patch", PatchSettings, "model", run="interventions:patch_run", show="show_effects")
_job(app, "ablate", AblateSettings, "model", run="interventions:ablate_run", show="show_effects")
_job(app, "circuit", CircuitSettings, "model", run="circuits:circuit_run", show="show_circuits")
_job(app, "circuit-diff", CircuitDiffSettings, "base", "tuned", run="circuits:circuit_diff_run", show="show_circuits")


@app.command()
@_with_flags(TuneSettings, "base")
def tune(
    out: Annotated[Path, typer.Option("--out", help="Folder for the tuned model or adapter.", rich_help_panel="Run")],
    given: dict[str, Any],
    config: Config = None,
    full: Annotated[bool, typer.Option("--full", help="Full fine-tuning.", rich_help_panel="Models")] = False,
    lora: Annotated[bool, typer.Option("--lora", help="LoRA.", rich_help_panel="Models")] = False,
) -> None:
    """Fine-tune a model to summarize: fully, or by LoRA at chosen layers and heads."""
    if full and lora:
        raise MechscopeError("--full and --lora exclude each other: give one")
    if full or lora:
        given["method"] = "lora" if lora else "full"
    elif given.get("targets") and not given.get("method"):
        given["method"] = "lora"
    settings = resolve(TuneSettings, config, **given)
    from mechscope.studies.console import progress, show_tuned
    from mechscope.studies.tuning import tune_run

    with progress() as report:
        tuned = tune_run(settings, out, progress=report)
    if ranks.is_first():
        show_tuned(tuned)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write a run's report again, from its tables."""
    from mechscope.studies.console import show_report
    from mechscope.studies.summarization import report_run

    show_report(report_run(run))


@app.command()
def verify(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Hash every file of a run again and compare with its manifest; exit code 1 if one was changed or is missing."""
    from mechscope.store.run import verify as verify_run
    from mechscope.studies.console import show_verified

    raise typer.Exit(0 if show_verified(run, verify_run(run)) else 1)


@app.command("inspect")
def inspect_model(
    model: Annotated[str, typer.Argument(help="Hub id, directory, or adapter.")],
    dtype: Annotated[str, typer.Option(help="Type of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run: auto, cpu, cuda, cuda:N, spread.")] = "auto",
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Also accept pickled checkpoints.")] = False,
) -> None:
    """Show a model's parts and what the load-time checks say of them; exit code 1 if one fails."""
    from mechscope.instrument import check_subject, load
    from mechscope.studies.console import quiet_libraries, show_model

    quiet_libraries()
    subject = load(model, dtype=dtype, device=device, unsafe=unsafe, check=False)
    raise typer.Exit(0 if show_model(subject, check_subject(subject)) else 1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs/demo"),
) -> None:
    """Run the whole study on the embedded default: a small model and generated news articles."""
    from mechscope.studies.console import progress, show_study
    from mechscope.studies.demo import demo_settings
    from mechscope.studies.summarization import study

    with progress() as report:
        found = study(demo_settings(), out, command=_command(), progress=report)
    if ranks.is_first():
        show_study(found)


def _command() -> list[str]:
    return ["mechscope", *sys.argv[1:]]


def main() -> None:
    """Run the command line: exit code 0 when done, 2 for an error the user can mend, 130 when interrupted."""
    # before a command imports it: a fork of a process with threads is what the warning is about, and there is none here
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(prog_name="mechscope")
    except MechscopeError as error:
        if isinstance(error, ranks.ElsewhereError) or ranks.is_echo():
            raise SystemExit(2) from None
        typer.secho(f"error{ranks.label()}: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        typer.secho("interrupted: the same command continues where it was", fg=typer.colors.YELLOW, err=True)
        raise SystemExit(130) from None
