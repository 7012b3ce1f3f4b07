"""What attention statistics cost, beside the model's own forward pass.

A GPT-2-small-shaped model with random weights (speed does not depend on the values) in float32 on two threads. Times are medians over repeats
that take turns, so that a drifting clock hits all jobs alike; memory is each job's own process, its peak above the loaded models. What counts are
the ratios. `--long N` instead compares two models over one text of N tokens, logits included but never held whole, and prints the process's peak.

    python benchmarks/attention_statistics.py --positions 1024 4096
    python benchmarks/attention_statistics.py --long 32768
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]  # it ships no types
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import GPT2Config, GPT2LMHeadModel

from mechscope.instrument import AttentionCall, Walk, compare, describe, observed
from mechscope.subject.load import Subject, load

GIB = 2**30
# rows of logits held at once in the long run: 512 × 50,257 × 4 bytes are 98 MiB
_ROWS = 512


@dataclass(frozen=True)
class Case:
    """The two models and the text that a job runs on."""

    base: Subject
    tuned: Subject
    ids: Tensor


def forward(case: Case) -> None:
    """Run the plain forward pass, logits included."""
    case.base.plain(case.ids, use_cache=False)


def backbone(case: Case) -> None:
    """Run the plain forward pass up to the last residual stream."""
    case.base.anatomy.backbone(case.ids, use_cache=False)


def _entropy(case: Case, model: Any) -> None:
    means = []

    def tap(call: AttentionCall) -> None:
        means.append(describe(call).entropy.mean(-1))

    with observed(case.base, tap):
        model(case.ids, use_cache=False)


def entropy(case: Case) -> None:
    """Take every head's mean entropy while the model runs, logits included."""
    _entropy(case, case.base.plain)


def entropy_backbone(case: Case) -> None:
    """Take every head's mean entropy while the model runs up to the last residual stream."""
    _entropy(case, case.base.anatomy.backbone)


def both(case: Case) -> tuple[tuple[Walk, Tensor], tuple[Walk, Tensor]]:
    """Take both models' entropies and their divergence in lock-step; return the walks and their last residual streams."""
    seen: dict[str, AttentionCall] = {}
    means = []
    with observed(case.base, lambda call: seen.update(base=call)), observed(case.tuned, lambda call: seen.update(tuned=call)):
        walks = Walk(case.base, case.ids), Walk(case.tuned, case.ids)
        one, two = walks[0].hidden, walks[1].hidden
        for layer in range(case.base.anatomy.n_layers):
            one, two = walks[0].step(layer, one), walks[1].step(layer, two)
            found = compare(seen.pop("base"), seen.pop("tuned"))
            kept = (found.base.entropy, found.tuned.entropy, found.kl_base_tuned, found.kl_tuned_base)
            means.append([value.mean(-1) for value in kept])
    return (walks[0], one), (walks[1], two)


def both_backbones(case: Case) -> None:
    """Run both models up to the last residual stream, unobserved."""
    case.base.anatomy.backbone(case.ids, use_cache=False)
    case.tuned.anatomy.backbone(case.ids, use_cache=False)


def both_with_logits(case: Case) -> None:
    """Take both models' entropies, their divergence, and the divergence of their next-token distributions a few rows at a time."""
    (first, one), (second, two) = both(case)
    total = 0.0
    for p_rows, q_rows in zip(one[0].split(_ROWS), two[0].split(_ROWS), strict=True):
        log_q = log_softmax(second.logits(q_rows), dim=-1)
        log_p = log_softmax(first.logits(p_rows), dim=-1)
        total += float(kl_div(log_q, log_p, reduction="sum", log_target=True))


def eager_maps(case: Case) -> None:
    """Take every head's mean entropy from eager attention's maps, as `output_attentions` gives them."""
    case.base.plain.set_attn_implementation("eager")
    try:
        maps = case.base.anatomy.backbone(case.ids, use_cache=False, output_attentions=True).attentions
        for p in maps:
            torch.special.entr(p).sum(-1).mean(-1)
    finally:
        case.base.plain.set_attn_implementation("sdpa")


JOBS: dict[str, Callable[[Case], Any]] = {
    job.__name__: job for job in (forward, backbone, entropy, entropy_backbone, both_backbones, both, both_with_logits, eager_maps)
}
# job, what it is measured against, how many of those it replaces, allowed ratio of time and of memory
RATIOS: tuple[tuple[str, str, int, float | None, float | None], ...] = (
    ("entropy", "forward", 1, 1.4, 1.3),
    ("entropy_backbone", "backbone", 1, 1.4, 1.3),
    ("both", "both_backbones", 1, 1.8, None),
    ("both_with_logits", "forward", 2, 1.8, None),
    ("eager_maps", "backbone", 1, None, None),
)


def build(positions: int, shape: argparse.Namespace) -> Case:
    """Make the two models and a text as long as asked."""
    config = GPT2Config(
        n_positions=positions, n_layer=shape.layers, n_head=shape.heads, n_embd=64 * shape.heads, vocab_size=shape.vocabulary
    )
    torch.manual_seed(0)
    # without the checks: they would leave pages behind that a job's memory is measured above
    base, tuned = (load(GPT2LMHeadModel(config)) for _ in range(2))
    return Case(base, tuned, torch.randint(shape.vocabulary, (1, positions)))


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Sample the process's resident memory; the value yielded returns the peak above that at entry, in bytes."""
    process = psutil.Process()
    before = process.memory_info().rss
    peak = [before]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: peak[0] - before
    finally:
        done.set()
        thread.join()


def memory_of(job: str, positions: int, shape: argparse.Namespace) -> int:
    """Measure a job's peak memory above the loaded models in a process of its own, in bytes."""
    sizes = [f"--layers={shape.layers}", f"--heads={shape.heads}", f"--vocabulary={shape.vocabulary}", f"--threads={shape.threads}"]
    command = [sys.executable, __file__, "--memory-of", job, "--positions", str(positions), *sizes]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@torch.inference_mode()
def measure_memory(job: str, positions: int, shape: argparse.Namespace) -> int:
    """Run one job once and return its peak memory above the loaded models, in bytes."""
    case = build(positions, shape)
    JOBS[job](Case(case.base, case.tuned, case.ids[:, :8]))  # thread pools and workspaces belong to nobody
    with peak_memory() as peak:
        JOBS[job](case)
    return peak()


@torch.inference_mode()
def times(case: Case, repeats: int, *jobs: str) -> list[float]:
    """Return every job's median time in seconds; the jobs take turns."""
    taken: dict[str, list[float]] = {job: [] for job in jobs}
    for repeat in range(repeats + 1):
        for job in jobs:
            start = time.perf_counter()
            JOBS[job](case)
            if repeat:  # the first round warms up
                taken[job].append(time.perf_counter() - start)
    return [statistics.median(taken[job]) for job in jobs]


def _fits(job: str, positions: int, shape: argparse.Namespace) -> bool:
    """Leave eager maps out where they would not fit."""
    needed = 1.5 * shape.layers * shape.heads * positions**2 * 4
    return job != "eager_maps" or needed < psutil.virtual_memory().available


def run(positions: int, shape: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the jobs asked for at one length; yield one row per ratio as it is known."""
    # memory first: its processes should not share the machine with this one's models
    wanted = [ratio for ratio in RATIOS if ratio[0] in shape.jobs and _fits(ratio[0], positions, shape)]
    memory = {job: memory_of(job, positions, shape) for job in dict.fromkeys(name for ratio in wanted for name in ratio[:2])}
    case = build(positions, shape)
    for job, reference, count, time_allowed, memory_allowed in wanted:
        seconds, reference_seconds = times(case, shape.repeats, job, reference)
        yield {
            "positions": positions,
            "job": job,
            "seconds": seconds,
            "memory_gib": memory[job] / GIB,
            "against": f"{count} × {reference}" if count > 1 else reference,
            "time_ratio": seconds / (count * reference_seconds),
            "allowed_time": time_allowed,
            # two models that run one after the other need the memory of one
            "memory_ratio": memory[job] / max(1, memory[reference]),
            "allowed_memory": memory_allowed,
        }


@torch.inference_mode()
def long(positions: int, shape: argparse.Namespace) -> dict[str, Any]:
    """Compare two models over one long text, logits included; return the seconds and the process's peak memory."""
    case = build(positions, shape)
    loaded = psutil.Process().memory_info().rss
    start = time.perf_counter()
    with peak_memory() as peak:
        both_with_logits(case)
    return {"positions": positions, "seconds": time.perf_counter() - start, "peak_gib": (loaded + peak()) / GIB, "loaded_gib": loaded / GIB}


HEADER = f"{'positions':>9}  {'job':<18}{'seconds':>9}{'GiB':>8}  {'against':<16}{'time ×':>8} {'':<7}{'memory ×':>9}"


def line(row: dict[str, Any]) -> str:
    """Format a row as plain text, under HEADER."""

    def allowed(limit: float | None) -> str:
        return "" if limit is None else f"≤ {limit}"

    return (
        f"{row['positions']:>9,}  {row['job']:<18}{row['seconds']:>9.3f}{row['memory_gib']:>8.3f}  {row['against']:<16}"
        f"{row['time_ratio']:>8.2f} {allowed(row['allowed_time']):<7}{row['memory_ratio']:>9.2f} {allowed(row['allowed_memory'])}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 4096], help="lengths of the text in tokens")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds after one to warm up")
    names = [ratio[0] for ratio in RATIOS]
    parser.add_argument("--jobs", nargs="+", choices=names, default=names, help="only these (default: all)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line instead of a table")
    parser.add_argument("--long", type=int, metavar="N", help="only compare two models over N tokens and print the peak memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12, help="heads of width 64")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--memory-of", choices=JOBS, help=argparse.SUPPRESS)
    shape = parser.parse_args(arguments)
    torch.set_num_threads(shape.threads)
    if shape.memory_of:
        print(measure_memory(shape.memory_of, shape.positions[0], shape))
    elif shape.long:
        found = long(shape.long, shape)
        print(
            json.dumps(found)
            if shape.json
            else f"{shape.long:,} positions, two models with divergences and logits: {found['seconds']:.0f} s, peak {found['peak_gib']:.2f} GiB"
        )
    else:
        if not shape.json:
            print(HEADER, flush=True)
        for positions in shape.positions:
            for row in run(positions, shape):
                print(json.dumps(row) if shape.json else line(row), flush=True)


if __name__ == "__main__":
    main()
