"""What reads or writes otherwise than circuits assume is refused by name; families that were never thought of work if they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BitNetConfig,
    CohereConfig,
    DeepseekV3Config,
    Exaone4Config,
    Glm4Config,
    GPTBigCodeConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    NemotronConfig,
    Olmo2Config,
    OlmoConfig,
    PersimmonConfig,
    SmolLM3Config,
    StableLmConfig,
)

from mechscope.circuits.attribution import attribute_edges
from mechscope.circuits.forward import CircuitRuns
from mechscope.data.pairs import collate_pairs
from mechscope.errors import ModelError
from mechscope.instrument.wiring import Wiring
from mechscope.subject.load import load
from mechscope.weights import position_turn
from tests import families
from tests.causal.pairs import random_pairs


def model_of(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    families.randomize(model)
    return model.to(dtype).eval()


# what is refused

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Olmo2Config(**SIZES), "olmo2: the query of a head depends on other heads"),
        (
            BitNetConfig(**SIZES, num_key_value_heads=2),
            r"bitnet: something \(a norm, a gate\) stands between the heads of block 0 and what they write",
        ),
        (
            DeepseekV3Config(
                **SIZES, first_k_dense_replace=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12
            ),
            r"deepseek_v3: the queries, keys and values of block 0 read different things \(its keys and values come from a latent",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_families_that_read_or_write_otherwise_are_refused_by_name(config: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        Wiring(load(model_of(config)))


def test_a_residual_stream_that_is_normalised_itself_is_refused() -> None:
    opt = families.build("opt", torch.float64, do_layer_norm_before=False)
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 97, "pad_token_id": 0}
    bart = model_of(
        BartConfig(**sizes, encoder_layers=2, encoder_attention_heads=4, bos_token_id=1, eos_token_id=2, is_encoder_decoder=False)
    )
    for model in (opt, bart):
        with pytest.raises(ModelError, match=r"block 0 does more than add what its heads and MLP write"):
            Wiring(load(model))


def test_a_model_with_parallel_blocks_and_others_is_refused() -> None:
    model = families.build("gpt_neox", use_parallel_residual=True)
    model.gpt_neox.layers[1].use_parallel_residual = False
    with pytest.raises(ModelError, match="gpt_neox: some blocks are parallel and others are not"):
        Wiring(load(model))


def test_a_block_that_scales_what_its_mlp_adds_is_refused() -> None:
    model = families.build("llama", torch.float64)

    class Twice(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.self_attn, self.mlp, self.block = block.self_attn, block.mlp, [block]
            self.input_layernorm, self.post_attention_layernorm = block.input_layernorm, block.post_attention_layernorm

        def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
            after = self.block[0](hidden_states, **given)
            return hidden_states + 1.5 * (after - hidden_states)

    model.model.layers[2] = Twice(model.model.layers[2])
    with pytest.raises(ModelError, match="llama: block 2 does more than add"):
        Wiring(load(model))


# families beyond the tested ones


# their LayerNorms follow the model's type
PLAIN_NORMS = ("stablelm", "persimmon", "gpt_bigcode")
OTHERS = [
    CohereConfig(**SIZES, num_key_value_heads=2, use_qk_norm=True),  # norms of each head, parallel, a mean but no bias
    StableLmConfig(**SIZES, num_key_value_heads=2, use_parallel_residual=True, qk_layernorm=True),
    PersimmonConfig(**SIZES, qk_layernorm=True),  # fused and interleaved
    GPTBigCodeConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),  # one key for all
    NemotronConfig(**SIZES, num_key_value_heads=2),  # LayerNorm of weight + 1
    Exaone4Config(
        **SIZES, num_key_value_heads=2, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),  # norms only behind attention and MLP
    SmolLM3Config(**SIZES, num_key_value_heads=2),  # every fourth layer without rotary embedding
    GraniteConfig(**SIZES, num_key_value_heads=2, residual_multiplier=0.5, logits_scaling=2.0),  # factors on what blocks add
    OlmoConfig(**SIZES),  # norms without weights, whose eps stands in the code
    Glm4Config(**SIZES, num_key_value_heads=2, head_dim=8),  # norms in front of and behind attention and MLP
    HyperCLOVAXConfig(**SIZES, num_key_value_heads=2, residual_multiplier=0.7),  # both
]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.model_type)
def test_a_family_nobody_thought_of_works_if_it_reads_and_writes_plainly(config: Any) -> None:
    subject = load(model_of(config))
    runs = CircuitRuns(subject, collate_pairs(random_pairs(3).pairs, padding="left"))
    every = torch.ones(1, len(runs.graph), dtype=torch.float64, requires_grad=True)  # with a gradient no layer is skipped
    found = runs.run(every)[0]
    allowed = 1e-9 if runs.wiring.attention_norm(0) is not None and config.model_type in PLAIN_NORMS else 1e-6
    torch.testing.assert_close(found.detach(), runs.clean, rtol=0, atol=allowed)
    torch.testing.assert_close(runs.run(torch.zeros(1, len(runs.graph)))[0], runs.corrupt, rtol=0, atol=allowed)
    for pair, expected in zip(random_pairs(3).pairs, runs.clean, strict=True):
        logits = subject.model(torch.tensor([pair.clean])).logits[0, -1].detach()
        difference = logits[list(pair.answers)].mean() - logits[list(pair.wrong_answers)].mean()
        torch.testing.assert_close(difference, expected, rtol=0, atol=allowed)
    (gradient,) = torch.autograd.grad(found.mean(), every)
    scores = attribute_edges(subject, random_pairs(3), method="eap").mean
    assert gradient.abs().max() > 1e-2
    torch.testing.assert_close(torch.from_numpy(scores), -gradient[0], rtol=0, atol=10 * allowed)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
@torch.no_grad()
def test_a_layer_whose_heads_write_nothing_does_not_hide_how_blocks_are_built(family: str) -> None:
    model = families.build(family)
    for parameter in load(model).anatomy.blocks[1].output.module.parameters():
        parameter.zero_()
    assert Wiring(load(model)).parallel == Wiring(families.subject(family)).parallel == (family == "gpt_neox")


def test_heads_behind_a_latent_are_not_run_from_projections_of_their_own() -> None:
    config = DeepseekV3Config(
        **SIZES, first_k_dense_replace=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12
    )
    subject = load(model_of(config))
    with pytest.raises(ModelError, match="deepseek_v3: keys and values of block 1 come from a latent"):
        position_turn(subject, 1)
