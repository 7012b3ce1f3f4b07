"""The command line: `python -m benchmarks run | compare | table | scale | list`. An expected error is one red line and exit code 2.

The jobs, and with them torch and mechscope, are imported by the commands that need them.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparison import report
from benchmarks.processes import HEADER, ROOT, Measured, Peers, find_peers, measure_apart, run
from benchmarks.results import FORMAT, Results
from benchmarks.settings import OWN, BenchmarkError, Settings
from benchmarks.shapes import SHAPES
from benchmarks.tables import write_blocks, write_tables
from mechscope.errors import MechscopeError

if TYPE_CHECKING:
    from benchmarks.harness import Job

PAGE = ROOT / "docs" / "benchmarks.md"
# of the extras `bench` and `bench-older`
_BENCH_PYTHONS = tuple(ROOT / name / "bin" / "python" for name in (".venv-bench", ".venv-bench-older"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    try:
        return int(options.command(options, given))
    except (BenchmarkError, MechscopeError) as error:
        red, plain = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        print(f"{red}error: {error}{plain}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="Time and memory of mechscope's jobs, and of its peers'.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="measure jobs"))
    compared = commands.add_parser("compare", help="compare two result files")
    compared.add_argument("old", type=Path, metavar="OLD.json")
    compared.add_argument("new", type=Path, metavar="NEW.json")
    compared.set_defaults(command=_compare)
    tables = commands.add_parser("table", help="write result files into the page's blocks of the same name")
    tables.add_argument("files", type=Path, nargs="+", metavar="RESULTS.json")
    tables.add_argument("--page", type=Path, default=PAGE, help="the markdown page (default: docs/benchmarks.md)")
    tables.set_defaults(command=_table)
    scaled = commands.add_parser("scale", help="measure how cost grows, and write the page on scaling")
    scaled.add_argument("--out", type=Path, help="JSON file for what was measured")
    scaled.add_argument("--read", type=Path, metavar="RESULTS.json", help="write the page from such a file, measuring nothing")
    scaled.add_argument("--page", type=Path, default=PAGE.with_name("scaling.md"), help="the markdown page (default: docs/scaling.md)")
    scaled.set_defaults(command=_scale)
    listed = commands.add_parser("list", help="name all jobs, with about how long each takes")
    listed.set_defaults(command=_list)
    return top


def _add_run(run: argparse.ArgumentParser) -> None:
    defaults = Settings()
    run.add_argument("names", nargs="*", metavar="NAME", help="jobs or topics (default: all but those that are parts of others)")
    run.add_argument("--shape", choices=SHAPES, default="small", help="GPT-2 small, or its variant of 4,096 positions")
    run.add_argument("--threads", type=int, default=defaults.threads)
    run.add_argument("--repeats", type=int, help="timed rounds of every job (default: 5, fewer for slow jobs)")
    run.add_argument("--out", type=Path, help="JSON file for the results, written after every job")
    run.add_argument(
        "--peers",
        nargs="+",
        metavar="PYTHON",
        help="interpreters that have peers (default: those of .venv-bench, .venv-bench-older)",
    )
    run.add_argument("--no-peers", action="store_true", help="measure mechscope alone")
    run.add_argument(
        "--alone", action="store_true", help="run each job once, with nothing beside it: for what takes long or fills the memory"
    )
    run.add_argument(
        "--in-use",
        action="store_true",
        help="count memory in use only: freed arrays go back to the system at once, which takes time (Linux)",
    )
    run.add_argument("--device", default=defaults.device)
    model = run.add_argument_group("other models and texts, instead of the shape's own")
    for name, text in (("layers", "blocks"), ("heads", "heads of width 64"), ("vocabulary", "words"), ("positions", "longest text")):
        model.add_argument(f"--{name}", type=int, help=text)
    model.add_argument("--texts", type=int, help="texts of every job")
    model.add_argument("--tokens", type=int, help="tokens of each text")
    special = run.add_argument_group("single jobs")
    special.add_argument("--probes", type=int, default=defaults.probes, help="head roles: random texts, each with a control as long")
    special.add_argument("--components", help="weights: which heads, such as a0.h1,layers:2, or all (default: the first four)")
    special.add_argument("--model", help="weights: a model's folder instead of random weights")
    special.add_argument("--data", help="difference: documents (default: the generated newsroom)")
    special.add_argument("--tokenizer", help="difference: folder of their tokenizer (default: the newsroom's)")
    special.add_argument(
        "--documents", type=int, nargs="+", default=[defaults.documents], help="difference: how many; several are measured one by one"
    )
    special.add_argument("--max-tokens", type=int, default=defaults.max_tokens, help="difference: longest document")
    special.add_argument("--tokens-per-batch", type=int, default=defaults.tokens_per_batch, help="difference: of both models' batches")
    run.set_defaults(command=_run)


def settings_of(options: argparse.Namespace) -> Settings:
    """Return what a run was asked for.

    Raises:
        BenchmarkError: A number is below one.
    """
    for name in (
        "threads",
        "repeats",
        "layers",
        "heads",
        "vocabulary",
        "positions",
        "texts",
        "tokens",
        "probes",
        "max_tokens",
        "tokens_per_batch",
    ):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise BenchmarkError(f"--{name.replace('_', '-')} is {value}: give at least 1")
    sizes = {name: value for name in ("layers", "heads", "vocabulary", "positions") if (value := getattr(options, name)) is not None}
    shape = replace(SHAPES[options.shape], **sizes)
    if min(options.documents) < 2:
        raise BenchmarkError(f"--documents is {min(options.documents)}: statistics over documents need at least 2")
    if options.tokens is not None and options.tokens > shape.positions:
        shape = replace(shape, positions=options.tokens)
    names = (
        "threads",
        "repeats",
        "alone",
        "in_use",
        "device",
        "texts",
        "tokens",
        "probes",
        "components",
        "model",
        "data",
        "tokenizer",
        "max_tokens",
        "tokens_per_batch",
    )
    return Settings(
        shape_name=options.shape, shape=shape, documents=options.documents[0], **{name: getattr(options, name) for name in names}
    )


def chosen(names: Sequence[str], shape_name: str) -> list[Job]:
    """Return the jobs that names and topics mean, in the order of the list.

    Raises:
        BenchmarkError: A name is neither, or no job has texts for the variant.
    """
    from benchmarks.jobs import JOBS, TOPICS

    if unknown := [name for name in names if name not in JOBS and name not in TOPICS]:
        raise BenchmarkError(f"{unknown[0]!r} is no job: use {', '.join(JOBS)}, or a topic: {', '.join(TOPICS)}")
    named = set(names)
    for topic in named & set(TOPICS):
        named |= {job.name for job in TOPICS[topic] if not job.part}
    wanted = [job for job in JOBS.values() if (job.name in named if names else not job.part)]
    fitting = [job for job in wanted if job.fits(shape_name)]
    # of a topic what fits is meant, a job by its own name
    if lacking := [name for name in names if name in JOBS and name not in TOPICS and not JOBS[name].fits(shape_name)] or (
        [] if fitting else names
    ):
        raise BenchmarkError(f"{', '.join(lacking)}: no texts for --shape {shape_name}: use --shape small")
    return fitting


def _run(options: argparse.Namespace, given: list[str]) -> int:
    from benchmarks.jobs import TOPICS
    from benchmarks.machine import check_device, shown
    from benchmarks.peers import JOBS as PEER_JOBS
    from benchmarks.peers import NAMES

    settings, jobs = settings_of(options), chosen(options.names, options.shape)
    check_device(settings.device)
    peers = Peers() if options.no_peers or options.alone else find_peers(_pythons(options.peers))
    head = {
        **_head(given),
        "settings": {name: shown([value], ROOT)[0] if isinstance(value, str) else value for name, value in settings.to_json().items()},
        "jobs": [job.name for job in jobs],
        "peers": peers.versions,
        "absent": {NAMES[package]: why for package, why in peers.absent.items()},
    }
    results = Results(head, path=options.out)
    results.write()  # a file that cannot be written says so now, not after an hour
    theirs = [job for job in PEER_JOBS.values() if job.package in peers.pythons and job.fits(options.shape)]
    _say(f"{', '.join(f'{name} {version}' for name, version in (head['versions'] | peers.versions).items())}, {settings.threads} threads")
    _say(f"absent peers: {'; '.join(f'{name} ({why})' for name, why in head['absent'].items()) or 'none'}")
    _say(HEADER)

    def measure(job: Job, how: Settings) -> Measured:
        return measure_apart(sys.executable if job.by == OWN else peers.pythons[job.package], job, how)

    # a job over documents is measured once for each number of them
    tasks = [(job, replace(settings, documents=n)) for job in jobs for n in (options.documents if job in TOPICS["documents"] else (1,))]
    run(tasks, theirs, measure, results, _say)
    return 1 if results.failures else 0


def _pythons(given: Sequence[str] | None) -> list[str]:
    """Return the interpreters to ask for peers: this one first, as its libraries are those mechscope runs on."""
    if given is None:
        given = [str(python) for python in _BENCH_PYTHONS if python.exists()]
    return [sys.executable, *given]


def _compare(options: argparse.Namespace, _: list[str]) -> int:
    for line in report(Results.read(options.old), Results.read(options.new)):
        _say(line)
    return 0


def _table(options: argparse.Namespace, _: list[str]) -> int:
    write_tables(options.page, {path.stem: Results.read(path) for path in options.files})
    return 0


def _scale(options: argparse.Namespace, given: list[str]) -> int:
    from benchmarks import scaling

    write_blocks(options.page, dict.fromkeys(scaling.BLOCKS, ""), try_only=True)
    if options.read is not None:
        results = Results.read(options.read, "scale")
    else:
        results = Results(_head(given), path=options.out)
        results.write()
        for record in scaling.run(scaling.points(), _say):
            results.records.append(record)
            results.write()
    write_blocks(options.page, scaling.blocks(results.head, results.records))
    return 0


def _head(given: list[str]) -> dict[str, Any]:
    """Return what every result file begins with: when, by which command, where, with what versions."""
    from benchmarks.machine import machine, shown, versions

    return {
        "format": FORMAT,
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "command": " ".join(["python -m benchmarks", *shown(given, ROOT)]),
        "machine": machine(),
        "versions": versions(),
    }


def _list(_: argparse.Namespace, __: list[str]) -> int:
    from benchmarks.jobs import TOPICS
    from benchmarks.peers import JOBS as PEER_JOBS

    for topic, jobs in TOPICS.items():
        _say(topic)
        for job in jobs:
            peers = ", ".join(f"{peer.by} {peer.seconds} s" for peer in PEER_JOBS.values() if peer.name == job.name)
            _say(
                f"  {job.name:<22}{job.seconds:>5} s  {job.what}{' (only when named)' if job.part else ''}{f' [{peers}]' if peers else ''}"
            )
    return 0


def _say(text: str) -> None:
    print(text, flush=True)
