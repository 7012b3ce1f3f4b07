"""Models with offloaded weights: what runs them works as it is, what reads weights fetches them or refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mechscope import causal, circuits, lens, weights
from mechscope.adapt.generate import summarize
from mechscope.difference import compare_weights, measure
from mechscope.difference.smallest import in_other_precision
from mechscope.errors import ModelError
from mechscope.instrument import check_subject, record
from mechscope.instrument.walk import Walk, next_token_losses, unembed
from mechscope.settings.decoding import Decoding
from mechscope.subject import placement
from mechscope.subject.load import Subject, load
from mechscope.subject.pair import pair
from tests import families
from tests.devices import assert_same, batch, device_map, prompts
from tests.pretend import pretended, traffic
from tests.subject.saved import logits

PROMPTS = prompts()
WAYS = ("one layer on disk", "everything on the CPU", "everything on disk")


def offloaded(family: str, way: str, folder: Path, seed: int = 0) -> Subject:
    model = families.build(family, seed=seed)
    match way:
        case "everything on the CPU":
            model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        case "everything on disk":
            model = accelerate.disk_offload(model, str(folder / f"weights{seed}"), execution_device=torch.device("cpu"))
        case _:
            stored = folder / f"model{seed}"
            model.save_pretrained(stored)
            places = dict.fromkeys(device_map(model), "cpu")
            places[next(name for name in places if name.endswith(".1"))] = "disk"
            model = AutoModelForCausalLM.from_pretrained(stored, device_map=places, offload_folder=str(folder / f"weights{seed}"))
    assert any(parameter.is_meta for parameter in model.parameters())
    return load(model, tokenizer=families.tokenizer())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_an_offloaded_model_is_measured_as_if_it_were_in_memory(family: str, way: str, tmp_path: Path) -> None:
    away = [offloaded(family, way, tmp_path, seed) for seed in (0, 1)]
    here = [load(families.build(family, seed=seed), tokenizer=families.tokenizer()) for seed in (0, 1)]
    assert str(away[0].device) == "cpu"
    assert [check.name for check in check_subject(away[0]) if not check.passed] == []
    assert away[0].fingerprint == here[0].fingerprint
    assert {name: tuple(value.shape) for name, value in away[0].weights()} == {
        name: tuple(value.shape) for name, value in here[0].weights()
    }
    assert_same(measure(pair(*away), batch()), measure(pair(*here), batch()))
    assert_same(compare_weights(pair(*away)), compare_weights(pair(*here)))
    for technique in (
        lambda subject: causal.patch(subject, PROMPTS).values,
        lambda subject: causal.ablate(subject, PROMPTS, metric="loss").values,
        lambda subject: causal.attribution_patch(subject, PROMPTS).values,
    ):
        assert_same(technique(away[0]), technique(here[0]), tolerance=1e-5)


def mapped(family: str, way: str, folder: Path, seed: int = 0) -> Subject:
    """Return a model that transformers or accelerate have laid over devices, all of which are the CPU here."""
    stored = folder / f"model{seed}"
    families.build(family, seed=seed).save_pretrained(stored)
    families.tokenizer().save_pretrained(stored)
    if way == "by load":
        return load(stored, device_map="auto")
    if way == "hooks around every module":
        model = families.build(family, seed=seed)
        accelerate.hooks.add_hook_to_module(model, AlignDevicesHook(io_same_device=True), append=True)
        for module in list(model.modules())[1:]:
            accelerate.hooks.add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        assert all(hasattr(module, "_hf_hook") for module in model.modules())
    else:
        places = "auto" if way == "auto" else dict.fromkeys(device_map(families.build(family)), "cpu")
        model = AutoModelForCausalLM.from_pretrained(stored, device_map=places)
    return load(model, tokenizer=families.tokenizer())


@pytest.mark.parametrize("way", ["auto", "by load", "part by part", "hooks around every module"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_model_that_was_laid_over_devices_is_measured_as_any_other(family: str, way: str, tmp_path: Path) -> None:
    laid = [mapped(family, way, tmp_path, seed) for seed in (0, 1)]
    here = [load(families.build(family, seed=seed), tokenizer=families.tokenizer()) for seed in (0, 1)]
    assert str(laid[0].device) == "cpu"
    assert [check.name for check in check_subject(laid[0]) if not check.passed] == []
    assert laid[0].fingerprint == here[0].fingerprint
    assert_same(measure(pair(*laid), batch()), measure(pair(*here), batch()))
    assert_same(causal.patch(laid[0], PROMPTS).values, causal.patch(here[0], PROMPTS).values, tolerance=1e-5)
    assert_same(circuits.attribute_edges(laid[0], PROMPTS).mean, circuits.attribute_edges(here[0], PROMPTS).mean, tolerance=1e-5)
    prompts = [[3, 5, 7], [4, 8, 9, 10, 11]]
    written = [summarize(each.model, each.tokenizer, prompts, decoding=Decoding(max_new_tokens=4)) for each in (laid[0], here[0])]
    assert written[0] == written[1]


@torch.no_grad()
def test_an_adapter_on_a_model_that_was_laid_over_devices(tmp_path: Path) -> None:
    base = mapped("llama", "hooks around every module", tmp_path)
    expected = logits(load(families.build("llama")))
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base.model, config)
    subject = load(adapted, tokenizer=families.tokenizer())
    assert all(check.passed for check in check_subject(subject))
    assert torch.equal(logits(subject.without_adapter()), expected)
    tuned = logits(subject)
    assert not torch.allclose(tuned, expected)
    torch.testing.assert_close(logits(load(adapted.merge_and_unload())), tuned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("said", "expected"), [(0, "cuda:0"), (1, "cuda:1"), ("cuda:1", "cuda:1"), ("cpu", "cpu"), (None, "cpu")])
def test_offloaded_weights_compute_where_accelerate_says_by_name_or_number(said: int | str | None, expected: str) -> None:
    module = torch.nn.Linear(2, 2, device="meta")
    vars(module)["_hf_hook"] = AlignDevicesHook(execution_device=said)
    assert str(placement.place_of(module)) == expected


def test_what_is_sent_to_a_gpu_is_pinned_and_arrives_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(x: torch.Tensor) -> torch.Tensor:
        pinned.append(x)
        return x

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    ids = torch.arange(3).expand(2, 3)
    with pretended():
        with traffic() as counted:
            there = placement.sent(ids, torch.device("cuda:1"))
        assert (str(there.device), there.tolist()) == ("cuda:1", ids.tolist())
        assert placement.index_for((), there).tolist() == []
        assert dict(counted.events) == {"sent": 1}
        back = placement.sent(there, torch.device("cpu"))
        placement.sent(ids, torch.device("cpu"))
    assert back.tolist() == ids.tolist()
    assert [x.shape for x in pinned] == [(2, 3), (0,)], "only what goes to a GPU"
    assert pinned[0].is_contiguous(), "an expanded tensor cannot be pinned"


def test_weights_are_given_back_after_they_were_fetched(tmp_path: Path) -> None:
    subject = offloaded("gpt2", "everything on disk", tmp_path)
    for _, value in subject.weights():
        assert not value.is_meta
    assert all(parameter.is_meta for parameter in subject.plain.parameters())


READERS: dict[str, Callable[[Subject], Any]] = {
    "circuits": lambda subject: circuits.attribute_edges(subject, PROMPTS),
    "logit lens": lambda subject: lens.logit_lens(subject, PROMPTS),
    "logit attribution": lambda subject: lens.attribute_logits(subject, PROMPTS),
    "heads' weights": lambda subject: weights.ov_tokens(subject),
    "neurons": lambda subject: weights.neuron_tokens(subject),
    "exchange of weights": lambda subject: causal.cross_patch(pair(subject, subject), PROMPTS, by="weights"),
}


@pytest.mark.parametrize("what", READERS)
def test_what_reads_weights_itself_refuses_by_name(what: str, tmp_path: Path) -> None:
    subject = offloaded("gpt2", "one layer on disk", tmp_path)
    with pytest.raises(
        ModelError, match=r"12 weights \(transformer\.h\.1\.ln_1\.weight, …\) are offloaded .* load the model without offloading"
    ):
        READERS[what](subject)


def test_head_outputs_of_an_offloaded_model_are_refused(tmp_path: Path) -> None:
    subject = offloaded("gpt2", "one layer on disk", tmp_path)
    with pytest.raises(ModelError, match="recording head outputs reads them"), record(subject, "head_output"):
        subject.model(torch.arange(4)[None])


def test_losses_through_an_offloaded_unembedding(tmp_path: Path) -> None:
    subject = offloaded("llama", "everything on the CPU", tmp_path)
    with torch.no_grad():
        hidden = Walk(subject, torch.arange(3, 9)[None]).run()
        logits = unembed(subject, hidden)
        found = next_token_losses(subject, hidden, torch.arange(4, 10)[None])
    torch.testing.assert_close(found, -logits.log_softmax(-1).gather(-1, torch.arange(4, 10)[None, :, None])[..., 0], rtol=0, atol=1e-5)


def test_emulated_bfloat16_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    placement._warn_once.cache_clear()
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with caplog.at_level(logging.WARNING):
        subject = load(families.build("gpt2"))
        # a copy of mechscope's own, read for its rounding, is not the user's choice
        assert in_other_precision(subject) is not None
        assert not caplog.records
        load(families.build("gpt2", torch.bfloat16))
        load(families.build("gpt2", torch.bfloat16))
    assert [record.message.startswith("bfloat16 on this processor is emulated") for record in caplog.records] == [True]
    placement._warn_once.cache_clear()


def test_bfloat16_in_hardware_needs_no_word(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    placement._warn_once.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with caplog.at_level(logging.WARNING):
        load(families.build("gpt2", torch.bfloat16))
    assert not caplog.records
    placement._warn_once.cache_clear()
