"""The registered attention function shows what the model computes, changes nothing by itself, and always leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mechscope.errors import ModelError
from mechscope.instrument import AttentionCall, observed
from mechscope.instrument.attention import _WATCHES, _attention
from mechscope.instrument.walk import model_inputs
from mechscope.subject.load import Subject
from tests import families
from tests.instrument import attention_oracle as oracle

TEXTS = families.documents()


@torch.no_grad()
def logits(subject: Subject, texts: families.Texts) -> Tensor:
    return subject.plain(**model_inputs(texts.ids, texts.real), use_cache=False).logits


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_an_observed_model_gives_the_logits_of_the_model_alone(family: str, dtype: torch.dtype, padding: str) -> None:
    subject, texts = families.subject(family, dtype), families.padded(TEXTS, padding)
    with observed(subject, lambda call: None):
        found = logits(subject, texts)
    for document in range(len(texts.ids)):
        expected = oracle.truth(subject.plain, TEXTS[document]).logits
        tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
        torch.testing.assert_close(texts.rows(found, document), expected, **tolerance)


def test_observing_a_model_that_runs_fused_attention_changes_no_bit() -> None:
    subject, texts = families.subject("llama"), families.padded(TEXTS, "left")
    before = logits(subject, texts)
    with observed(subject, lambda call: None):
        assert torch.equal(logits(subject, texts)[texts.real], before[texts.real])


def test_the_implementation_and_the_taps_are_restored_after_an_exception() -> None:
    subject, texts = families.subject("gpt2"), families.padded(TEXTS, "none")
    implementation = subject.plain.config._attn_implementation
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt), observed(subject, lambda call: seen.append(call.layer)):
        raise KeyboardInterrupt
    assert subject.plain.config._attn_implementation == implementation
    assert not any(_WATCHES.get(block.attention) for block in subject.anatomy.blocks)
    logits(subject, texts)
    assert seen == []


def test_a_tap_that_raises_stops_the_pass_and_leaves_the_model_as_it_was() -> None:
    subject, texts = families.subject("gpt2"), families.padded(TEXTS, "none")
    before = logits(subject, texts)

    def broken(call: AttentionCall) -> None:
        raise RuntimeError("from the tap")

    with pytest.raises(RuntimeError, match="from the tap"), observed(subject, broken):
        logits(subject, texts)
    assert torch.equal(logits(subject, texts), before)


def test_nested_observers_each_see_every_layer_and_the_inner_one_leaves_first() -> None:
    subject, texts = families.subject("llama"), families.padded(TEXTS, "none")
    outer: list[int] = []
    inner: list[int] = []
    with observed(subject, lambda call: outer.append(call.layer)):
        with observed(subject, lambda call: inner.append(call.layer)):
            logits(subject, texts)
        logits(subject, texts)
    assert inner == [0, 1, 2]
    assert outer == [0, 1, 2, 0, 1, 2]


def test_a_later_tap_sees_the_z_that_an_earlier_one_put_in() -> None:
    subject, texts = families.subject("gpt2"), families.padded(TEXTS, "none")
    seen: list[float] = []
    with observed(subject, lambda call: torch.full_like(call.z, 2.0)), observed(subject, lambda call: seen.append(float(call.z.mean()))):
        logits(subject, texts)
    assert seen == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_zeroing_a_heads_z_equals_zeroing_its_columns_of_the_output_projection(family: str) -> None:
    subject, texts = families.subject(family, torch.float64), families.padded(TEXTS, "right")
    layer, head = 1, 2

    def silence(call: AttentionCall) -> Tensor | None:
        if call.layer != layer:
            return None
        z = call.z.clone()
        z[:, :, head] = 0
        return z

    with observed(subject, silence):
        found = logits(subject, texts)
    model = families.build(family, torch.float64)
    width = subject.anatomy.d_head
    writer = model.get_submodule(subject.anatomy.blocks[layer].output.name)
    columns = slice(head * width, (head + 1) * width)
    with torch.no_grad():
        if family == "gpt2":
            writer.weight[columns] = 0  # Conv1D keeps input features as rows
        else:
            writer.weight[:, columns] = 0
        expected = model(**model_inputs(texts.ids, texts.real), use_cache=False).logits
    # Gemma 2's own attention takes its softmax in float32
    tolerance = 1e-5 if family == "gemma2" else 1e-10
    torch.testing.assert_close(found[texts.real], expected[texts.real], rtol=tolerance, atol=tolerance)
    assert (found - logits(subject, texts))[texts.real].abs().max() > 1e-3


def test_z_is_the_pattern_times_the_value() -> None:
    subject, texts = families.subject("llama", torch.float64), families.padded(TEXTS, "none")
    calls: list[AttentionCall] = []
    with observed(subject, calls.append):
        logits(subject, texts)
    for call, p in zip(calls, oracle.truth(subject.plain, TEXTS[0]).maps, strict=True):
        value = call.value[0].repeat_interleave(2, dim=0)
        torch.testing.assert_close(call.z[0].transpose(0, 1), p @ value)


def test_attention_with_an_unknown_extra_term_is_refused_by_its_name() -> None:
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ModelError, match=r"Linear passes position_bias .* does not know what that does"):
        _attention(nn.Linear(1, 1), x, x, x, None, position_bias=torch.zeros(1, 2, 3, 3))


def test_soft_capped_attention_with_a_wide_cap_is_plain_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64).unbind(0)
    module: Any = nn.Module()
    module.is_causal = True
    z, _ = _attention(module, q, k, v, None, softcap=1e6)
    torch.testing.assert_close(z.transpose(1, 2), scaled_dot_product_attention(q, k, v, is_causal=True), rtol=1e-8, atol=1e-9)
