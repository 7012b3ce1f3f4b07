"""Every check passes on every family, and fails when the assumption it tests is broken."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mechscope.errors import ModelError
from mechscope.instrument import CachedRun, Check, Edit, check_subject, intervene, load, record
from mechscope.instrument.mlp import Mlps
from mechscope.subject.anatomy import Slice
from mechscope.subject.load import Subject
from tests import families

HALF = [torch.bfloat16, torch.float16]
SLICES = "each head's slice of the weights is where it should be"
DECOMPOSITION = "the parts add up to the residual stream"
OUTPUTS = "the heads' outputs and W_O give the attention output"


def failed(checks: tuple[Check, ...]) -> set[str]:
    return {item.name for item in checks if not item.passed}


def with_block(subject: Subject, layer: int, **changes: Any) -> Subject:
    """Return the subject with another idea of one block."""
    blocks = list(subject.anatomy.blocks)
    blocks[layer] = replace(blocks[layer], heads=replace(blocks[layer].own_heads, **changes))
    return replace(subject, anatomy=replace(subject.anatomy, blocks=tuple(blocks)))


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=lambda dtype: str(dtype)[6:])
def test_every_check_passes_on_every_family_and_type(family: str, dtype: torch.dtype) -> None:
    assert failed(check_subject(families.subject(family, dtype))) == set()


@pytest.mark.parametrize(("first", "second"), [("key", "value"), ("query", "key"), ("query", "value")])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3", "phi3"])
def test_swapped_slices_are_found(family: str, first: str, second: str) -> None:
    subject = families.subject(family)
    block = subject.anatomy.blocks[1]
    one, two = getattr(block, first), getattr(block, second)
    # grouped keys are fewer than the queries: there the queries are shifted by one head instead
    if subject.anatomy.n_kv_heads != subject.anatomy.n_heads and "query" in (first, second):
        wrong = with_block(subject, 1, query=replace(one, starts=(*one.starts[1:], one.starts[0])))
    else:
        wrong = with_block(subject, 1, **{first: two, second: one})
    assert SLICES in failed(check_subject(wrong))


def test_heads_in_the_wrong_order_are_found() -> None:
    subject = families.subject("gpt_neox")
    value: Slice = subject.anatomy.blocks[0].value
    # GPT-NeoX interleaves query, key and value by head: reading it side by side is the classic mistake
    wrong = with_block(subject, 0, value=replace(value, starts=tuple(64 + head * 8 for head in range(4))))
    assert SLICES in failed(check_subject(wrong))


def test_a_wrong_head_width_is_refused_with_the_sizes_found() -> None:
    for family, width, message in (
        ("gpt2", 16, r"c_proj reads 32 features, 4 heads of width 16 give 64"),
        ("gpt2", 20, r"c_attn holds 4 slices of width 20, which is not 4 queries plus keys and values"),
        ("llama", 4, r"q_proj holds 8 heads of width 4, which does not divide 4 query heads"),
    ):
        model = families.build(family)
        model.config.head_dim = width
        with pytest.raises(ModelError, match=message):
            load(model)


def test_a_decomposition_that_does_not_add_up_is_reported_and_not_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = families.build("llama")
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: 2 * own(*args, **kwargs)
    with caplog.at_level(logging.WARNING):
        subject = load(model)
    assert failed(check_subject(subject)) == {DECOMPOSITION}
    assert f"check {DECOMPOSITION!r} failed" in caplog.text
    assert "decomposition of the residual stream will not be right" in caplog.text


def test_an_output_projection_that_is_not_the_heads_own_is_reported() -> None:
    subject = families.subject("gpt2")
    other = families.build("gpt2", seed=5)
    wrong = with_block(subject, 0, output=replace(subject.anatomy.blocks[0].output, module=other.transformer.h[0].attn.c_proj))
    assert failed(check_subject(wrong)) == {OUTPUTS}


def test_a_model_that_treats_padding_otherwise_is_refused() -> None:
    model = families.build("llama")
    own = model.forward

    def blind(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **{**kwargs, "attention_mask": None, "position_ids": None})

    model.forward = blind
    with pytest.raises(ModelError, match="recording and padding do not change the logits"):
        load(model)
    assert load(model, check=False).family == "llama", "who asks for no checks gets the model"


def test_logits_that_do_not_follow_from_the_last_residual_stream_are_refused() -> None:
    model = families.build("llama")
    own = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = shifted
    with pytest.raises(ModelError, match="walking block by block gives the logits"):
        load(model)


@pytest.mark.parametrize(
    ("shared", "named"),
    [(0, r"between its blocks stands \(2, .*several residual streams.*AltUp"), (1, "1 of its layers have no keys and values")],
)
def test_gemma_3n_is_refused_with_what_it_is(shared: int, named: str) -> None:
    config = Gemma3nTextConfig(
        vocab_size=97,
        vocab_size_per_layer_input=97,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        num_kv_shared_layers=shared,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.5, 0.0, 0.0],
        max_position_embeddings=64,
    )
    with pytest.raises(ModelError, match=f"gemma3n_text: {named}.*: not supported"):
        load(AutoModelForCausalLM.from_config(config))


def test_gpt_neo_is_refused_by_name() -> None:
    config = GPTNeoConfig(vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
    with pytest.raises(ModelError, match=r"gpt_neo is not supported.*attention interface"):
        load(GPTNeoForCausalLM(config))


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Any) -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    with pytest.raises(ModelError, match=r"t5 is an encoder-decoder model: mechscope studies decoder-only"):
        load(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(t5\) is an encoder-decoder model"):
        load(tmp_path)


def test_a_mixture_of_experts_is_measured_but_for_its_neurons() -> None:
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    subject = load(MixtralForCausalLM(config).eval())
    assert failed(check_subject(subject)) == set()
    ids = families.documents()[0][None]
    refused = r"the MLP of model\.layers\.0 is a mixture of 4 experts: it has no neurons"
    with pytest.raises(ModelError, match=refused), record(subject, "neuron"):
        pass
    with pytest.raises(ModelError, match=refused), intervene(subject, Edit("neuron", 0, 0.0, features=(1,))):
        pass
    with pytest.raises(ModelError, match=refused):
        CachedRun(subject, ids, sites=("neuron",))
    with pytest.raises(ModelError, match=refused):
        Mlps(subject)
