"""A recording holds what Hugging Face and the formulas say, only what was asked for, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mechscope.errors import SettingsError
from mechscope.instrument import AttentionCall, Recording, observed, record
from mechscope.instrument.walk import model_inputs
from mechscope.subject.load import Subject
from tests import families
from tests.instrument import attention_oracle as oracle
from tests.slips import slip

TEXTS = families.documents()
every_family = pytest.mark.parametrize("family", families.FAMILIES)
every_padding = pytest.mark.parametrize("padding", ["none", "left", "right"])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def recorded(subject: Subject, texts: families.Texts, *sites: Any, **options: Any) -> Recording:
    with record(subject, *sites, **options) as recording:
        subject.plain(**model_inputs(texts.ids, texts.real), use_cache=False)
    return recording


@every_padding
@every_family
def test_residual_stream_embedding_and_logits_equal_hidden_states(family: str, padding: str) -> None:
    subject, texts = families.subject(family, torch.float64), families.padded(TEXTS, padding)
    recording = recorded(subject, texts, "embedding", "residual", "logits")
    for document in range(len(texts.ids)):
        truth = oracle.truth(subject.plain, TEXTS[document])
        close(texts.rows(recording["embedding"], document), truth.hidden[0])
        for layer in range(subject.anatomy.n_layers):
            close(texts.rows(recording["residual", layer], document), truth.hidden[layer + 1])
        close(texts.rows(recording["logits"], document), truth.logits)


@every_padding
@every_family
def test_what_the_parts_write_adds_up_to_the_residual_stream(family: str, padding: str) -> None:
    subject, texts = families.subject(family, torch.float64), families.padded(TEXTS, padding)
    recording = recorded(subject, texts, "embedding", "residual", "attention_output", "mlp_output")
    stream = recording["embedding"]
    for layer in range(subject.anatomy.n_layers):
        stream = stream + recording["attention_output", layer] + recording["mlp_output", layer]
        close(stream[texts.real], recording["residual", layer][texts.real])


@every_padding
@every_family
def test_head_outputs_and_the_projections_bias_add_up_to_what_the_projection_gives(family: str, padding: str) -> None:
    subject, texts = families.subject(family, torch.float64), families.padded(TEXTS, padding)
    given: dict[int, Tensor] = {}
    handles = [
        block.output.module.register_forward_hook(lambda _, args, output, layer=layer: given.__setitem__(layer, output))
        for layer, block in enumerate(subject.anatomy.blocks)
    ]
    try:
        recording = recorded(subject, texts, "head_output")
    finally:
        for handle in handles:
            handle.remove()
    for layer, block in enumerate(subject.anatomy.blocks):
        bias = getattr(block.output.module, "bias", None)
        total = recording["head_output", layer].sum(2) + (0 if bias is None else bias.detach())
        expected = given[layer].reshape(total.shape)
        close(total[texts.real], expected[texts.real])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_query_key_and_value_give_the_map_and_z(family: str) -> None:
    subject, texts = families.subject(family, torch.float64), families.padded(TEXTS, "left")
    recording = recorded(subject, texts, "query", "key", "value", "z")
    for layer in range(subject.anatomy.n_layers):
        for document in range(len(TEXTS)):
            real = texts.real[document]
            q, k, v = (recording[site, layer][document].transpose(0, 1)[:, real] for site in ("query", "key", "value"))
            group = len(q) // len(k)
            p = torch.softmax(
                (q @ k.repeat_interleave(group, 0).mT / q.shape[-1] ** 0.5).masked_fill(
                    ~torch.ones(len(q[0]), len(q[0]), dtype=torch.bool).tril(), -torch.inf
                ),
                dim=-1,
            )
            close(p, oracle.truth(subject.plain, TEXTS[document]).maps[layer])
            close(recording["z", layer][document][real].transpose(0, 1), p @ v.repeat_interleave(group, 0))


def test_only_what_was_asked_for_is_held() -> None:
    recording = recorded(families.subject("llama"), families.padded(TEXTS, "none"), "residual", "z", layers=[1])
    assert set(recording.values) == {("residual", 1), ("z", 1)}


def test_a_missing_site_is_named_with_what_is_held() -> None:
    recording = recorded(families.subject("llama"), families.padded(TEXTS, "none"), "residual")
    with pytest.raises(KeyError, match=r"'z' at layer 0 was not recorded; the recording holds residual"):
        recording["z", 0]
    with pytest.raises(KeyError, match="no forward pass was run"):
        Recording()["residual", 0]


def test_stacked_sites_stand_in_order_of_the_layers() -> None:
    recording = recorded(families.subject("llama"), families.padded(TEXTS, "none"), "residual", layers=[2, 0])
    assert torch.equal(recording.stack("residual"), torch.stack([recording["residual", 0], recording["residual", 2]]))


def test_an_unknown_site_and_a_layer_outside_the_model_are_refused() -> None:
    subject = families.subject("llama")
    with (
        pytest.raises(SettingsError, match="site 'resid' cannot be recorded: the sites are embedding, residual"),
        record(subject, slip("resid")),
    ):
        pass
    with pytest.raises(SettingsError, match="layer 3 does not exist: the model has layers 0-2"), record(subject, "z", layers=[3]):
        pass


def hooks(subject: Subject) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in subject.plain.modules())


def test_hooks_and_implementation_are_gone_after_an_exception_inside() -> None:
    subject, texts = families.subject("opt"), families.padded(TEXTS, "none")
    implementation, before = subject.plain.config._attn_implementation, hooks(subject)
    everything = record(subject, "embedding", "residual", "attention_output", "mlp_output", "logits", "z")
    with pytest.raises(RuntimeError, match="body"), everything as recording:
        raise RuntimeError("body" if hooks(subject) > before else "no hooks")
    assert hooks(subject) == before
    assert subject.plain.config._attn_implementation == implementation
    with torch.no_grad():
        subject.plain(texts.ids)
    assert recording.values == {}


def test_nested_recordings_hold_the_same_values() -> None:
    subject, texts = families.subject("gpt_neox"), families.padded(TEXTS, "none")
    with torch.no_grad(), record(subject, "z") as outer, record(subject, "z", "residual") as inner:
        subject.plain(texts.ids, use_cache=False)
    assert torch.equal(outer.stack("z"), inner.stack("z"))
    assert ("residual", 0) not in outer.values


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2", "opt"])
def test_recording_around_generate_changes_no_token_and_ends_with_the_last_step(family: str) -> None:
    subject = families.subject(family)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    ids = TEXTS[0][None]
    plain = subject.plain.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with record(subject, "residual", "z", "mlp_output", "logits") as recording:
        found = subject.plain.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found, plain)
    assert recording["residual", 2].shape == (1, 1, families.WIDTH)
    assert recording["logits"][0, -1].argmax() == plain[0, -1]
    # the same position in one pass over the whole text, without a cache
    whole = recorded(subject, families.Texts(plain[:, :-1], torch.ones_like(plain[:, :-1], dtype=torch.bool)), "z", "mlp_output")
    for site in ("z", "mlp_output"):
        torch.testing.assert_close(recording[site, 1][:, -1], whole[site, 1][:, -1], rtol=1e-4, atol=1e-4)


def test_detached_values_carry_no_graph_and_others_reach_the_embedding() -> None:
    subject, texts = families.subject("gpt2"), families.padded(TEXTS, "none")
    with record(subject, "residual") as cut, record(subject, "residual", detach=False) as kept:
        subject.plain(texts.ids, use_cache=False)
    assert not cut["residual", 2].requires_grad
    (gradient,) = torch.autograd.grad(kept["residual", 2].sum(), [subject.plain.get_input_embeddings().weight])
    assert gradient.abs().sum() > 0


def test_a_replaced_z_is_recorded_as_the_attention_output_it_leads_to() -> None:
    subject, texts = families.subject("gpt2", torch.float64), families.padded(TEXTS, "none")

    def silence(call: AttentionCall) -> Tensor:
        return torch.zeros_like(call.z)

    with torch.no_grad(), observed(subject, silence), record(subject, "attention_output") as recording:
        subject.plain(texts.ids, use_cache=False)
    bias = subject.anatomy.blocks[0].output.module.bias
    assert isinstance(bias, Tensor)
    close(recording["attention_output", 0], bias.detach().expand(1, len(TEXTS[0]), families.WIDTH))
