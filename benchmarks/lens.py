"""What the logit lens costs, beside the unembeddings it needs.

A GPT-2-small-shaped model with random weights (speed does not depend on the values) in float32 on two threads, and 8 texts of 128 tokens. Every job has
its own process: its peak memory above the loaded model is taken first, then it takes turns with the plain unembeddings of as many layers as it
reads: 12 linear maps of 1,024 rows each, and nothing else. What counts is the ratio of medians. The lens's time includes the forward pass that
makes what is read, which is also given alone.

    python benchmarks/lens.py
    python benchmarks/lens.py --jobs likeliest --repeats 3
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from attention_statistics import GIB, peak_memory
from patching import Case, build

from mechscope.data.pairs import Pairs, collate_pairs
from mechscope.instrument.readout import Readout
from mechscope.lens.logit_lens import read
from mechscope.lens.places import Standing, places_of
from mechscope.lens.projection import Projection
from mechscope.lens.training import LensSettings, train_tuned_lens

TEXTS, TOKENS = 8, 128


def unembeddings(case: Case) -> None:
    """Unembed as many rows as there are tokens, once for each layer."""
    weight = Readout.of(case.subject).weight
    rows = torch.randn(case.ids.numel(), weight.shape[1])
    for _ in range(case.subject.anatomy.n_layers):
        torch.nn.functional.linear(rows, weight)


def backbone(case: Case) -> None:
    """Run the forward pass up to the last residual stream, as the lens does."""
    Standing(case.subject, places_of(case.subject, ("residual",))).run(collate_pairs(tuple(case.pairs)))


def _projected(case: Case, *, everything: bool) -> None:
    projection, targets = Projection(case.subject), case.ids.flatten()
    rows = torch.randn(len(targets), case.subject.anatomy.d_model)
    final = projection.final(rows) if everything else None
    for _ in range(case.subject.anatomy.n_layers):
        projection.read(rows, targets, ranks=everything, entropy=everything, final=final)


def projection(case: Case) -> None:
    """Take the five likeliest tokens of given rows, once for each layer."""
    _projected(case, everything=False)


def projection_all(case: Case) -> None:
    """Take the five likeliest tokens, ranks, entropies and divergences of given rows, once for each layer."""
    _projected(case, everything=True)


def _blocks(case: Case) -> range:
    return range(case.subject.anatomy.n_layers)


def likeliest(case: Case) -> None:
    """Read the five likeliest tokens behind every block."""
    read(case.subject, case.pairs, layers=_blocks(case), statistics=False)


def everything(case: Case) -> None:
    """Read the five likeliest tokens, ranks, entropies and divergences behind every block."""
    read(case.subject, case.pairs, layers=_blocks(case))


def training_step(case: Case) -> None:
    """Take one step of training a tuned lens, all layers but the last."""
    settings = LensSettings(steps=1, tokens_per_step=case.ids.numel())
    train_tuned_lens(case.subject, case.pairs, layers=_blocks(case), settings=settings)


@dataclass(frozen=True)
class Job:
    """A job and what it may cost.

    Attributes:
        run: Does it.
        ratio: Most unembeddings of all layers, if there is a target.
        gib: Most memory above the model, likewise.
    """

    run: Callable[[Case], None]
    ratio: float | None = None
    gib: float | None = None


JOBS = {
    "backbone": Job(backbone),
    "projection": Job(projection),
    "projection_all": Job(projection_all),
    "likeliest": Job(likeliest, ratio=1.3, gib=0.5),
    "everything": Job(everything, gib=0.5),
    "training_step": Job(training_step),
}


def measure(name: str, shape: argparse.Namespace) -> dict[str, Any]:
    """Take a job's peak memory, then time it in turns with the unembeddings."""
    job, case = JOBS[name], build(TEXTS, TOKENS, shape)
    with torch.no_grad():
        job.run(_small(case))  # thread pools and workspaces belong to nobody
        with peak_memory() as peak:
            job.run(case)
        memory = peak() / GIB
        taken: tuple[list[float], list[float]] = ([], [])
        for repeat in range(shape.repeats + 1):
            for run, kept in ((unembeddings, taken[0]), (job.run, taken[1])):
                start = time.perf_counter()
                run(case)
                if repeat:  # the first round warms up
                    kept.append(time.perf_counter() - start)
    one, seconds = map(statistics.median, taken)
    row = {"job": name, "seconds": seconds, "unembeddings": one, "ratio": seconds / one, "allowed": job.ratio}
    return row | {"memory_gib": memory, "allowed_memory": job.gib}


def _small(case: Case) -> Case:
    pairs = (replace(pair, clean=pair.clean[:8], corrupt=pair.corrupt[:8], target=(1, 8)) for pair in case.pairs.first(2))
    return Case(case.subject, Pairs(tuple(pairs), case.pairs.source))


def apart(name: str, shape: argparse.Namespace) -> dict[str, Any]:
    """Measure a job in a process of its own."""
    options = [f"--{option}={value}" for option, value in vars(shape).items() if option not in ("jobs", "json", "here")]
    command = [sys.executable, __file__, "--jobs", name, "--json", "--here", *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


HEADER = f"{'job':<16}{'seconds':>10}{'unembeddings':>14}{'ratio':>8} {'':<7}{'GiB':>8}"


def line(row: dict[str, Any]) -> str:
    """Format a row as plain text, under HEADER."""

    def allowed(limit: float | None) -> str:
        return "" if limit is None else f"≤ {limit:g}"

    return (
        f"{row['job']:<16}{row['seconds']:>10.3f}{row['unembeddings']:>14.3f}{row['ratio']:>8.3f} {allowed(row['allowed']):<7}"
        f"{row['memory_gib']:>8.3f} {allowed(row['allowed_memory'])}"
    ).rstrip()


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="only these (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds after one to warm up")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line instead of a table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12, help="heads of width 64")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    shape = parser.parse_args(arguments)
    if not shape.json:
        print(f"python {platform.python_version()}, torch {torch.__version__}, {shape.threads} threads, {TEXTS} × {TOKENS} tokens")
        print(HEADER, flush=True)
    if shape.here:
        torch.set_num_threads(shape.threads)
    for name in shape.jobs:
        row = measure(name, shape) if shape.here else apart(name, shape)
        print(json.dumps(row) if shape.json else line(row), flush=True)


if __name__ == "__main__":
    main()
