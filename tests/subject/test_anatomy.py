"""Each head's slice of the weights is that head's and no other's; everything else is found where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, GPT2Model

from mechscope.errors import ModelError
from mechscope.instrument import AttentionCall, observed
from mechscope.subject.anatomy import Slice
from mechscope.subject.discovery import discover
from mechscope.subject.linear import is_conv1d, oriented_weight
from mechscope.subject.load import Subject, load
from tests import families

every_family = pytest.mark.parametrize("family", families.FAMILIES)
LAYER, HEAD = 1, 2
IDS = families.documents()[0][None]


def subject_to_change(family: str) -> Subject:
    return load(families.build(family, torch.float64))


@torch.no_grad()
def silence(slice_: Slice, head: int) -> None:
    """Set a head's slice of a map to zero, its bias included."""
    weight, bias = oriented_weight(slice_.module), getattr(slice_.module, "bias", None)
    features = slice_.features(head)
    if slice_.side == "output":
        weight[features] = 0
        if isinstance(bias, Tensor):
            bias[features] = 0
    else:
        weight[:, features] = 0


@torch.no_grad()
def call_of_layer(subject: Subject) -> AttentionCall:
    calls: list[AttentionCall] = []
    with observed(subject, calls.append):
        subject.plain(IDS, use_cache=False)
    return calls[LAYER]


@every_family
@pytest.mark.parametrize("reader", ["query", "key", "value"])
def test_silencing_a_heads_slice_of_a_reader_silences_this_head_alone(family: str, reader: str) -> None:
    subject = subject_to_change(family)
    before = call_of_layer(subject)
    silence(getattr(subject.anatomy.blocks[LAYER], reader), HEAD)
    after = call_of_layer(subject)
    for name in ("query", "key", "value"):
        old, new = getattr(before, name)[0], getattr(after, name)[0]
        # key and value heads are shared by groups of query heads
        silenced = HEAD * len(new) // families.HEADS if name == reader else None
        for index in range(len(new)):
            if index == silenced:
                assert not new[index].any()
            else:
                assert torch.equal(new[index], old[index])


@every_family
def test_silencing_a_heads_slice_of_the_output_projection_removes_what_this_head_writes(family: str) -> None:
    subject = subject_to_change(family)
    block = subject.anatomy.blocks[LAYER]
    assert is_conv1d(block.output.module) == (family == "gpt2")
    z = torch.randn(1, 3, families.HEADS, subject.anatomy.d_head, dtype=torch.float64)
    others = z.clone()
    others[:, :, HEAD] = 0
    with torch.no_grad():
        expected = block.output.module(others.flatten(2))
        silence(block.output, HEAD)
        assert torch.equal(block.output.module(z.flatten(2)), block.output.module(others.flatten(2)))
        torch.testing.assert_close(block.output.module(z.flatten(2)), expected)


@every_family
def test_the_weights_of_a_head_turn_the_residual_stream_into_its_value_and_its_z_into_what_it_writes(family: str) -> None:
    subject = families.subject(family, torch.float64)
    block = subject.anatomy.blocks[LAYER]
    width, model_width = subject.anatomy.d_head, subject.anatomy.d_model
    for reader in (block.query, block.key, block.value):
        assert reader.weight(HEAD).shape == (width, model_width)
    assert block.output.weight(HEAD).shape == (model_width, width)
    x = torch.randn(5, model_width, dtype=torch.float64)
    bias = getattr(block.value.module, "bias", None)
    features = block.value.features(HEAD)
    with torch.no_grad():
        expected = block.value.module(x)[:, features]
        found = x @ block.value.weight(HEAD).T + (0 if bias is None else bias[features])
    torch.testing.assert_close(found, expected)


@every_family
def test_the_features_of_all_heads_cover_the_output_projection_once(family: str) -> None:
    output = families.subject(family).anatomy.blocks[0].output
    assert output.all_features.tolist() == list(range(oriented_weight(output.module).shape[1]))


@every_family
def test_heads_that_share_a_key_have_the_same_features_each_named_once(family: str) -> None:
    anatomy = families.subject(family).anatomy
    key = anatomy.blocks[0].key
    distinct = {tuple(key.features(head).tolist()) for head in range(anatomy.n_heads)}
    assert len(distinct) == anatomy.n_kv_heads
    assert len(key.all_features) == len(set(key.all_features.tolist())) == anatomy.n_kv_heads * anatomy.d_head


@every_family
def test_every_path_leads_to_its_module_in_the_plain_model(family: str) -> None:
    subject = families.subject(family)
    for block in subject.anatomy.blocks:
        assert subject.plain.get_submodule(block.name) is block.module
        assert subject.plain.get_submodule(block.attention_name) is block.attention
        for part in (block.query, block.key, block.value, block.output):
            assert subject.plain.get_submodule(part.name) is part.module
        for name in block.mlp_linears:
            assert oriented_weight(subject.plain.get_submodule(name)).ndim == 2


@every_family
def test_blocks_hold_every_matrix_once_as_attention_or_mlp(family: str) -> None:
    """Count parameters: what the anatomy names as maps are all the matrices inside the blocks."""
    subject = families.subject(family)
    for block in subject.anatomy.blocks:
        named = {part.name for part in (block.query, block.key, block.value, block.output)} | set(block.mlp_linears)
        matrices = {f"{block.name}.{name.removesuffix('.weight')}" for name, p in block.module.named_parameters() if p.ndim == 2}
        assert named == matrices


@every_family
def test_sizes_are_those_of_the_configuration(family: str) -> None:
    subject = families.subject(family)
    size = subject.anatomy
    assert (size.n_layers, size.n_heads, size.d_model, size.vocab_size) == (3, 4, 32, 97)
    assert size.n_kv_heads == getattr(subject.plain.config, "num_key_value_heads", 4)
    assert size.max_positions == 64
    assert list(size.heads()) == [(layer, head) for layer in range(3) for head in range(4)]
    assert size.embedding is subject.plain.get_input_embeddings()
    assert size.unembedding is subject.plain.get_output_embeddings()


def test_a_model_without_an_output_embedding_is_refused() -> None:
    with pytest.raises(ModelError, match=r"GPT2Model has no output embedding: mechscope studies causal language models"):
        load(GPT2Model(families.config("gpt2")))


def test_an_architecture_without_known_readers_is_refused_with_the_lists_found() -> None:
    model = families.build("llama")
    for layer in model.model.layers:
        layer.self_attn.queries = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(ModelError, match=r"llama: of its lists of 3 blocks \(model\.layers\), 0 hold attention modules as known here"):
        discover(model)


def test_a_block_without_attention_or_another_mixer_is_refused() -> None:
    model = families.build("llama")
    model.model.layers[2].self_attn = nn.Identity()
    with pytest.raises(
        ModelError,
        match=r"block model\.layers\.2 has no attention module as known here, and of what else may mix tokens \(linear_attn, mamba, conv\) it has nothing",
    ):
        discover(model)


def test_a_block_without_a_known_mlp_is_refused() -> None:
    model = families.build("llama")
    del model.model.layers[0].mlp
    with pytest.raises(ModelError, match=r"model\.layers\.0 has no MLP under a known name \(mlp"):
        discover(model)


def test_a_family_whose_attention_does_not_go_through_the_interface_is_refused() -> None:
    from mechscope.instrument import load as load_and_check

    model: Any = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ModelError, match=r"bloom"):
        load_and_check(model)
