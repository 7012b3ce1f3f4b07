"""What circuits cost, beside the model's own forward pass, and beside the code of EAP-IG's authors where it is installed.

The model is that of `patching.py`, with all its 32,491 edges. Every job has its own process: its peak memory above the loaded models is taken first,
then it takes turns with the plain forward pass, logits included, of the same batch; what counts is the ratio of medians. The peers (`eap` of Hanna
et al. 2024, and TransformerLens before 4.0, which it is written for) are no dependencies: without them their jobs are left out by name. Where they
run, on a copy of the model and with set-up not counted, their scores are compared with mechscope's.

    python benchmarks/circuits.py
    python benchmarks/circuits.py --jobs eap eap_ig --repeats 3
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from attention_statistics import GIB, peak_memory
from patching import Case, build, forward
from torch.overrides import TorchFunctionMode

from mechscope.circuits.attribution import Method, attribute_edges
from mechscope.circuits.forward import CircuitRuns
from mechscope.circuits.graph import Graph
from mechscope.data.pairs import Pairs, collate_pairs

PACKAGES = ("torch", "transformers", "mechscope", "transformer_lens")
STEPS = 5


def eap(case: Case) -> None:
    """Score every edge by attribution patching."""
    attribute_edges(case.subject, case.pairs, method="eap")


def eap_ig(case: Case) -> None:
    """Score every edge by attribution patching with gradients integrated over inputs."""
    attribute_edges(case.subject, case.pairs, method="eap-ig", steps=STEPS)


def evaluate(case: Case) -> None:
    """Run the model with a random half of the edges, both runs of the batch at hand."""
    with torch.no_grad():
        _prepared(case).run(_half(case))


def prepare_and_evaluate(case: Case) -> None:
    """Run the model with a random half of the edges, from the texts on."""
    with torch.no_grad():
        CircuitRuns(case.subject, collate_pairs(tuple(case.pairs))).run(_half(case))


@lru_cache(maxsize=1)
def _prepared(case: Case) -> CircuitRuns:
    return CircuitRuns(case.subject, collate_pairs(tuple(case.pairs)))


@lru_cache(maxsize=1)
def _half(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    graph = Graph(case.subject.anatomy.n_layers, case.subject.anatomy.n_heads)
    return torch.rand(1, len(graph), generator=generator) < 0.5


def reference_eap(case: Case) -> None:
    """Score every edge by the authors' code."""
    _reference(case, "EAP")


def reference_eap_ig(case: Case) -> None:
    """Score every edge by the authors' code, gradients integrated over inputs."""
    _reference(case, "EAP-IG-inputs")


class _OnCpu(TorchFunctionMode):
    """Creates on the CPU what the authors' code asks to be created on a GPU."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        asked = kwargs or {}
        return func(*args, **(asked | {"device": "cpu"} if asked.get("device") == "cuda" else asked))


def _reference(case: Case, method: str) -> np.ndarray:
    """Return the authors' scores ``(sender, receiver)``; their order of nodes is that of `Graph`."""
    peer: Any = importlib.import_module("eap.attribute")
    model, graph = _hooked(case.subject.plain)

    def tokens(_: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        return ids, torch.ones_like(ids), torch.full((len(ids),), ids.shape[1]), ids.shape[1]

    def metric(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.stack(
            [logits[at, -1, pair.answers[0]] - logits[at, -1, pair.wrong_answers[0]] for at, pair in enumerate(case.pairs)]
        ).sum()

    peer.tokenize_plus = tokens  # the texts are token ids already
    batch = collate_pairs(tuple(case.pairs))
    with _OnCpu():
        peer.attribute(model, graph, [(batch.clean, batch.corrupt, None)], metric, method, ig_steps=STEPS, quiet=True)
    return graph.scores.numpy()


@lru_cache(maxsize=1)
def _hooked(model: Any) -> tuple[Any, Any]:
    """Copy the weights, as they are, into the kind of model the authors' code runs, and make its graph."""
    peer = importlib.import_module("transformer_lens")
    convert = importlib.import_module("transformer_lens.pretrained.weight_conversions").convert_gpt2_weights
    config = model.config
    made = peer.HookedTransformer(
        peer.HookedTransformerConfig(
            n_layers=config.n_layer,
            n_heads=config.n_head,
            d_model=config.n_embd,
            d_head=config.n_embd // config.n_head,
            d_mlp=4 * config.n_embd,
            d_vocab=config.vocab_size,
            n_ctx=config.n_positions,
            act_fn="gelu_new",
            normalization_type="LN",
            eps=config.layer_norm_epsilon,
            dtype=model.dtype,
            device="cpu",
            use_attn_result=True,
            use_split_qkv_input=True,
            use_hook_mlp_in=True,
        )
    )
    as_is = dict.fromkeys(("fold_ln", "fold_value_biases", "center_writing_weights", "center_unembed"), False)
    made.load_and_process_state_dict(convert(model, made.cfg), **as_is)
    return made, importlib.import_module("eap.graph").Graph.from_model(made)


def missing() -> list[str]:
    """Name the peers that are not installed."""
    found = [name for name in ("eap", "transformer_lens") if importlib.util.find_spec(name) is None]
    if "transformer_lens" not in found and int(importlib.metadata.version("transformer_lens").partition(".")[0]) >= 4:
        found.append("transformer_lens before 4.0")
    return found


@dataclass(frozen=True)
class Job:
    """A job, its texts, and what it may cost.

    Attributes:
        run: Does it.
        texts: How many.
        tokens: Of each.
        passes: Most forward passes, if there is a target.
        gib: Most memory above the model, likewise.
        method: For the authors' code: mechscope's name of the method, and theirs.
    """

    run: Callable[[Case], None]
    texts: int = 16
    tokens: int = 16
    passes: float | None = None
    gib: float | None = None
    method: tuple[Method, str] | None = None


JOBS = {
    "eap": Job(eap, passes=4.5),
    "eap_ig": Job(eap_ig, passes=14),
    "eap_ig_long": Job(eap_ig, 8, 128, gib=1.2),
    "evaluate": Job(evaluate, passes=3),
    "prepare_and_evaluate": Job(prepare_and_evaluate),
    "reference_eap": Job(reference_eap, method=("eap", "EAP")),
    "reference_eap_ig": Job(reference_eap_ig, method=("eap-ig", "EAP-IG-inputs")),
}


def measure(name: str, shape: argparse.Namespace) -> dict[str, Any]:
    """Take a job's peak memory, then time it in turns with the forward pass."""
    job = JOBS[name]
    case = build(job.texts, job.tokens, shape)
    job.run(_small(case))  # thread pools, workspaces and copies of the model belong to nobody
    with peak_memory() as peak:
        job.run(case)
    memory = peak() / GIB
    taken: tuple[list[float], list[float]] = ([], [])
    for repeat in range(shape.repeats + 1):
        for run, times, kept in ((forward, shape.passes, taken[0]), (job.run, 1, taken[1])):
            for _ in range(times):  # a pass takes less than the job: more of them make its median as sure
                start = time.perf_counter()
                run(case)
                if repeat:  # the first round warms up
                    kept.append(time.perf_counter() - start)
    one, seconds = map(statistics.median, taken)
    row = {"job": name, "texts": job.texts, "tokens": job.tokens, "seconds": seconds, "forward": one, "ratio": seconds / one}
    row |= {"allowed": job.passes, "memory_gib": memory, "allowed_memory": job.gib}
    return row if job.method is None else row | agreement(case, *job.method)


def _small(case: Case) -> Case:
    pairs = (replace(pair, clean=pair.clean[:8], corrupt=pair.corrupt[:8], target=(1, 8)) for pair in case.pairs.first(2))
    return Case(case.subject, Pairs(tuple(pairs), case.pairs.source))


def agreement(case: Case, method: Method, theirs: str) -> dict[str, float]:
    """Compare scores: the largest relative difference among edges above a thousandth of the largest score, and the correlation of all."""
    found = attribute_edges(case.subject, case.pairs, method=method, steps=STEPS)
    expected = found.graph.flat(_reference(case, theirs))
    counted = np.abs(expected) > 1e-3 * np.abs(expected).max()
    relative = np.abs(found.mean - expected)[counted] / np.abs(expected)[counted]
    return {
        "relative": float(relative.max()),
        "compared": int(counted.sum()),
        "correlation": float(np.corrcoef(found.mean, expected)[0, 1]),
    }


def apart(name: str, shape: argparse.Namespace) -> dict[str, Any]:
    """Measure a job in a process of its own."""
    options = [f"--{option}={value}" for option, value in vars(shape).items() if option not in ("jobs", "json", "here")]
    command = [sys.executable, __file__, "--jobs", name, "--json", "--here", *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


HEADER = f"{'job':<22}{'texts × tokens':>16}{'seconds':>10}{'forward':>10}{'passes':>9} {'':<7}{'GiB':>8}"


def line(row: dict[str, Any]) -> str:
    """Format a row as plain text, under HEADER."""

    def allowed(limit: float | None) -> str:
        return "" if limit is None else f"≤ {limit:g}"

    size = f"{row['texts']} × {row['tokens']}"
    compared = (
        f"  scores differ by at most {row['relative']:.1e} of {row['compared']:,} edges', correlation {row['correlation']:.9f}"
        if "relative" in row
        else ""
    )
    return (
        f"{row['job']:<22}{size:>16}{row['seconds']:>10.3f}{row['forward']:>10.4f}{row['ratio']:>9.2f} {allowed(row['allowed']):<7}"
        f"{row['memory_gib']:>8.3f} {allowed(row['allowed_memory'])}{compared}"
    ).rstrip()


def versions(threads: int) -> str:
    """Say what is measured: versions and threads."""
    parts = [f"python {platform.python_version()}"]
    parts += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if importlib.util.find_spec(name) is not None]
    return ", ".join([*parts, f"{threads} threads"])


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="only these (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds after one to warm up")
    parser.add_argument("--passes", type=int, default=5, help="forward passes per round")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line instead of a table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12, help="heads of width 64")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    shape = parser.parse_args(arguments)
    absent = missing()
    if not shape.json:
        print(versions(shape.threads))
        print(f"peers not installed: {', '.join(absent) or 'none'}")
        print(HEADER, flush=True)
    if shape.here:
        torch.set_num_threads(shape.threads)
    for name in shape.jobs:
        if absent and JOBS[name].method is not None:
            continue
        row = measure(name, shape) if shape.here else apart(name, shape)
        print(json.dumps(row) if shape.json else line(row), flush=True)


if __name__ == "__main__":
    main()
