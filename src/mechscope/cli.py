"""The command line: flags in, one job, a summary out; no logic of its own.

Commands are read off the jobs (`mechscope.studies.jobs`): a command's flags are the fields of its settings, so name, type, bounds, default and help are
written once. Heavy imports happen inside the commands: `--help` answers at once. An expected error is one red line and exit code 2; anything else is
a bug and keeps its traceback.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import shlex
import sys
import typing
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from mechscope import commands, ranks
from mechscope.errors import MechscopeError
from mechscope.settings import Leaf
from mechscope.store.ledger import require_ours_or_empty
from mechscope.studies.flags import flags_in_errors
from mechscope.studies.job import Job
from mechscope.studies.jobs import jobs
from mechscope.studies.places import check_paths, new_run

app = typer.Typer(
    name="mechscope",
    help="A microscope for what fine-tuning does to GPT-like language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# groups of commands in the help, in order
PANELS = {
    "compare": "Compare a base and a tuned model",
    "intervene": "Intervene",
    "circuits": "Circuits",
    "read": "Read a model",
    "tune": "Fine-tune",
    "features": "Features",
    "studies": "Whole studies",
    "runs": "Models and runs",
}
_GROUPS = {
    "benchmark": "Methods judged where the answer is known.",
    "features": "Dictionaries of features: train them, measure them, read what their latents stand for.",
    "study": "Whole studies: from models and documents to a report.",
}

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with any of these settings (mechscope config JOB writes one); flags go before it.",
        rich_help_panel="Output",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="Print warnings, errors and where the run is, nothing else.", rich_help_panel="Output")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Also print the run's log.", rich_help_panel="Output")]


class _InterruptedError(Exception):
    """A run was interrupted; its folder. The parser swallows a KeyboardInterrupt."""


def _add(job: Job[Any], groups: dict[str, typer.Typer]) -> None:
    """Add a job as a command."""

    def command(
        out: Path | None,
        config: Path | None = None,
        quiet: bool = False,
        verbose: bool = False,
        context: typer.Context | None = None,
        **given: Any,
    ) -> None:
        if context is not None and context.args:
            given[job.passes] = " ".join(filter(None, (given[job.passes], shlex.join(context.args))))
        with flags_in_errors([leaf.name for leaf in job.options], job.arguments):
            # an error about settings or paths comes before anything heavy is imported
            settings = job.resolve(config, **given)
            check_paths(job, settings)
            if out is not None and job.execute is None:
                require_ours_or_empty(out)
            out = out or (Path("runs") / job.name if job.preset is not None else new_run(job.name))
            from mechscope.studies import console

            try:
                with console.progress(quiet=quiet, verbose=verbose) as progress:
                    result = console.run(job, settings, out, command=["mechscope", *sys.argv[1:]], progress=progress)
            except KeyboardInterrupt:
                raise _InterruptedError(out) from None
            if ranks.is_first():
                console.show(job, result, quiet=quiet)

    own: list[tuple[str, Any, Any]] = [("out", None, _out(job)), ("quiet", False, Quiet), ("verbose", False, Verbose)]
    own = [*own[:1], *([("config", None, Config)] if job.options else []), *own[1:]]
    own += [("context", inspect.Parameter.empty, typer.Context)] if job.passes else []
    output = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind) for name, default, kind in own]
    first, then = ([_flag(leaf, job) for leaf in part] for part in job.in_order)
    _with_signature(command, [*first, *output, *then])
    command.__doc__ = job.help
    group = app if not job.group else groups.setdefault(job.group, typer.Typer(help=_GROUPS[job.group], no_args_is_help=True))
    kind = type(f"{job.name} command", (_Command,), {"usage": " ".join([*_required(job), "[OPTIONS]"])})
    # what a job hands on to another is not looked for among its own flags
    settings = {"allow_extra_args": True, "ignore_unknown_options": True} if job.passes else None
    group.command(
        job.command.split()[-1], cls=kind, epilog=f"Example: {job.example}", rich_help_panel=PANELS[job.panel], context_settings=settings
    )(command)


class _Command(TyperCommand):
    """A command whose help says in the first line what must be given, and has `--help` beside the other flags about output."""

    usage = ""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what stands behind the command's name in the first line."""
        return [self.usage]

    def get_help_option(self, ctx: Any) -> Any:
        """Return `--help`, put into the panel of the output."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = "Output"
        return option


def _required(job: Job[Any]) -> list[str]:
    """Return the arguments, those that may be left out in brackets, and the flags without which a job does not begin."""
    needed = {leaf.name for leaf in job.options if leaf.default is dataclasses.MISSING}
    arguments = [name.upper() if name in needed else f"[{name.upper()}]" for name in job.arguments]
    order = [leaf.name for leaf in chain(*job.in_order) if leaf.name in needed.difference(job.arguments)]
    return [*arguments, *(f"--{name.replace('_', '-')} {name.upper()}" for name in order)]


def _out(job: Job[Any]) -> Any:
    default = f"runs/{job.name}" if job.preset is not None else f"runs/{job.name}-DATE-N, a new one"
    words = f"Folder of the run; the same command on the same folder continues it. (default: {default})"
    return Annotated[Path | None, typer.Option("--out", help=words, show_default=False, rich_help_panel="Output")]


def _with_signature(command: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    # how inspect lets a function declare its signature
    vars(command).update(__signature__=inspect.Signature(parameters))
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _flag(leaf: Leaf, job: Job[Any]) -> inspect.Parameter:
    kind, bounds = _parsed(leaf.hint)
    if leaf.name in job.arguments:
        # not required by the parser: a configuration file may hold it
        words = f"{leaf.help} (required)" if leaf.default is dataclasses.MISSING else leaf.help
        annotation: Any = Annotated[kind | None, typer.Argument(help=words, show_default=False, metavar=leaf.name.upper())]
        return inspect.Parameter(leaf.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    # the default is part of the text: the parser's own stays None, "not given", so that a configuration file is not overruled
    words = leaf.help
    if leaf.default is dataclasses.MISSING:
        words += " (required)"
    elif leaf.default not in (None, False):
        words += f" (default: {str(leaf.default).encode('unicode_escape').decode()})"
    name = leaf.name.replace("_", "-")
    names = [f"--{name}/--no-{name}"] if kind is bool else [f"--{name}"]
    option = typer.Option(*names, help=words, show_default=False, rich_help_panel=job.panel_of(leaf), **bounds)
    return inspect.Parameter(leaf.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _parsed(hint: Any) -> tuple[Any, dict[str, Any]]:
    """Return the type that the parser reads, and the bounds that it shows."""
    inner = next((part for part in typing.get_args(hint) if part is not type(None)), hint) if _is_optional(hint) else hint
    bounds: dict[str, Any] = {}
    if typing.get_origin(inner) is Annotated:
        inner, *marks = typing.get_args(inner)
        bounds = {name: value for mark in marks for name, value in (("min", getattr(mark, "ge", None)), ("max", getattr(mark, "le", None)))}
        bounds = {name: value for name, value in bounds.items() if value is not None}
    if typing.get_origin(inner) is Literal or inner in (bool, int, float, str):
        return inner, bounds
    return str, {}


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _add_all() -> None:
    groups: dict[str, typer.Typer] = {}
    for job in sorted(jobs().values(), key=lambda job: (list(PANELS).index(job.panel), job.name)):
        _add(job, groups)
    panels = {job.group: PANELS[job.panel] for job in jobs().values()}
    for name, group in groups.items():
        app.add_typer(group, name=name, rich_help_panel=panels[name])


_add_all()
commands.add(app, panel=PANELS["runs"])


def main() -> None:
    """Run the command line: exit code 0 when done, 2 for an error the user can mend, 130 when interrupted."""
    # before a command imports it: a fork of a process with threads is what the warning is about, and there is none here
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(prog_name="mechscope", standalone_mode=False)
    except TyperException as error:
        _fail(error.format_message().replace("Value error, ", ""))
    except MechscopeError as error:
        if isinstance(error, ranks.ElsewhereError) or ranks.is_echo():
            raise SystemExit(2) from None
        _fail(str(error))
    except _InterruptedError as stop:
        where = shlex.quote(str(stop))
        typer.secho(f"interrupted: the same command with --out {where} continues where it was", fg=typer.colors.YELLOW, err=True)
        raise SystemExit(130) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str) -> typing.NoReturn:
    typer.secho(f"error{ranks.label()}: {' '.join(message.split())}", fg=typer.colors.RED, err=True)
    raise SystemExit(2)
