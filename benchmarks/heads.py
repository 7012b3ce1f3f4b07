"""What the roles of heads cost, beside the model's own forward pass over the same probes.

The model is that of `patching.py`: GPT-2-small-shaped with random weights (speed does not depend on the values) in float32 on two threads. Every job has
its own process: its peak memory above the loaded model is taken on a smaller set of probes to warm up and then on all; then it takes turns with the
plain forward pass, logits included, over all random texts and their controls in the same batches. What counts is the ratio of medians.

    python benchmarks/heads.py
    python benchmarks/heads.py --jobs role_table --repeats 3
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from attention_statistics import GIB, peak_memory
from patching import build

from mechscope.data.pairs import PairBatch
from mechscope.heads import copying_roles, head_roles, pattern_roles, roles_table
from mechscope.heads.pattern_roles import repeated_texts
from mechscope.scoring import batches
from mechscope.subject.load import Subject

PACKAGES = ("torch", "transformers", "mechscope")
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, eq=False)
class Case:
    """The model and how many random texts it reads.

    Attributes:
        subject: The model.
        probes: Random texts; each has a control as long.
    """

    subject: Subject
    probes: int

    @property
    def batches(self) -> list[PairBatch]:
        """The random texts with their controls, as the roles read them."""
        return list(batches(repeated_texts(self.subject, self.probes), TOKENS_PER_BATCH))


def forward(case: Case) -> None:
    """Run the plain forward pass, logits included, over all probes."""
    with torch.no_grad():
        for batch in case.batches:
            for ids in (batch.clean, batch.corrupt):
                case.subject.plain(ids, use_cache=False)


def patterns(case: Case) -> None:
    """Score where heads look."""
    pattern_roles(case.subject, n=case.probes)


def copying(case: Case) -> None:
    """Score what heads copy, which reads weights and no probes."""
    copying_roles(case.subject)


def role_table(case: Case) -> None:
    """Score every role that needs no task, and make the table of all heads."""
    roles_table(head_roles(case.subject, probes=case.probes))


# job and the most forward passes it may cost
JOBS: dict[str, tuple[Callable[[Case], None], float | None]] = {
    "patterns": (patterns, None),
    "copying": (copying, None),
    "role_table": (role_table, 12),
}


def measure(name: str, shape: argparse.Namespace) -> dict[str, Any]:
    """Take a job's peak memory, then time it in turns with the forward pass."""
    job, allowed = JOBS[name]
    case = Case(build(1, 2, shape).subject, shape.probes)
    job(Case(case.subject, min(2, shape.probes)))  # thread pools and workspaces belong to nobody
    with peak_memory() as peak:
        job(case)
    memory = peak() / GIB
    taken: tuple[list[float], list[float]] = ([], [])
    for repeat in range(shape.repeats + 1):
        for run, kept in ((forward, taken[0]), (job, taken[1])):
            start = time.perf_counter()
            run(case)
            if repeat:  # the first round warms up
                kept.append(time.perf_counter() - start)
    one, seconds = map(statistics.median, taken)
    tokens = 2 * sum(int(batch.real.sum()) for batch in case.batches)
    row = {"job": name, "texts": 2 * case.probes, "tokens": tokens, "seconds": seconds, "forward": one}
    return {**row, "ratio": seconds / one, "allowed": allowed, "memory_gib": memory}


def apart(name: str, shape: argparse.Namespace) -> dict[str, Any]:
    """Measure a job in a process of its own."""
    options = [f"--{option}={value}" for option, value in vars(shape).items() if option not in ("jobs", "json", "here")]
    command = [sys.executable, __file__, "--jobs", name, "--json", "--here", *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


HEADER = f"{'job':<12}{'texts':>7}{'tokens':>9}{'seconds':>10}{'forward':>10}{'passes':>9} {'':<6}{'GiB':>8}"


def line(row: dict[str, Any]) -> str:
    """Format a row as plain text, under HEADER."""
    allowed = "" if row["allowed"] is None else f"≤ {row['allowed']:g}"
    return (
        f"{row['job']:<12}{row['texts']:>7}{row['tokens']:>9,}{row['seconds']:>10.3f}{row['forward']:>10.3f}{row['ratio']:>9.2f} "
        f"{allowed:<6}{row['memory_gib']:>8.3f}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="only these (default: all)")
    parser.add_argument("--probes", type=int, default=32, help="random texts, each with a control as long")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds after one to warm up")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line instead of a table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12, help="heads of width 64")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    shape = parser.parse_args(arguments)
    if not shape.json:
        versions = (f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
        print(", ".join([f"python {platform.python_version()}", *versions, f"{shape.threads} threads"]))
        print(HEADER, flush=True)
    if shape.here:
        torch.set_num_threads(shape.threads)
    for name in shape.jobs:
        row = measure(name, shape) if shape.here else apart(name, shape)
        print(json.dumps(row) if shape.json else line(row), flush=True)


if __name__ == "__main__":
    main()
