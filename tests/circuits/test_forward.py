"""A circuit's pass equals a forward pass written out by hand, head by head and edge by edge, in every family."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mechscope.circuits import forward
from mechscope.circuits.forward import CircuitRuns
from mechscope.circuits.graph import Graph
from mechscope.circuits.sender_outputs import SenderOutputs
from mechscope.data.pairs import PairBatch, collate_pairs
from mechscope.instrument.execution import Execution
from mechscope.subject.load import Subject, load
from tests import families
from tests.causal.pairs import random_pairs
from tests.circuits.brute import FAMILIES, TOLERANCE, brute_forward, brute_metric, brute_written, read_metric

PAIRS = random_pairs(3)
TEXTS = random_pairs(4, seed=7)  # for means
PADDINGS = ["none", "right", "left"]
# what a family's configuration may change: in sequential blocks of GPT-NeoX the MLP reads the heads; Llama's maps may have biases
VARIANTS = {"gpt_neox sequential": {"use_parallel_residual": False}, "llama biased": {"attention_bias": True, "mlp_bias": True}}
KINDS = [*FAMILIES, *VARIANTS]


@lru_cache
def subject_of(kind: str) -> Subject:
    family = kind.partition(" ")[0]
    return load(families.build(family, torch.float64, **VARIANTS[kind])) if kind in VARIANTS else families.subject(family, torch.float64)


def batch_of(padding: Any) -> PairBatch:
    return collate_pairs(PAIRS.pairs[:1]) if padding == "none" else collate_pairs(PAIRS.pairs, padding=padding)


def random_edges(graph: Graph) -> Tensor:
    """Four random sets of edges, from sparse to dense, then a random soft mask."""
    generator = torch.Generator().manual_seed(5)
    hard = [(torch.rand(len(graph), generator=generator) < density).double() for density in (0.1, 0.3, 0.5, 0.9)]
    return torch.stack([*hard, torch.rand(len(graph), dtype=torch.float64, generator=generator)])


def by_hand(kind: str, edges: Tensor, *, n: int = len(PAIRS), source: str = "corrupt", metric: str = "logit-diff") -> np.ndarray:
    """Return ``(unit, text)`` metrics of the first texts from the oracle."""
    model, family = subject_of(kind).model, kind.partition(" ")[0]
    rows = [dict(zip(Graph.of(subject_of(kind)).names, row.tolist(), strict=True)) for row in edges]
    found = []
    for pair in PAIRS.pairs[:n]:
        rest = brute_written(model, family, pair.corrupt)
        if source == "zero":
            rest = {name: torch.zeros_like(value) for name, value in rest.items()}
        if source == "mean":
            seen = [brute_written(model, family, text.clean) for text in TEXTS]
            rest = {name: torch.cat([one[name] for one in seen]).mean(0, keepdim=True) for name in rest}
        found.append([brute_metric(model, family, pair, row, rest=rest, metric=metric) for row in rows])
    return np.array(found).T


@lru_cache
def random_by_hand(kind: str, source: str = "corrupt", metric: str = "logit-diff") -> np.ndarray:
    """Return the metric of no edges and of `random_edges`; texts are the same however they are padded."""
    edges = random_edges(Graph.of(subject_of(kind)))
    return by_hand(kind, torch.cat([torch.zeros_like(edges[:1]), edges]), source=source, metric=metric)


def close(found: Tensor, expected: Any, kind: str) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=TOLERANCE[kind.partition(" ")[0]])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_itself_is_the_model_with_all_edges_and_the_other_run_with_none(kind: str) -> None:
    model, family = subject_of(kind).model, kind.partition(" ")[0]
    # its own idea of the edges: GPT-NeoX and Phi read attention and MLP side by side
    names = Graph(families.LAYERS, families.HEADS, kind in ("gpt_neox", "phi")).names
    assert Graph.of(subject_of(kind)).names == names
    for pair in PAIRS:
        rest = brute_written(model, family, pair.corrupt)
        for keep, ids in ((set(names), pair.clean), (set(), pair.corrupt)):
            found = brute_forward(model, family, pair.clean, rest, keep)
            torch.testing.assert_close(found, model(torch.tensor([ids])).logits[0], rtol=0, atol=TOLERANCE[family])


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_edges_are_the_clean_run_and_none_is_the_corrupt_run(kind: str, padding: str) -> None:
    subject, batch = subject_of(kind), batch_of(padding)
    runs = CircuitRuns(subject, batch)
    clean = [read_metric(subject.model(torch.tensor([pair.clean])).logits[0], pair) for pair in batch.pairs]
    corrupt = [read_metric(subject.model(torch.tensor([pair.corrupt])).logits[0], pair) for pair in batch.pairs]
    assert np.abs(np.subtract(clean, corrupt)).min() > 0.01  # or there were nothing to tell apart
    close(runs.clean, clean, kind)
    close(runs.corrupt, corrupt, kind)
    ends = runs.run(torch.tensor([[True], [False]]).expand(-1, len(runs.graph)))
    close(ends, [clean, corrupt], kind)


@pytest.mark.parametrize("source", ["corrupt", "zero", "mean"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_random_edge_sets_and_soft_masks_equal_a_pass_by_hand(kind: str, padding: str, source: Any) -> None:
    subject, batch = subject_of(kind), batch_of(padding)
    runs = CircuitRuns(
        subject,
        batch,
        source=SenderOutputs.mean_over(subject, TEXTS, execution=Execution(tokens_per_batch=30)) if source == "mean" else source,
    )
    edges, expected = random_edges(runs.graph), random_by_hand(kind, source)[:, : len(batch.pairs)]
    close(runs.corrupt, expected[0], kind)
    close(runs.run(edges), expected[1:], kind)
    close(runs.run(edges[:4].bool()), expected[1:5], kind)
    close(runs.clean, CircuitRuns(subject, batch).clean, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_each_edge_alone_left_out_or_let_in_equals_a_pass_by_hand(kind: str) -> None:
    runs = CircuitRuns(subject_of(kind), batch_of("none"))
    some = torch.arange(len(runs.graph))[::23]
    only = torch.zeros(len(some), len(runs.graph), dtype=torch.bool)
    only[torch.arange(len(some)), some] = True
    for edges in (only, ~only):
        close(runs.run(edges), by_hand(kind, edges.double(), n=1), kind)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_circuit_reads_every_row_before_the_target(kind: str, padding: str) -> None:
    batch = batch_of(padding)
    runs = CircuitRuns(subject_of(kind), batch, "loss")
    close(runs.run(random_edges(runs.graph)), random_by_hand(kind, "corrupt", "loss")[1:, : len(batch.pairs)], kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_units_in_one_call_equal_single_calls(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = CircuitRuns(families.subject(family, torch.float64), batch_of("right"))
    # single edges that begin everywhere between sets that begin at the embedding
    edges = torch.ones(15, len(runs.graph), dtype=torch.float64)
    edges[torch.arange(10), torch.arange(10) * len(runs.graph) // 10] = 0
    edges[10:] = random_edges(runs.graph)
    edges = edges[torch.randperm(15, generator=torch.Generator().manual_seed(0))]
    singly = torch.cat([runs.run(one[None]) for one in edges])
    close(runs.run(edges), singly, family)
    close(runs.run(edges.clone().requires_grad_()), singly, family)
    # too little memory for more than one set at a time
    monkeypatch.setattr(forward, "_NUMBERS", 1)
    close(runs.run(edges), singly, family)


@pytest.mark.parametrize(
    ("family", "targets"), [("gpt2", ["c_attn", "c_proj", "c_fc"]), ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])]
)
def test_an_adapters_circuit_is_that_of_the_merged_model(family: str, targets: list[str]) -> None:
    config = LoraConfig(r=3, target_modules=targets, fan_in_fan_out=family == "gpt2", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(families.build(family, torch.float64), config, autocast_adapter_dtype=False).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    runs = CircuitRuns(load(adapted), batch_of("right"))
    edges = random_edges(runs.graph)
    names = [dict(zip(runs.graph.names, row.tolist(), strict=True)) for row in edges]
    expected = [[brute_metric(merged, family, pair, keep) for pair in PAIRS] for keep in names]
    unchanged = CircuitRuns(families.subject(family, torch.float64), batch_of("right")).run(edges)
    assert np.abs(np.subtract(expected, unchanged)).max() > 0.1
    close(runs.run(edges), expected, family)


@torch.no_grad()
def test_the_kl_of_a_circuit_is_to_the_clean_run() -> None:
    subject, batch = families.subject("gpt2", torch.float64), batch_of("right")
    runs = CircuitRuns(subject, batch, "kl")
    edges = random_edges(runs.graph)
    expected = []
    for row in edges:
        keep = dict(zip(runs.graph.names, row.tolist(), strict=True))
        for pair in batch.pairs:
            assert pair.target is not None
            rows = slice(pair.target[0] - 1, pair.target[1] - 1)
            clean = subject.model(torch.tensor([pair.clean])).logits[0, rows].log_softmax(-1)
            rest = brute_written(subject.model, "gpt2", pair.corrupt)
            found = brute_forward(subject.model, "gpt2", pair.clean, rest, keep)[rows].log_softmax(-1)
            expected.append(float((clean.exp() * (clean - found)).sum(-1).mean()))
    close(runs.clean, 0.0, "gpt2")
    close(runs.run(edges).flatten(), expected, "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_in_a_soft_mask_equals_finite_differences(family: str) -> None:
    runs = CircuitRuns(families.subject(family, torch.float64), batch_of("right"))
    weights = random_edges(runs.graph)[-1:].requires_grad_()
    (gradient,) = torch.autograd.grad(runs.run(weights)[:, 1].sum(), weights)
    # rounding of 6e-8 in float32 norms needs a larger step than float64's, and leaves an error of about 1e-4
    exact = TOLERANCE[family] < 1e-6
    step, tolerance = (1e-5, 1e-7) if exact else (1e-3, 2e-3)
    some = range(0, len(runs.graph), 13)
    nudged = weights.detach().repeat(2 * len(some), 1)
    for row, edge in enumerate(some):
        nudged[2 * row, edge] += step
        nudged[2 * row + 1, edge] -= step
    values = runs.run(nudged)[:, 1]
    np.testing.assert_allclose(gradient[0, ::13], (values[::2] - values[1::2]) / (2 * step), rtol=0, atol=tolerance)
    assert gradient.abs().max() > 0.01
