"""TransformerLens before 4.0, on whose kind of model EAP-IG's code and circuit-tracer run."""

from __future__ import annotations

import importlib
from typing import Any


def config_of(model: Any, **more: Any) -> Any:
    """Return the configuration of a GPT-2."""
    config = model.config
    return importlib.import_module("transformer_lens").HookedTransformerConfig(
        n_layers=config.n_layer,
        n_heads=config.n_head,
        d_model=config.n_embd,
        d_head=config.n_embd // config.n_head,
        d_mlp=4 * config.n_embd,
        d_vocab=config.vocab_size,
        n_ctx=config.n_positions,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=config.layer_norm_epsilon,
        dtype=model.dtype,
        device=str(model.device),
        **more,
    )


def with_weights(made: Any, model: Any) -> Any:
    """Copy the weights of a GPT-2, as they are, into the peer's model of its configuration."""
    convert = importlib.import_module("transformer_lens.pretrained.weight_conversions").convert_gpt2_weights
    as_is = dict.fromkeys(("fold_ln", "fold_value_biases", "center_writing_weights", "center_unembed"), False)
    made.load_and_process_state_dict(convert(model, made.cfg), **as_is)
    return made
