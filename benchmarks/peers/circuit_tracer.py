"""Attribution graphs by circuit-tracer (its TransformerLens backend), on a copy of the model in the kind of model it runs.

It is on no package index: put the repository on PYTHONPATH of a Python that has TransformerLens before 4.0, transformers before 5 and what else the
repository asks for, and name that Python with `--peers`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Job
from benchmarks.peers.cases import PeerCase, build, forward
from benchmarks.peers.older_lens import config_of, with_weights
from benchmarks.settings import Settings
from benchmarks.shapes import Size
from benchmarks.transcoders import FIRST, make_transcoders

BY = "circuit-tracer"
# its default is 512: with 64 tokens that takes more memory than time is saved
BATCH = 256


def build_graph(settings: Settings, size: Size) -> PeerCase:
    """Make the model, and the peer's with the transcoders in it."""
    case = build(settings, size, wrap=lambda model: model)
    return replace(case, wrapped=replaced(case.model, case.ids))


def replaced(model: Any, ids: torch.Tensor) -> Any:
    """Copy the weights, as they are, into the peer's replacement model."""
    peer = importlib.import_module("circuit_tracer.replacement_model.replacement_model_transformerlens").TransformerLensReplacementModel
    made = with_weights(peer(config_of(model, model_name="gpt2")), model)
    made._configure_replacement_model(transcoders(model, ids))
    # a prompt of token ids, whose first counts as special: nothing is put before it
    special = [int(ids[0, 0])]
    made.tokenizer = SimpleNamespace(all_special_ids=special, decode=str, padding_side="right", vocab_size=model.config.vocab_size)
    return made


def transcoders(model: Any, ids: torch.Tensor) -> Any:
    """Make the peer's transcoders with the same weights."""
    kind = importlib.import_module("circuit_tracer.transcoder.single_layer_transcoder")
    rule = importlib.import_module("circuit_tracer.transcoder.activation_functions").JumpReLU
    made = {}
    for layer, tensors in enumerate(make_transcoders(model, ids)):
        latents, width = tensors["encoder"].shape
        one = kind.SingleLayerTranscoder(width, latents, rule(tensors["threshold"]), layer, device=model.device, dtype=model.dtype)
        with torch.no_grad():
            for name, own in (("W_enc", "encoder"), ("W_dec", "decoder"), ("b_enc", "encoder_bias"), ("b_dec", "decoder_bias")):
                getattr(one, name).copy_(tensors[own])
        made[layer] = one
    return kind.TranscoderSet(made, "mlp.hook_in", "hook_mlp_out", "random")


def graph(case: PeerCase) -> Any:
    """Make the graph, with an edge into every active latent."""
    attribute = importlib.import_module("circuit_tracer.attribution.attribute_transformerlens").attribute
    return attribute(case.ids[0], case.wrapped, max_n_logits=10, desired_logit_prob=1.0, batch_size=BATCH)


def numbers(made: Any) -> np.ndarray:
    """Return what latents and errors add to logits, and the sums of |edges| from both of every latent, without the first tokens' errors."""
    latents, tokens, logits = len(made.selected_features), made.n_pos, len(made.logit_targets)
    edges = made.adjacency_matrix.float().cpu().numpy()
    errors = latents + np.arange(made.cfg.n_layers * tokens).reshape(-1, tokens)[:, FIRST:].ravel()
    sources = np.concatenate([np.arange(latents), errors])
    return np.concatenate([edges[-logits:][:, sources].ravel(), np.abs(edges[:latents][:, sources]).sum(axis=1)])


JOBS = (
    Job(
        name="attribution_graph",
        what="the same by circuit-tracer",
        build=build_graph,
        run=graph,
        sizes={"small": Size(1, 64)},
        forward=forward,
        numbers=numbers,
        by=BY,
        package="circuit_tracer",
        rounds=1,
        slow=True,
        seconds=300,
    ),
)
