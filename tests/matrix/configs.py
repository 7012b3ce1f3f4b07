"""A tiny configuration of every causal language model that the installed transformers knows.

Sizes are set under whatever names a family's configuration has for them; what a family needs besides (lists as long as the model is deep, ranks of latents,
sizes that must divide each other) stands in a table of its own, by model type.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, HEADS, WIDTH, VOCABULARY, POSITIONS = 3, 4, 32, 97, 64

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "dim_model", "embedding_size", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "dim_ff", "d_inner"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), POSITIONS),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_ffn_dim",), 48),
    "head_dim": 8,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "top_k"), 2),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
            "intermediate_size_mlp",
        ),
        24,
    ),
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    # other mixers
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups",), 1),
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "mamba_dt_rank": 4,
    "mamba_d_ssm": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "sliding_window": 5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    # recordings compare without noise
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"), 0.0),
}
# one layer of each kind; the last one attends to everything, so that nothing hides behind a window
_HYBRID = ["linear_attention", "full_attention", "linear_attention"]
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
# as many keys as queries, behind a latent
_MLA = {"num_key_value_heads": HEADS}
_MAMBA: dict[str, Any] = {"mamba_expand": 2}
_SPECIAL: dict[str, dict[str, Any]] = {
    **{
        family: dict(_MLA)
        for family in (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
            "youtu",
        )
    },
    **{
        family: {"encoder_layers": LAYERS}
        for family in (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "pegasus",
            "plbart",
            "trocr",
            "whisper",
        )
    },
    **{
        family: {"layer_types": _HYBRID}
        for family in ("qwen3_next", "qwen3_5_text", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid", "minimax")
    },
    **{family: {"layer_types": _WINDOWS} for family in ("gemma3_text", "gpt_oss", "cohere2", "olmo3")},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "roc_bert": {"pronunciation_vocab_size": 97, "shape_vocab_size": 97},
    "reformer": {"is_decoder": True},
    "gemma4_text": {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba"]},
    "zaya": {"num_experts_per_tok": 1},
}
# models of text and pictures that load as causal language models: their text model, and a small eye
_WHOLE = {"gemma3": "gemma3_text"}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
# set under a property or not at all
_UNSETTABLE = {
    "falcon": {"head_dim"},
    "mamba2": {"head_dim", "num_heads"},
    "xlstm": {"v_head_dim"},
    "prophetnet": {"num_hidden_layers"},
    "xlnet": {"max_position_embeddings"},
}


def families() -> dict[str, str]:
    """Return the causal language models of the installed transformers: class by model type."""
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(family: str) -> Any:
    """Return a family's tiny configuration.

    Raises:
        Exception: The family's configuration cannot be made small by its sizes alone.
    """
    if family in _WHOLE:
        return CONFIG_MAPPING[family](text_config=tiny(_WHOLE[family]).to_dict(), vision_config=_VISION)
    default = CONFIG_MAPPING[family]()
    text = default.get_text_config()
    names = {field for field in dir(type(text)) if not field.startswith("_")} | set(text.to_dict())
    left_out = _UNSETTABLE.get(family, set()) | set(getattr(text, "attribute_map", {}))
    if "qk_rope_head_dim" in names:  # of which the width of heads follows
        left_out |= {"head_dim"}
    known = {name: value for name, value in _SIZES.items() if name in names and name not in left_out}
    return type(text)(**{**known, **_SPECIAL.get(family, {})})
