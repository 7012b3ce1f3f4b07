"""Whole techniques on CUDA equal those on the CPU.

Tolerances, relative to the largest value of each array: 1e-4 in float32 (another order of summation). In bfloat16 a model's own rounding differs between
devices: 3e-2 of activations and of statistics, which is some units in the last of bfloat16's eight bits after three blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mechscope import causal, circuits, lens
from mechscope.difference import measure
from mechscope.instrument import check_subject, model_inputs, record
from mechscope.instrument.record import SITES
from mechscope.subject.load import Subject, load
from mechscope.subject.pair import Pair, pair
from tests import families
from tests.devices import FAMILIES, assert_same, batch, prompts, spread

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
PROMPTS = prompts()
TECHNIQUES: dict[str, Callable[[Pair], Any]] = {
    "patch": lambda models: causal.patch(models.base, PROMPTS).values,
    "patch patterns": lambda models: causal.patch(models.base, PROMPTS, site="pattern", metric="kl").values,
    "ablate": lambda models: causal.ablate(models.base, PROMPTS).values,
    "attribute": lambda models: causal.attribution_patch(models.base, PROMPTS).values,
    "paths": lambda models: causal.path_patch(models.base, PROMPTS, "a0.h0,m0", ["a2.h1<k>", "logits"]).values,
    "eap": lambda models: circuits.attribute_edges(models.base, PROMPTS, method="eap").mean,
    "eap-ig": lambda models: circuits.attribute_edges(models.base, PROMPTS, method="eap-ig", steps=2).mean,
    "exact edges": lambda models: (
        circuits.exact_effects(models.base, PROMPTS, edges=["a0.h0->m1", "m1->logits", "embed->a1.h1<q>"]).per_text
    ),
    "flow routes": lambda models: circuits.flow_routes(models.base, PROMPTS).mean,
    "lens": lambda models: lens.logit_lens(models.base, PROMPTS).table()[["entropy", "kl", "probability"]].to_numpy(),
    "logit attribution": lambda models: lens.attribute_logits(models.base, PROMPTS).effects,
}


def models(family: str, dtype: torch.dtype, device: torch.device | None = None) -> Pair:
    """Build two models of a family on the CPU or another device."""
    tokenizer = families.tokenizer()
    built = (families.build(family, dtype, seed) for seed in (0, 1))
    return pair(*(load(model if device is None else model.to(device), tokenizer=tokenizer) for model in built))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_check_at_load_passes(device: torch.device, family: str) -> None:
    found = check_subject(models(family, torch.float32, device).base)
    assert [check.name for check in found if not check.passed] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_recordings(device: torch.device, family: str, dtype: torch.dtype) -> None:
    texts = families.padded(families.documents(), "left")

    def recorded(subject: Subject) -> Any:
        with torch.no_grad(), record(subject, *(site for site in SITES if site != "expert_output")) as found:
            subject.model(**model_inputs(texts.ids.to(subject.device), texts.real), use_cache=False)
        by_token = {place: value.transpose(1, 2) if place[0] == "pattern" else value for place, value in found.values.items()}
        return {str(place): value.cpu()[texts.real] for place, value in by_token.items()}

    found, expected = recorded(models(family, dtype, device).base), recorded(models(family, dtype).base)
    assert_same(found, expected, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_differences(device: torch.device, family: str, padding: str) -> None:
    found = measure(models(family, torch.float32, device), batch(padding))
    assert_same(found, measure(models(family, torch.float32), batch(padding)), tolerance=TOLERANCE[torch.float32])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_differences_in_half_precision(device: torch.device, family: str) -> None:
    found = measure(models(family, torch.bfloat16, device), batch())
    assert_same(found, measure(models(family, torch.bfloat16), batch()), tolerance=TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("name", TECHNIQUES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_techniques(device: torch.device, family: str, name: str) -> None:
    found = TECHNIQUES[name](models(family, torch.float32, device))
    assert_same(found, TECHNIQUES[name](models(family, torch.float32)), tolerance=TOLERANCE[torch.float32])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_over_two_devices(device: torch.device, family: str, request: pytest.FixtureRequest) -> None:
    if "cuda" in request.node.callspec.id and torch.cuda.device_count() < 2:
        pytest.skip("this machine has one CUDA device: a model cannot be spread over two")
    over_two = pair(*(load(spread(families.build(family, seed=seed), first=seed + 1)) for seed in (0, 1)))
    expected = measure(models(family, torch.float32), batch())
    assert_same(measure(over_two, batch()), expected, tolerance=TOLERANCE[torch.float32])
