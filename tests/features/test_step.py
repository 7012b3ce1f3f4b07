"""The gradients of a step are those of dense autograd, for every rule, layout and penalty."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.features.layout import Layout
from mechscope.features.objective import checked
from mechscope.features.pre_activations import pre_activations
from mechscope.features.rules import Rule
from mechscope.features.selection import select
from mechscope.features.shared_batch import Batch
from mechscope.features.step import step
from mechscope.settings.features import Objective
from tests.features import dense_step, oracle

TOKENS = 50
CASES: dict[str, tuple[Rule, dict[str, Any]]] = {
    "relu": (Rule("relu"), {"sparsity": 0.1}),
    "relu, free norms": (Rule("relu"), {"sparsity": 0.1, "norms": "free"}),
    "relu, tanh": (Rule("relu"), {"sparsity": 0.1, "penalty": "tanh", "norms": "free"}),
    "gated": (Rule("gated"), {"sparsity": 0.1}),
    "gated, free norms": (Rule("gated"), {"sparsity": 0.1, "norms": "free"}),
    "topk": (Rule("topk", 6), {}),
    "topk by norm": (Rule("topk", 6, by_norm=True), {"norms": "free"}),
    "batchtopk": (Rule("batchtopk", 6), {}),
    "batchtopk by norm": (Rule("batchtopk", 6, by_norm=True), {"norms": "free"}),
    "jumprelu, l0": (Rule("jumprelu"), {"sparsity": 0.1, "penalty": "l0", "bandwidth": 0.5}),
    "jumprelu, target": (Rule("jumprelu"), {"sparsity": 0.1, "bandwidth": 0.5, "target": 3.0}),
    "jumprelu, tanh": (Rule("jumprelu"), {"sparsity": 0.1, "penalty": "tanh", "bandwidth": 0.5, "norms": "free"}),
}
NESTED = ("relu", "gated", "topk", "batchtopk", "jumprelu, target")
every_case = pytest.mark.parametrize("case", CASES)
every_kind = pytest.mark.parametrize("kind", ["autoencoder", "transcoder", "crosscoder", "cross-layer"])


def batch(layout: Layout) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    u = torch.randn(TOKENS, sum(layout.input_widths), generator=generator, dtype=torch.float64)
    return u, torch.randn(TOKENS, sum(layout.output_widths), generator=generator, dtype=torch.float64)


def dead_latents(layout: Layout) -> Tensor:
    return torch.arange(layout.latents) % 3 == 0


def assert_gradients_are_autograds(layout: Layout, objective: Objective, dead: Tensor | None, **options: Any) -> None:
    objective = checked(objective, layout)
    tensors = dense_step.random_tensors(layout)
    u, v = batch(layout)
    found = step(layout, tensors, u, v, objective, dead=dead, **options)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    total, f = dense_step.loss(layout, leaves, u, v, objective, dead)
    total.backward()
    assert 0 < int((f != 0).sum()) < f.numel()
    assert found.loss == pytest.approx(float(total.detach()), rel=1e-10)
    torch.testing.assert_close(found.codes.dense(), f.detach(), rtol=1e-10, atol=1e-10)
    for name, leaf in leaves.items():
        if name == "threshold" and layout.rule.name == "batchtopk":
            assert name not in found.gradients  # it follows the batches' smallest, by no gradient
            continue
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 0, f"{name} has no gradient to compare with"
        torch.testing.assert_close(found.gradients[name], leaf.grad, rtol=1e-10, atol=1e-10, msg=partial("{}: {}".format, name))


@every_kind
@every_case
def test_gradients_equal_autograd(case: str, kind: str) -> None:
    rule, options = CASES[case]
    assert_gradients_are_autograds(oracle.layouts(rule)[kind], Objective(**options), None)


@every_kind
@pytest.mark.parametrize("case", NESTED)
def test_gradients_of_auxk_equal_autograd(case: str, kind: str) -> None:
    rule, options = CASES[case]
    layout = oracle.layouts(rule)[kind]
    assert_gradients_are_autograds(layout, Objective(**options, aux_k=4), dead_latents(layout))


@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("kind", ["autoencoder", "transcoder", "crosscoder"])
@pytest.mark.parametrize("case", NESTED)
def test_gradients_of_nested_dictionaries_equal_autograd(case: str, kind: str, with_dead: bool) -> None:
    rule, options = CASES[case]
    layout = oracle.layouts(rule)[kind]
    objective = Objective(**options, prefixes=(7, 19, oracle.LATENTS), aux_k=4)
    assert_gradients_are_autograds(layout, objective, dead_latents(layout) if with_dead else None)


@pytest.mark.parametrize("case", list(CASES))
def test_auxk_moves_the_encoders_of_dead_latents_and_nothing_of_the_living(case: str) -> None:
    rule, options = CASES[case]
    layout = oracle.layouts(rule)["autoencoder"]
    u, v = batch(layout)
    tensors = dense_step.random_tensors(layout)
    dead = dead_latents(layout)
    # never active: far below every threshold
    tensors["encoder_bias"] = torch.where(dead, -50.0, tensors["encoder_bias"])
    objective = checked(Objective(**options, aux_k=4), layout)
    without, with_revival = (step(layout, tensors, u, v, objective, dead=chosen).gradients for chosen in (None, dead))
    assert not without["encoder.0"][dead].any()
    moved = with_revival["encoder.0"][dead].abs().sum(1) > 0
    assert moved.float().mean() > 0.5
    for name in ("encoder.0", "decoder.0"):
        torch.testing.assert_close(with_revival[name][~dead], without[name][~dead], rtol=0, atol=1e-12)
    assert torch.equal(with_revival["decoder_bias"], without["decoder_bias"])


@pytest.mark.parametrize("guess", [0.0, 0.5, 100.0], ids=["no guess", "a good guess", "too high"])
def test_the_largest_of_a_batch_are_chosen_exactly_whatever_was_guessed(guess: float) -> None:
    layout = oracle.layouts(Rule("batchtopk", 6))["autoencoder"]
    tensors, (u, _) = dense_step.random_tensors(layout), batch(layout)
    (pre,) = (each.clone() for each in pre_activations(layout, tensors, u))
    best = pre.flatten().topk(6 * TOKENS)
    picked = select(layout, tensors, u, None, 0.0, Batch(TOKENS), cut=guess)
    assert picked.cut == float(best.values.min())
    assert torch.equal((picked.codes.rows * layout.latents + picked.codes.latents).sort().values, best.indices.sort().values)
    assert bool((picked.codes.rows.diff() >= 0).all())


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for rule, options in CASES.values():
        layout = oracle.layouts(rule)["autoencoder"]
        tensors, (u, v) = dense_step.random_tensors(layout), batch(layout)
        objective = checked(Objective(**options, aux_k=4), layout)
        whole = step(layout, tensors, u, v, objective, dead=dead_latents(layout))
        with monkeypatch.context() as patch:
            patch.setattr("mechscope.features.pre_activations.BLOCK", 7 * layout.latents)
            parts = step(layout, tensors, u, v, objective, dead=dead_latents(layout))
        for name, gradient in whole.gradients.items():
            torch.testing.assert_close(parts.gradients[name], gradient, rtol=1e-11, atol=1e-12)


def test_terms_that_contradict_the_rule_are_refused() -> None:
    autoencoders = {name: oracle.layouts(rule)["autoencoder"] for name, (rule, _) in CASES.items()}
    for name, options, words in (
        ("topk", {"sparsity": 0.1}, "has its sparsity by k=6"),
        ("relu", {}, r"rule relu is sparse by a penalty \(l1 or tanh\), and its weight is 0: give sparsity"),
        ("gated", {}, "rule gated is sparse by a penalty"),
        ("jumprelu, target", {"target": 3.0}, "rule jumprelu is sparse by a penalty .*its weight is 0"),
        ("relu", {"sparsity": 0.1, "penalty": "target"}, "penalty 'target' does not suit rule relu: use l1 or tanh"),
        ("topk by norm", {}, "set norms='free'"),
        ("relu", {"sparsity": 0.1, "prefixes": (4, 39)}, "must rise to all 40 latents"),
        ("relu", {"sparsity": 0.1, "prefixes": (9, 4, 40)}, "must rise to all 40 latents"),
    ):
        with pytest.raises(SettingsError, match=words):
            checked(Objective(**options), autoencoders[name])
