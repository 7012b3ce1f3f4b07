"""What commands that run on prompt pairs are asked to do: sweeps of interventions, and circuits.

As in `mechscope.studies.settings`, every field is a flag and a key of `study.yaml`, and nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mechscope.studies.settings import ModelSettings, setting


@dataclass(frozen=True, kw_only=True)
class PairsSettings(ModelSettings):
    """Which texts an intervention runs on."""

    pairs: str | None = setting(
        None,
        "Prompt pairs: a JSONL file (clean, corrupt, answers, wrong_answers), a generated task (ioi, greater_than, docstring, induction), "
        "newsroom:ROLE (who, what, where, when, count), or salience:DOCUMENTS (with summaries; the corrupt text lacks the salient sentence).",
    )
    limit: int | None = setting(None, "Pairs at most; generated tasks make 100 by default.")
    max_tokens: int = setting(512, "Most tokens of a text that is made from a document and its summary.")
    on_problem: Literal["skip", "error"] = setting("error", "Pairs that cannot be used: skip and count them, or stop with an error.")
    tokens_per_batch: int = setting(1024, "Tokens of a batch of texts, padding included; decides the memory.")
    seed: int = setting(0, "Seed of generated pairs, resampling and bootstrap.")


@dataclass(frozen=True, kw_only=True)
class PairSettings(PairsSettings):
    """Which model's components a sweep changes."""

    model: str = setting(..., "The model: hub id, directory, or adapter.")
    components: str | None = setting(None, 'Only these, e.g. "a3.h5,m3" or "layers:2,3"; by default all.')


@dataclass(frozen=True, kw_only=True)
class PatchSettings(PairSettings):
    """`mechscope patch`: Activation patching: put one run's values into another, place by place, and see what it does."""

    site: str = setting("head", "What is patched: head, query, key, value, pattern, attention, mlp, neuron, residual, embedding.")
    metric: str = setting("logit-diff", "Metric: logit-diff, probability, loss (of a target span), kl (to the clean run).")
    direction: Literal["denoise", "noise"] = setting("denoise", "Clean values into the corrupt run (denoise) or the reverse (noise).")
    positions: str = setting("all", "Tokens: all, last, changed, each, a segment, or several segments or numbers joined by commas.")
    method: Literal["exact", "attribution"] = setting("exact", "Patch every place, or estimate all from one backward pass.")
    check: int = setting(0, "With attribution: places that are also patched exactly, to report the estimate's error.")


@dataclass(frozen=True, kw_only=True)
class AblateSettings(PairSettings):
    """`mechscope ablate`: Ablation: take heads and MLPs out, one at a time, and see what it costs."""

    data: str | None = setting(None, "Instead of pairs: documents with summaries, ablated with the loss on the summary.")
    documents: int = setting(32, "Documents to run on, with --data.")
    sites: str = setting("head,mlp", "What is ablated, joined by commas: head, mlp, attention, ….")
    source: Literal["zero", "mean", "resample", "corrupt"] = setting("mean", "What stands in for an ablated component.")
    mode: Literal["each", "keep"] = setting("each", "Leave one out, or keep only one.")
    metric: str | None = setting(None, "Metric; by default loss with --data and logit-diff with --pairs.")


@dataclass(frozen=True, kw_only=True)
class DiscoverySettings:
    """How a circuit is found and judged."""

    method: str = setting(
        "eap-ig", "How edges are scored: eap, eap-ig, eap-ig-activations, clean-corrupted, exact, acdc, edge-pruning, flow-routes."
    )
    steps: int = setting(5, "Points of integrated gradients.")
    points: Literal["left", "midpoint"] = setting("left", "Where they lie: left (as EAP-IG's authors) or midpoint.")
    source: Literal["corrupt", "mean", "zero"] = setting("corrupt", "What closed edges carry: the corrupt run's values, means, or zero.")
    rule: Literal["top", "greedy"] = setting("top", "How edges are chosen: the strongest, or greedily from the logits.")
    by: Literal["edges", "nodes"] = setting("edges", "What is chosen: edges, or nodes with all edges among them.")
    sign: Literal["absolute", "helpful"] = setting("absolute", "Strongest by absolute score, or by how much an edge helps the metric.")
    circuit_edges: int | None = setting(None, "Edges of the circuit, before dead ends are removed.")
    circuit_fraction: float | None = setting(None, "The same as a share of all edges.")
    faithful: float = setting(
        0.9,
        "Without either: the smallest size (of 0.1 % to 100 % of edges) whose faithfulness f, on the pairs that find it, is this near the model's: "
        "|1 - f| at most 1 - this.",
    )
    held_out: float = setting(0.5, "Share of the pairs that only judge and are not used to find the circuit; 0 for all in both.")
    random_circuits: int = setting(10, "Random circuits of every size, as controls.")
    circuit_resamples: int = setting(50, "Halvings and resamples of the pairs, for the model's own noise.")
    criteria: bool = setting(True, "Completeness and minimality of the circuit.")


@dataclass(frozen=True, kw_only=True)
class CircuitSettings(PairsSettings, DiscoverySettings):
    """`mechscope circuit`: Find the circuit that does a task: score every edge, choose, and judge it beside random circuits."""

    model: str = setting(..., "The model: hub id, directory, or adapter.")
    metric: str = setting("logit-diff", "Metric: logit-diff, probability, loss (of a target span), kl (to the clean run).")
    tokens_per_batch: int = setting(256, "Tokens of a batch of texts, padding included; decides the memory.")


@dataclass(frozen=True, kw_only=True)
class CircuitDiffSettings(PairsSettings, DiscoverySettings):
    """`mechscope circuit-diff`: Compare a task's circuit before and after fine-tuning: overlap, shifts, and which tuned edges carry the gain."""

    base: str = setting(..., "The pre-trained model: hub id, directory, or adapter.")
    tuned: str = setting(..., "The fine-tuned model or adapter.")
    metric: str = setting("logit-diff", "Metric: logit-diff, probability, loss (of a target span), kl (to the clean run).")
    tokens_per_batch: int = setting(256, "Tokens of a batch of texts, padding included; decides the memory.")
    checkpoints: str | None = setting(None, "Models on the way from base to tuned, in order, joined by commas: the circuit over time.")
    resize: Literal["refuse", "truncate"] = setting("refuse", "Vocabularies of different size: refuse, or compare the shared tokens.")
