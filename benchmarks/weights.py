"""What reading heads off their weights costs: vocabulary-space top-k, copying, composition.

The model is GPT-2-small-shaped with random weights, in float32 on two threads. That is the worst case for the search in vocabulary space: trained
circuits have few strong directions and tokens of very different length, so more of their vocabulary × vocabulary matrix is skipped (`--model` takes
a real one). Every job has its own process: its peak memory above the loaded model is taken on the run that is timed. What times are
compared with is one head's whole matrix, made block by block and thrown away: what any search must do that skips nothing.

    python benchmarks/weights.py
    python benchmarks/weights.py --jobs ov --components all
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from attention_statistics import GIB, peak_memory
from transformers import GPT2Config, GPT2LMHeadModel

from mechscope.subject.load import Subject, load
from mechscope.subject.pair import Pair, pair
from mechscope.weights import composition, head_changes, ov_tokens, qk_tokens, singular_tokens, weight_heads
from mechscope.weights.forms import chosen_heads

PACKAGES = ("torch", "transformers", "mechscope")
# rows of the whole matrix made at once in the reference, as in the search
_ROWS, _COLUMNS = 512, 1024


@dataclass(frozen=True, eq=False)
class Case:
    """The model, a changed copy for the jobs that compare, and which heads.

    Attributes:
        subject: The model.
        both: Base and tuned; None for jobs of one model.
        heads: Which heads, as text; None for all.
    """

    subject: Subject
    both: Pair | None
    heads: str | None

    @property
    def models(self) -> Pair:
        """Base and tuned."""
        if self.both is None:
            raise ValueError("this case was built without a tuned model")
        return self.both


def ov(case: Case) -> None:
    """Find the top 10 entries of heads' whole OV circuits."""
    ov_tokens(case.subject, heads=case.heads, k=10)


def qk(case: Case) -> None:
    """Find the top 10 entries of heads' whole QK circuits."""
    qk_tokens(case.subject, heads=case.heads, k=10)


def ov_sources(case: Case) -> None:
    """Find the top 10 targets of 100 sources."""
    ov_tokens(case.subject, heads=case.heads, sources=range(min(100, case.subject.anatomy.vocab_size)), k=10)


def ov_change(case: Case) -> None:
    """Find the top 10 entries of what changed in heads' OV circuits."""
    ov_tokens(case.models, heads=case.heads, k=10)


def copying(case: Case) -> None:
    """Describe heads by norms, eigenvalues and 512 tokens' ranks."""
    weight_heads(case.subject, heads=case.heads)


def singular(case: Case) -> None:
    """Name heads' singular vectors."""
    singular_tokens(case.subject, heads=case.heads)


def composed(case: Case) -> None:
    """Score composition of all heads, whichever are chosen."""
    composition(case.subject)


def changes(case: Case) -> None:
    """Rank heads by their change."""
    head_changes(case.models, heads=case.heads)


@dataclass(frozen=True)
class Job:
    """A job and what it may cost.

    Attributes:
        run: Does it.
        gib: Most memory above the model, if there is a target.
        compares: Whether it needs a tuned model.
    """

    run: Callable[[Case], None]
    gib: float | None = None
    compares: bool = False


JOBS = {
    "ov": Job(ov, gib=3),
    "qk": Job(qk, gib=3),
    "ov_sources": Job(ov_sources, gib=3),
    "ov_change": Job(ov_change, gib=3, compares=True),
    "copying": Job(copying),
    "singular": Job(singular),
    "composition": Job(composed),
    "changes": Job(changes, compares=True),
}


def whole(size: int, width: int) -> None:
    """Make a head's whole matrix block by block."""
    a, b = torch.rand(size, width), torch.rand(size, width)
    for rows in a.split(_ROWS):
        for columns in b.split(_COLUMNS):
            rows @ columns.T


def build(shape: argparse.Namespace, *, compares: bool) -> Case:
    """Make or load the model, and a changed copy where jobs compare."""
    torch.manual_seed(0)
    sizes = {"n_layer": shape.layers, "n_head": shape.heads, "n_embd": 64 * shape.heads, "vocab_size": shape.vocabulary}
    subject = load(GPT2LMHeadModel(GPT2Config(**sizes)) if shape.model is None else shape.model)
    heads = None if shape.components == "all" else shape.components
    if not compares:
        return Case(subject, None, heads)
    tuned = copy.deepcopy(subject.plain)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    return Case(subject, pair(subject, load(tuned, tokenizer=subject.tokenizer)), heads)


def measure(name: str, shape: argparse.Namespace) -> dict[str, Any]:
    """Time a job and take its peak memory, beside the reference."""
    job = JOBS[name]
    case = build(shape, compares=job.compares)
    anatomy = case.subject.anatomy
    whole(min(anatomy.vocab_size, 2 * _ROWS), anatomy.d_head)  # warms up
    start = time.perf_counter()
    whole(anatomy.vocab_size, anatomy.d_head)
    reference = time.perf_counter() - start
    with peak_memory() as peak:
        start = time.perf_counter()
        job.run(case)
        seconds = time.perf_counter() - start
    n_heads = anatomy.n_layers * anatomy.n_heads if name == "composition" else len(list(chosen_heads(case.subject, case.heads)))
    row = {"job": name, "heads": n_heads, "seconds": seconds, "per_head": seconds / n_heads, "whole": reference}
    return {**row, "ratio": seconds / n_heads / reference, "memory_gib": peak() / GIB, "allowed_memory": job.gib}


def apart(name: str, shape: argparse.Namespace) -> dict[str, Any]:
    """Measure a job in a process of its own."""
    given = {option: value for option, value in vars(shape).items() if option not in ("jobs", "json", "here") and value is not None}
    command = [sys.executable, __file__, "--jobs", name, "--json", "--here", *(f"--{option}={value}" for option, value in given.items())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


HEADER = f"{'job':<14}{'heads':>7}{'seconds':>10}{'per head':>10}{'whole':>9}{'ratio':>8}{'GiB':>8}"


def line(row: dict[str, Any]) -> str:
    """Format a row as plain text, under HEADER."""
    allowed = "" if row["allowed_memory"] is None else f" ≤ {row['allowed_memory']:g}"
    return (
        f"{row['job']:<14}{row['heads']:>7}{row['seconds']:>10.2f}{row['per_head']:>10.3f}{row['whole']:>9.3f}{row['ratio']:>8.2f}"
        f"{row['memory_gib']:>8.3f}{allowed}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="only these (default: all)")
    parser.add_argument("--components", default="layers:0", help="which heads, such as a0.h1,layers:2, or all")
    parser.add_argument("--model", help="a model's folder instead of random weights")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line instead of a table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12, help="heads of width 64")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    shape = parser.parse_args(arguments)
    if not shape.json:
        parts = [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES), f"{shape.threads} threads"]
        print(", ".join(parts))
        print(HEADER, flush=True)
    if shape.here:
        torch.set_num_threads(shape.threads)
    for name in shape.jobs:
        row = measure(name, shape) if shape.here else apart(name, shape)
        print(json.dumps(row) if shape.json else line(row), flush=True)


if __name__ == "__main__":
    main()
