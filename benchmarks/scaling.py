"""How the cost of a difference grows: one factor at a time around a small model, each point in a process of its own, and a line through the logarithms.

A slope of 1 means proportional growth, 0 none. The time of a difference has two parts, which are kept apart: what documents take, and the comparison of
weights (with the making of tables), which is done once. What large models need follows by arithmetic from these constants and the size of the model; how fast
a device runs plain forward passes is the one number that is assumed there, because it was not measured here.

    python -m benchmarks scale --out benchmarks/results/scaling.json      measure, and write docs/scaling.md
    python -m benchmarks.scaling '{"layers": 4, …}'                       one point, started by the command above
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks.processes import ROOT, environment, last_line
from benchmarks.settings import BenchmarkError, Settings
from mechscope.instrument.execution import Execution

GIB = 2**30
BLOCKS = ("scaling", "large")
"""The page's blocks: what was measured, and the arithmetic that rests on it."""


@dataclass(frozen=True)
class Point:
    """One difference of two random models over random documents.

    Attributes:
        factor: What is varied.
        layers: Blocks of either model.
        heads: Heads of width 64.
        vocabulary: Words.
        documents: How many.
        tokens: Of each document.
        per_batch: Documents in a batch.
        ranks: Processes, of one thread each.
    """

    factor: str = "base"
    layers: int = 4
    heads: int = 8
    vocabulary: int = 5000
    documents: int = 16
    tokens: int = 256
    per_batch: int = 4
    ranks: int = 1


FACTORS: dict[str, tuple[str, Sequence[int]]] = {
    "tokens": ("tokens of a document", (128, 256, 512, 1024)),
    "layers": ("layers", (2, 4, 8)),
    "heads": ("heads, and width with them", (2, 4, 8)),
    "documents": ("documents", (16, 32, 64)),
    "ranks": ("ranks", (1, 2)),
}


def points(smallest: bool = False) -> list[Point]:
    """Return what is measured.

    Args:
        smallest: Only two tiny points of every factor, to see that it works.
    """
    base = Point(layers=1, heads=1, vocabulary=50, documents=4, tokens=16, per_batch=2) if smallest else Point()
    found = []
    for name, (_, values) in FACTORS.items():
        for value in values[:2] if smallest else values:
            value = value // 64 if smallest and name == "tokens" else value
            special: dict[str, Any] = {}
            if not smallest and name == "tokens":
                special = {"documents": 8, "per_batch": 1}
            if not smallest and name == "ranks":
                special = {"documents": 64}
            found.append(replace(base, **{"factor": name, name: value, **special}))
    return found


def measured(point: Point) -> dict[str, Any]:
    """Measure a point, in this process or as one of its ranks: seconds of both parts of a difference and of both models' plain passes, and memory."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from benchmarks.watch import Watch
    from mechscope import ranks
    from mechscope.data.prompt import Encoded, Example, batches
    from mechscope.difference import difference
    from mechscope.subject.load import load
    from mechscope.subject.pair import pair

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=point.layers, n_head=point.heads, n_embd=64 * point.heads, vocab_size=point.vocabulary, n_positions=max(16, point.tokens)
    )
    both = pair(*(load(GPT2LMHeadModel(config).eval()) for _ in range(2)))
    length = point.tokens
    ids = torch.randint(point.vocabulary, (point.documents, length)).tolist()
    examples = tuple(Example(str(n), tuple(text), (1, length // 2), (length // 2, length), False) for n, text in enumerate(ids))
    tokens, replicates = point.per_batch * length, 50
    with ranks.alone():
        difference(both, Encoded(examples[:1], {}), replicates=replicates, execution=Execution(tokens_per_batch=tokens))  # warms up
    ranks.wait()
    own, after = Watch(memory=True), Watch()

    def progress(label: str, done: int, total: int) -> None:
        if label == "comparing weights" and not after.started:
            after.start()

    with own:
        difference(both, Encoded(examples, {}), replicates=replicates, execution=Execution(tokens_per_batch=tokens, progress=progress))
        ranks.wait()
    after.stop()
    plain = Watch()
    if ranks.size() == 1:
        with plain, torch.inference_mode():
            for batch in batches(examples, tokens_per_batch=tokens, pad_id=0):
                for subject in (both.base, both.tuned):
                    subject.plain(batch.input_ids, use_cache=False)
    return {
        **asdict(point),
        "seconds": own.seconds - after.seconds,
        "weights_seconds": after.seconds,
        "plain_seconds": plain.seconds,
        "memory_gib": max(ranks.exchange(own.peak)) / GIB,
    }


def measure_apart(point: Point) -> dict[str, Any]:
    """Measure a point in processes of its own.

    Raises:
        BenchmarkError: One of them failed.
    """
    # torchrun ends the others where one rank dies
    launcher = [] if point.ranks == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={point.ranks}", "-m"]
    command = [sys.executable, "-m", *launcher, "benchmarks.scaling", json.dumps(asdict(point))]
    done = subprocess.run(command, cwd=ROOT, env=environment(Settings(threads=1)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"scaling, {point.factor}: {last_line(done.stderr) or f'a process ended with code {done.returncode}'}")
    return json.loads(done.stdout.splitlines()[-1])


def run(wanted: Iterable[Point], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Measure points one after another, yielding each as it is done."""
    for point in wanted:
        start = time.perf_counter()
        record = measure_apart(point)
        say(
            f"{point.factor:<12}{getattr(point, point.factor):>6,}{record['seconds']:>12.2f} s, weights {record['weights_seconds']:.2f} s"
            f"{record['memory_gib']:>9.3f} GiB   ({time.perf_counter() - start:.0f} s with loading)"
        )
        yield record


def slope(records: Sequence[dict[str, Any]], factor: str, measure: str) -> float:
    """Return the exponent of growth: the slope of a line through the logarithms."""
    x = np.log([record[factor] for record in records])
    y = np.log([max(record[measure], 1e-9) for record in records])
    return float(np.polyfit(x, y, 1)[0])


def blocks(head: Mapping[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the blocks of the page: what was measured, and the arithmetic that rests on it."""
    machine = head["machine"]
    where = (
        f"Measured on {head['date']} with `{head['command']}` on {machine['cpu']}, {machine['cores']} cores (load {machine['load']} at the start); "
        f"{', '.join(f'{name} {version}' for name, version in head['versions'].items())}."
    )
    texts = f"\n{where}\n{growth(records)}\n", arithmetic(*constants(records)) + "\n"
    return dict(zip(BLOCKS, texts, strict=True))


def growth(records: Sequence[dict[str, Any]]) -> str:
    """Return the points and exponents as markdown."""
    columns = (
        "factor",
        "measured at",
        "seconds of documents",
        "beside both plain passes",
        "seconds of weights",
        "GiB above the models",
        "exponent of documents' time",
        "of weights' time",
        "of memory",
    )
    lines = ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, (what, _) in FACTORS.items():
        chosen = [record for record in records if record["factor"] == name]
        if len(chosen) < 2:
            continue
        ratios = [record["seconds"] / record["plain_seconds"] if record["plain_seconds"] else None for record in chosen]
        cells = [
            what,
            ", ".join(f"{record[name]:,}" for record in chosen),
            ", ".join(f"{record['seconds']:.2f}" for record in chosen),
            ", ".join("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            ", ".join(f"{record['weights_seconds']:.2f}" for record in chosen),
            ", ".join(f"{record['memory_gib']:.3f}" for record in chosen),
            *(f"{slope(chosen, name, measure):.2f}" for measure in ("seconds", "weights_seconds", "memory_gib")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    whole = {record["ranks"]: record["seconds"] + record["weights_seconds"] for record in records if record["factor"] == "ranks"}
    for number in sorted(whole)[1:]:
        lines += [
            "",
            f"The whole difference, weights included, by {number} ranks is {whole[1] / whole[number]:.2f} times as fast as by one.",
        ]
    return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Large:
    """A large model's shape, for the arithmetic.

    Attributes:
        name: What it is called.
        parameters: Of one model.
        layers: Blocks.
        heads: Query heads of a block.
        width: Of the residual stream.
    """

    name: str
    parameters: float
    layers: int
    heads: int
    width: int


LARGE = (Large("7B", 6.7e9, 32, 32, 4096), Large("70B", 69e9, 80, 64, 8192))
# assumed, not measured: a third of a current accelerator's dense bfloat16 peak, in operations per second, and its memory
_RATE, _DEVICE_GIB = 3.3e14, 80
_DOCUMENTS, _TOKENS, _BATCH = 100_000, 1024, 16_384


def arithmetic(ratio: float, per_width: float, per_weight: float) -> str:
    """Return what large models need for 100,000 documents, as markdown.

    Args:
        ratio: Time of a difference over documents in both models' plain passes.
        per_width: Bytes above the models per token of a batch and unit of width.
        per_weight: Seconds of comparing weights per parameter and unit of width.
    """
    columns = (
        "model",
        "weights of both, bfloat16",
        "a batch of 16,384 tokens",
        "statistics kept",
        "devices",
        "device-hours",
        "one machine of 8",
        "weights, hours of one core",
    )
    lines = ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for model in LARGE:
        weights = 2 * 2 * model.parameters / GIB
        batch = per_width * _BATCH * model.width / GIB
        # moments (3 arrays) of 13 measures and 200 replicates of 2 (2 arrays), of 3 kinds of rows, in float64; pooled states of 300 documents
        kept = (8 * 3 * model.layers * model.heads * (3 * 13 + 2 * 2 * 200) + 4 * 300 * 2 * 3 * model.layers * model.width) / GIB
        devices = int(np.ceil((weights + batch) / (0.9 * _DEVICE_GIB)))
        # the parts of a model work one after the other, so a rank is as fast as one of its devices
        hours = 2 * 2 * model.parameters * _TOKENS * _DOCUMENTS * ratio / _RATE / 3600
        ranks = max(1, 8 // devices)
        compared = per_weight * model.parameters * model.width / 3600
        cells = (model.name, f"{weights:.0f} GiB", f"{batch:.1f} GiB", f"{kept:.1f} GiB", f"{devices} a rank", f"{hours * devices:.0f}")
        lines.append("| " + " | ".join((*cells, f"{ranks} rank{'s' * (ranks > 1)}, {hours / ranks:.1f} h", f"{compared:.1f}")) + " |")
    lines += [
        "",
        f"{_DOCUMENTS:,} documents of {_TOKENS:,} tokens. Operations: 2 per parameter and token, two models, times {ratio:.2f} (documents' time in plain"
        f" passes, measured above). Assumed, not measured: {_RATE:.1e} operations per second and {_DEVICE_GIB} GiB per device. Parts of a model that lie"
        " on several devices (`--device spread`) work one after the other, so a rank is as fast as one device. Weights are compared once, in float64, at a"
        " cost of parameters times width (products and eigenvalues of matrices): these are this CPU's hours, shared among ranks; a GPU's were not"
        " measured.",
        "",
    ]
    return "\n".join(lines)


def constants(records: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """Return the arguments of `arithmetic`: the ratio at documents of the length it is about, the weights' seconds at the most layers."""
    by_tokens = [record for record in records if record["factor"] == "tokens"]
    at = next(record for record in by_tokens if record["tokens"] == _TOKENS)
    amounts = [record["per_batch"] * record["tokens"] * 64 * record["heads"] for record in by_tokens]
    taken = [record["memory_gib"] * GIB for record in by_tokens]
    deepest = [record for record in records if record["factor"] == "layers"][-1]
    width = 64 * deepest["heads"]
    parameters = width * (12 * width * deepest["layers"] + deepest["vocabulary"])
    return (
        at["seconds"] / at["plain_seconds"],
        float(np.polyfit(amounts, taken, 1)[0]),
        deepest["weights_seconds"] / (parameters * width),
    )


if __name__ == "__main__":
    found = measured(Point(**json.loads(sys.argv[1])))
    from mechscope import ranks

    if ranks.is_first():
        print(json.dumps(found))
