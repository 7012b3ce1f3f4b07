"""Every kind of adapter: its weights are those of the merged model, and the base under it is the base, or is loaded apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from mechscope.causal.cross import swapped
from mechscope.difference import compare_weights
from mechscope.errors import ModelError
from mechscope.instrument import check_subject, load_pair, observed, record
from mechscope.instrument.readout import Readout
from mechscope.subject.load import load
from tests import families
from tests.subject.saved import IDS, logits, save

LORA: dict[str, Any] = {"r": 2, "task_type": "CAUSAL_LM"}
GPT2: dict[str, Any] = {**LORA, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
LLAMA: dict[str, Any] = {**LORA, "target_modules": ["q_proj", "o_proj"]}
# by name: the family, the configuration, whether the weights under the adapter are still the base's
KINDS: dict[str, tuple[str, Any, bool]] = {
    "LoRA on Conv1D": ("gpt2", LoraConfig(**GPT2), True),
    "LoRA": ("llama", LoraConfig(**LLAMA), True),
    "DoRA on Conv1D": ("gpt2", LoraConfig(**GPT2, use_dora=True), True),
    "DoRA": ("llama", LoraConfig(**LLAMA, use_dora=True), True),
    "LoRA with a bias of its own": ("gpt_neox", LoraConfig(**LORA, target_modules=["query_key_value", "dense"], lora_bias=True), True),
    "IA3": (
        "gpt2",
        IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj"], feedforward_modules=[], fan_in_fan_out=True),
        True,
    ),
    "LoHa": ("llama", LoHaConfig(**LLAMA), True),
    "VeRA": ("llama", VeraConfig(**LORA, target_modules=["up_proj"]), True),
    "tokens with LoRA, tied": ("gpt2", LoraConfig(**GPT2, trainable_token_indices=[5, 6]), True),
    "tokens with LoRA, untied": ("llama", LoraConfig(**LLAMA, trainable_token_indices=[5, 6]), True),
    "tokens": ("llama", TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[5, 6]), True),
    "whole modules": ("llama", LoraConfig(**LLAMA, modules_to_save=["lm_head", "norm"]), True),
    "biases": ("gpt2", LoraConfig(**GPT2, bias="all"), False),
    "biases of LoRA's maps": ("gpt2", LoraConfig(**GPT2, bias="lora_only"), False),
    "PiSSA": ("gpt2", LoraConfig(**GPT2, init_lora_weights="pissa"), False),
    "OLoRA": ("llama", LoraConfig(**LLAMA, init_lora_weights="olora"), False),
}


@torch.no_grad()
def trained(model: Any, config: Any, seed: int = 0) -> Any:
    """Return a model, or one of a family, with an adapter whose every trainable number has moved."""
    model = get_peft_model(families.build(model, seed=seed) if isinstance(model, str) else model, config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    return model


@torch.no_grad()
def raw(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Tensor, bool]:
    """Return the directories of base and adapter, the tuned logits, and whether the base is beneath the adapter."""
    family, config, beneath = KINDS[request.param]
    base = save(tmp_path / "base", family)
    model = trained(family, config)
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", raw(model), beneath


def test_base_and_tuned_are_what_they_were(kind: tuple[Path, Path, Tensor, bool]) -> None:
    base, adapter, tuned, beneath = kind
    found = load_pair(base, adapter)
    torch.testing.assert_close(logits(found.tuned), tuned)
    torch.testing.assert_close(logits(found.base), logits(load(base)))
    assert (found.base.model is found.tuned.model) is beneath
    assert all(check.passed for check in check_subject(found.tuned))
    if not beneath:
        with pytest.raises(ModelError, match=r"with its adapter off is not its base: .* load the base by itself"):
            found.tuned.without_adapter()


def test_weights_are_those_of_the_merged_model(kind: tuple[Path, Path, Tensor, bool]) -> None:
    base, adapter, _, _ = kind
    subject = load(adapter, base=base)
    found = dict(subject.weights())
    z = torch.randn(1, 4, subject.anatomy.n_heads, subject.anatomy.d_head)
    with record(subject, "head_output", "z") as recording, torch.no_grad():
        subject.model(input_ids=IDS)
    readout = Readout.of(subject)
    merged = load(adapter, base=base).model.merge_and_unload()
    expected = dict(merged.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach())
    unembedding = merged.get_output_embeddings().weight
    assert torch.equal(readout.weight, unembedding)
    name = subject.anatomy.blocks[1].output.name
    weight = merged.get_submodule(name).weight.detach()
    weight = weight if type(merged.get_submodule(name)).__name__ == "Conv1D" else weight.T
    z = recording["z", 1][:, :, 2]
    torch.testing.assert_close(recording["head_output", 1][:, :, 2], z @ weight[2 * z.shape[-1] : 3 * z.shape[-1]], rtol=1e-4, atol=1e-5)


def test_retrained_rows_of_the_embedding_are_not_the_bases(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "gpt2")
    trained("gpt2", LoraConfig(**GPT2, trainable_token_indices=[5, 6])).save_pretrained(tmp_path / "adapter")
    pair = load_pair(base, tmp_path / "adapter")
    rows = (
        torch.equal(Readout.of(pair.base).weight, Readout.of(load(base)).weight),
        torch.equal(Readout.of(pair.tuned).weight[[5, 6]], Readout.of(pair.base).weight[[5, 6]]),
    )
    assert rows == (True, False)


def test_embeddings_saved_with_an_adapter_are_not_the_bases(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "gpt2")
    model = trained("gpt2", LoraConfig(**GPT2))
    with torch.no_grad():
        model.get_base_model().transformer.wte.weight.add_(0.3)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    pair = load_pair(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(pair.tuned), raw(model))
    assert torch.equal(logits(pair.base), logits(load(base)))


@torch.no_grad()
def test_weights_of_the_base_are_compared_value_by_value_in_their_order(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "gpt2")
    model = load(base).model
    adapted = get_peft_model(model, LoraConfig(**GPT2))
    model.transformer.wte.weight.copy_(model.transformer.wte.weight.flip(0))  # the same values in another order
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert load(tmp_path / "adapter").displaced == ("transformer.wte.weight", "lm_head.weight")


@torch.no_grad()
def test_lora_on_experts_is_read_as_it_acts() -> None:
    sizes = {"vocab_size": families.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4}
    widths = {"intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_key_value_heads": 2}
    config = Qwen2MoeConfig(**sizes, **widths, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")  # the other kernels know no float64
    families.randomize(model)
    model.double()  # merging rounds what the adapter adds apart
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    base = {name: value.clone() for name, value in load(model).weights()}
    adapted = get_peft_model(
        model, LoraConfig(**LORA, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)
    ).eval()
    subject = load(adapted)
    assert subject.anatomy.blocks[1].experts is not None
    assert subject.anatomy.blocks[1].experts.number == 4
    assert all(check.passed for check in check_subject(subject))
    beneath = dict(subject.without_adapter().weights())
    assert beneath.keys() == base.keys()
    assert all(torch.equal(beneath[name], value) for name, value in base.items())
    found, tuned = dict(subject.weights()), logits(subject)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(raw(merged), tuned, rtol=1e-4, atol=1e-5)
    assert found.keys() == base.keys()
    for name, value in merged.named_parameters():
        torch.testing.assert_close(found[name], value)
        assert torch.equal(found[name], base[name]) is not name.endswith(("q_proj.weight", "experts.gate_up_proj", "experts.down_proj"))


@pytest.mark.parametrize("kind", ["PiSSA", "biases", "biases of LoRA's maps"])
def test_an_adapter_in_memory_that_has_changed_its_base_has_none_beneath_it(kind: str) -> None:
    family, config, _ = KINDS[kind]
    with pytest.raises(ModelError, match="with its adapter off is not its base"):
        load(trained(family, config)).without_adapter()


def test_two_active_adapters_on_different_modules_act_together() -> None:
    model = trained("gpt2", LoraConfig(**{**GPT2, "target_modules": ["c_attn"]}))
    model.add_adapter("other", LoraConfig(**{**GPT2, "target_modules": ["c_fc"], "init_lora_weights": False}))
    model.base_model.set_adapter(["default", "other"])
    expected, subject = raw(model), load(model)
    found = dict(subject.weights())
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(raw(merged), expected, rtol=1e-3, atol=1e-4)
    for name, value in merged.named_parameters():
        torch.testing.assert_close(found[name], value.detach())


@pytest.mark.parametrize(
    "config",
    [PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)],
)
def test_adapters_of_virtual_tokens_are_refused_by_name(config: Any, tmp_path: Path) -> None:
    model = get_peft_model(families.build("gpt2"), config)
    message = f"is of type {config.peft_type.value}: it puts learned tokens or keys before every text"
    with pytest.raises(ModelError, match=message):
        load(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "adapter", base=save(tmp_path / "base", "gpt2"))


def test_an_adapter_that_repeats_layers_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(families.build("llama"), LoraConfig(**LLAMA, layer_replication=[[0, 2], [1, 3]]))
    with pytest.raises(ModelError, match=r"repeats layers of its base \(layer_replication="):
        load(model)


def test_an_adapter_of_a_resized_base_names_the_remedy(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama")
    wide = load(base).model
    wide.resize_token_embeddings(101)
    model = get_peft_model(wide, LoraConfig(**LLAMA, modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(ModelError, match=r"was trained on .* with 101 tokens, its base .* has 97: .*resize_token_embeddings\(101\)"):
        load(tmp_path / "adapter", base=base)
    wide = load(base).model
    wide.resize_token_embeddings(101)
    wide.save_pretrained(tmp_path / "wide")
    torch.testing.assert_close(logits(load(tmp_path / "adapter", base=tmp_path / "wide", tokenizer=families.tokenizer(101))), raw(model))


def test_weights_are_not_exchanged_under_an_adapter_that_does_not_add() -> None:
    subject = load(trained(*KINDS["DoRA"][:2]))
    with pytest.raises(ModelError, match="it does more than add to its map"), swapped(subject, {}):
        pass


@torch.no_grad()
def test_lora_trained_in_bfloat16_is_read_as_it_acts(tmp_path: Path) -> None:
    save(tmp_path / "base", "llama")
    trained("llama", LoraConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(tmp_path / "adapter")
    subject = load(tmp_path / "adapter", base=tmp_path / "base", dtype="bfloat16")
    assert subject.dtype == torch.bfloat16
    assert all(check.passed for check in check_subject(subject))
    found, merged = dict(subject.weights()), load(tmp_path / "adapter", base=tmp_path / "base", dtype="bfloat16").model.merge_and_unload()
    assert all(torch.equal(found[name], value) for name, value in merged.named_parameters())
    with observed(subject):
        assert torch.isfinite(subject.model(input_ids=IDS).logits).all()


# by name: the family, whether its embedding is its unembedding, what an adapter does to one of them or both
EMBEDDINGS: dict[str, tuple[str, bool, Any]] = {
    "LoRA on an embedding": ("llama", False, LoraConfig(**{**LORA, "target_modules": ["embed_tokens", "q_proj"]})),
    "LoRA on a tied embedding": ("gpt2", True, LoraConfig(**{**GPT2, "target_modules": ["wte", "c_attn"]})),
    "LoRA on a tied unembedding": ("llama", True, LoraConfig(**{**LORA, "target_modules": ["lm_head", "q_proj"]})),
    "a tied unembedding saved whole": ("gpt2", True, LoraConfig(**GPT2, modules_to_save=["lm_head"])),
    "a tied embedding saved whole": ("gpt2", True, LoraConfig(**GPT2, modules_to_save=["wte"])),
    "both saved whole": ("llama", True, LoraConfig(**LLAMA, modules_to_save=["lm_head", "embed_tokens"])),
    "both saved as one": ("llama", True, LoraConfig(**LLAMA, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
@torch.no_grad()
def test_embeddings_under_an_adapter_are_read_as_they_act_tied_or_not(name: str, tmp_path: Path) -> None:
    """Compares with what the modules do: merging a tied one, PEFT changes the other too."""
    family, tied, config = EMBEDDINGS[name]
    base = save(tmp_path / "base", family, tie_word_embeddings=tied)
    model = trained(load(base).model, config)
    model.save_pretrained(tmp_path / "adapter")
    pair = load_pair(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(pair.tuned), raw(model))
    torch.testing.assert_close(logits(pair.base), logits(load(base)))
    moved = {}
    for subject in (pair.base, pair.tuned):
        weights = dict(subject.weights())
        inputs: list[Tensor] = []
        handle = subject.anatomy.unembedding.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        expected = logits(subject)
        handle.remove()
        torch.testing.assert_close(inputs[0] @ Readout.of(subject).weight.T, expected)
        with subject.active():
            rows = subject.anatomy.embedding(IDS)
        (embedding,) = (value for key, value in weights.items() if key.endswith(("embed_tokens.weight", "wte.weight")))
        torch.testing.assert_close(embedding[IDS], rows)
        if "lm_head.weight" in weights:
            torch.testing.assert_close(weights["lm_head.weight"], Readout.of(subject).weight)
        assert all(check.passed for check in check_subject(subject))
        moved[subject.adapted] = (rows, Readout.of(subject).weight)
    table = compare_weights(pair).table
    changes = dict(zip(table["kind"].astype(str), table["change"].astype(float), strict=True))
    for kind, one, other in zip(("embedding", "unembedding"), moved[False], moved[True], strict=True):
        if kind in changes:
            assert (changes[kind] == 0) == torch.equal(one, other)
