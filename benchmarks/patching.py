"""What interventions cost, beside the model's own forward pass.

A GPT-2-small-shaped model with random weights (speed does not depend on the values) in float32 on two threads. Every job takes turns with the plain
forward pass, logits included, of the same batch; what counts is the ratio of medians. A peer that is not installed is named as absent.

    python benchmarks/patching.py
    python benchmarks/patching.py --jobs heads --repeats 3
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mechscope.causal import ablate, attribute, patch
from mechscope.data.pairs import Pairs, from_tokens
from mechscope.instrument import record
from mechscope.subject.load import Subject, load

PEERS = ("transformer_lens", "nnsight")


@dataclass(frozen=True, eq=False)
class Case:
    """The model and the texts of a job."""

    subject: Subject
    pairs: Pairs

    @property
    def ids(self) -> torch.Tensor:
        """The clean texts as one batch."""
        return torch.tensor([pair.clean for pair in self.pairs])


def forward(case: Case) -> None:
    """Run the plain forward pass, logits included."""
    with torch.no_grad():
        case.subject.plain(case.ids, use_cache=False)


def heads(case: Case) -> None:
    """Patch every head, clean into corrupt, with the logit difference at the last token."""
    patch(case.subject, case.pairs, site="head")


def loop(case: Case) -> None:
    """Patch every head by one forward pass each, as a loop over hooks does."""
    with torch.no_grad():
        with record(case.subject, "z") as clean:
            case.subject.plain(case.ids, use_cache=False)
        corrupt = torch.tensor([pair.corrupt for pair in case.pairs])
        width = case.subject.anatomy.d_head
        for layer, block in enumerate(case.subject.anatomy.blocks):
            for head in range(case.subject.anatomy.n_heads):
                where = slice(head * width, (head + 1) * width)

                def hook(_: Any, args: Any, layer: int = layer, where: slice = where) -> Any:
                    z = args[0].clone()
                    z[..., where] = clean["z", layer].flatten(2)[..., where]
                    return (z, *args[1:])

                handle = block.output.module.register_forward_pre_hook(hook)
                case.subject.plain(corrupt, use_cache=False)
                handle.remove()


def transformer_lens(case: Case) -> None:
    """Patch every head by TransformerLens on a copy of the model, one forward pass each; set-up is not counted (see `_bridge`)."""
    bridge = _bridge(case)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(case.ids, names_filter=lambda name: name.endswith("hook_z"))
        corrupt = torch.tensor([pair.corrupt for pair in case.pairs])
        for layer in range(case.subject.anatomy.n_layers):
            name = f"blocks.{layer}.attn.hook_z"
            for head in range(case.subject.anatomy.n_heads):

                def put(z: torch.Tensor, hook: Any, name: str = name, head: int = head) -> torch.Tensor:
                    z[:, :, head] = cache[name][:, :, head]
                    return z

                bridge.run_with_hooks(corrupt, fwd_hooks=[(name, put)])


@lru_cache(maxsize=1)
def _bridge(case: Case) -> Any:
    """Wrap a copy of the model for TransformerLens; it rewires the model it is given, and reads a configuration from a folder."""
    peer = importlib.import_module("transformer_lens.model_bridge")  # only where it is installed
    with tempfile.TemporaryDirectory() as folder:
        case.subject.plain.config.save_pretrained(folder)
        return peer.TransformerBridge.boot_transformers(folder, hf_model=copy.deepcopy(case.subject.plain), device="cpu")


def ablation(case: Case) -> None:
    """Ablate every head and MLP, one at a time, with the loss of every token."""
    ablate(case.subject, case.pairs)


def attribution(case: Case) -> None:
    """Attribute the logit difference to every head."""
    attribute(case.subject, case.pairs)


def recording(case: Case) -> None:
    """Record every residual stream, z and MLP output during the forward pass."""
    with torch.no_grad(), record(case.subject, "residual", "z", "mlp_output"):
        case.subject.plain(case.ids, use_cache=False)


# job, texts, tokens, most forward passes it may cost
JOBS: dict[str, tuple[Callable[[Case], None], int, int, float | None]] = {
    "heads": (heads, 8, 16, 42),
    "loop": (loop, 8, 16, None),
    "transformer_lens": (transformer_lens, 8, 16, None),
    "ablation": (ablation, 8, 64, 105),
    "attribution": (attribution, 8, 16, 3),
    "recording": (recording, 8, 64, 1.15),
}


def build(texts: int, tokens: int, shape: argparse.Namespace) -> Case:
    """Make the model and random pairs."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=shape.layers, n_head=shape.heads, n_embd=64 * shape.heads, vocab_size=shape.vocabulary)
    clean, corrupt = (torch.randint(shape.vocabulary, (texts, tokens)) for _ in range(2))
    pairs = from_tokens(clean, corrupt)
    answered = tuple(replace(pair, answers=(1,), wrong_answers=(2,)) for pair in pairs)
    return Case(load(GPT2LMHeadModel(config)), Pairs(answered, "random"))


def measure(name: str, shape: argparse.Namespace) -> dict[str, Any]:
    """Time a job in turns with the forward pass."""
    job, texts, tokens, allowed = JOBS[name]
    case = build(texts, tokens, shape)
    taken: dict[str, list[float]] = {"forward": [], name: []}
    for repeat in range(shape.repeats + 1):
        for _ in range(shape.passes):  # a pass takes less than the job: more of them make its median as sure
            start = time.perf_counter()
            forward(case)
            if repeat:
                taken["forward"].append(time.perf_counter() - start)
        start = time.perf_counter()
        job(case)
        if repeat:  # the first round warms up
            taken[name].append(time.perf_counter() - start)
    seconds, one = statistics.median(taken[name]), statistics.median(taken["forward"])
    return {"job": name, "texts": texts, "tokens": tokens, "seconds": seconds, "forward": one, "ratio": seconds / one, "allowed": allowed}


HEADER = f"{'job':<18}{'texts × tokens':>16}{'seconds':>10}{'forward':>10}{'passes':>9}"


def line(row: dict[str, Any]) -> str:
    """Format a row as plain text, under HEADER."""
    allowed = "" if row["allowed"] is None else f"  ≤ {row['allowed']:g}"
    size = f"{row['texts']} × {row['tokens']}"
    return f"{row['job']:<18}{size:>16}{row['seconds']:>10.3f}{row['forward']:>10.4f}{row['ratio']:>9.2f}{allowed}"


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
    shape = parser.parse_args(arguments)
    torch.set_num_threads(shape.threads)
    if not shape.json:
        absent = [name for name in PEERS if importlib.util.find_spec(name) is None]
        print(f"peers not installed: {', '.join(absent) or 'none'}")
        print(HEADER, flush=True)
    for name in shape.jobs:
        if name in PEERS and importlib.util.find_spec(name) is None:
            continue
        row = measure(name, shape)
        print(json.dumps(row) if shape.json else line(row), flush=True)


if __name__ == "__main__":
    main()
