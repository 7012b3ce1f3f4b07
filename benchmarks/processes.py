"""Measuring jobs one after another, each in a process of its own, mechscope's first and its peers' behind it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.results import Results, agreement
from benchmarks.settings import OWN, BenchmarkError, Settings

if TYPE_CHECKING:
    from benchmarks.harness import Job

ROOT = Path(__file__).resolve().parents[1]
Measured = tuple[dict[str, Any], np.ndarray | None]


@dataclass(frozen=True)
class Peers:
    """Who else can be measured.

    Attributes:
        pythons: The interpreter that has a peer's package, by package.
        versions: The package's version there.
        absent: Why a package's jobs are left out, by package.
    """

    pythons: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def find_peers(pythons: Sequence[str]) -> Peers:
    """Ask interpreters, in order, which peers they have.

    Raises:
        BenchmarkError: One cannot be run.
    """
    found = Peers()
    for python in pythons:
        try:
            done = subprocess.run(
                [python, "-m", "benchmarks.peers"], env=environment(Settings(threads=1)), capture_output=True, text=True, check=True
            )
            answer = json.loads(done.stdout.strip().rpartition("\n")[2])
        except FileNotFoundError as error:
            raise BenchmarkError(f"--peers {python}: there is no such program: make it with `make bench-peers`, or name another") from error
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            reason = "it is no Python" if isinstance(error, ValueError) else last_line(getattr(error, "stderr", "") or str(error))
            raise BenchmarkError(f"--peers {python} cannot run the harness ({reason}): it needs torch, transformers and psutil") from error
        for package, here in answer.items():
            if "version" not in here:
                found.absent.setdefault(package, here["absent"])
            elif package not in found.pythons:
                found.pythons[package], found.versions[package] = python, here["version"]
    for package in found.pythons:
        found.absent.pop(package, None)
    return found


def measure_apart(python: str, job: Job, settings: Settings) -> Measured:
    """Measure a job under an interpreter, in a process of its own.

    Raises:
        BenchmarkError: The job failed; the message is the last line it wrote.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "settings.json").write_text(json.dumps(settings.to_json()), encoding="utf-8")
        with (folder / "stderr").open("w", encoding="utf-8") as stderr:
            command = [python, "-m", "benchmarks.worker", job.name, job.by, name]
            code = subprocess.run(command, env=environment(settings), stderr=stderr, check=False).returncode
        if code < 0:
            raise BenchmarkError(
                f"its process was killed by signal {-code}" + (", as one is that needs too much memory" if code == -9 else "")
            )
        if code:
            said = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
            raise BenchmarkError(last_line(said) or f"its process ended with code {code}")
        numbers = folder / "numbers.npy"
        return json.loads((folder / "record.json").read_text(encoding="utf-8")), np.load(numbers) if numbers.exists() else None


def run(
    tasks: Iterable[tuple[Job, Settings]],
    peer_jobs: Sequence[Job],
    measure: Callable[[Job, Settings], Measured],
    results: Results,
    say: Callable[[str], None],
) -> None:
    """Measure jobs and the peers' jobs of the same name; results are written after each.

    Args:
        tasks: mechscope's jobs, and how each is measured.
        peer_jobs: The peers', those that can run.
        measure: Measures one.
        results: Where records and failures go.
        say: Prints a line.
    """
    for job, settings in tasks:
        own: np.ndarray | None = None
        for each in (job, *(peer for peer in peer_jobs if peer.name == job.name)):
            try:
                record, numbers = measure(each, settings)
                if each.by == OWN:
                    own = numbers
                elif own is not None and numbers is not None:
                    record["agreement"] = agreement(own, numbers)
            except Exception as error:  # whatever goes wrong in one job must not lose the others
                message = last_line(str(error)) or type(error).__name__
                results.failures.append({"job": each.name, "by": each.by, "error": message})
                say(f"{each.name:<22}{each.by:<22}failed: {message}")
            else:
                results.records.append(record)
                say(line(record))
            results.write()


HEADER = f"{'job':<22}{'by':<22}{'text':>14}{'seconds':>10}{'passes':>9}{'±':>6}{'ratio':>9} {'':<8}{'GiB':>8}"


def line(record: dict[str, Any]) -> str:
    """Format a record as plain text, under HEADER."""
    passes = "–" if record["passes"] is None else f"{record['passes']:.2f}"
    ratio = "–" if record["ratio"] is None else f"{record['ratio']:.2f}"
    noise = "" if record["noise"] is None else f"{100 * record['noise']:.0f} %"
    allowed, gib = record["targets"]["ratio"], record["targets"]["gib"]
    text = (
        f"{record['job']:<22}{record['by']:<22}{text_of(record):>14}{record['seconds']:>10.3f}{passes:>9}{noise:>6}{ratio:>9} "
        f"{'' if allowed is None else f'≤ {allowed:g}':<8}{record['memory_gib']:>8.3f}{'' if gib is None else f' ≤ {gib:g}'}"
    )
    found = record.get("agreement")
    if found is not None:
        text += f"  numbers differ by {found['difference']:.1e}" + ("" if found["same"] else ": NOT the same work")
    return text.rstrip()


def text_of(record: dict[str, Any]) -> str:
    """Say how much text a record's job read."""
    if not record["texts"]:
        return "–"
    return f"{record['texts']:,} × {record['each']:,}" if record["each"] else f"{record['texts']:,}, {record['tokens']:,}"


# the end of a traceback, also of a rank's under torchrun, which writes a summary of its own behind it
_ERROR = re.compile(r"(?:\[rank\d+\]: )?((?:\w+\.)*\w+(?:Error|Exception): .+)")


def last_line(text: str) -> str:
    """Return the last error, or the last line that says something, without this machine's paths."""
    lines = [part.strip() for part in text.strip().splitlines() if part.strip()]
    errors = [found[1] for line in lines if (found := _ERROR.fullmatch(line))]
    said = errors[-1] if errors else lines[-1] if lines else ""
    for path in (str(ROOT), sys.prefix, str(Path.home())):
        said = said.replace(path, "…")
    return said


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment of a job's process."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = str(settings.threads)
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if settings.in_use:
        # glibc's default, once set, stays: otherwise it rises to 32 MiB with the arrays that are freed, and smaller ones leave holes in a heap
        own["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    return {**os.environ, **own, "PYTHONPATH": path}
