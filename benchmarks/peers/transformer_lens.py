"""The same jobs by TransformerLens 4 (`TransformerBridge`), as its documentation does them, on a copy of the model: it rewires what it is given."""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Job
from benchmarks.models import logit_difference
from benchmarks.peers.cases import (
    PeerCase,
    builder,
    first_text,
    forward,
    last_token,
    mean_entropies,
    stacked,
    text_losses,
    top_log_probabilities,
)
from benchmarks.shapes import Size

BY = "TransformerLens"


def bridge(model: Any) -> Any:
    """Wrap a copy of the model; the peer reads a configuration from a folder."""
    peer = importlib.import_module("transformer_lens.model_bridge")
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return peer.TransformerBridge.boot_transformers(folder, hf_model=copy.deepcopy(model), device=str(model.device))


def _cached(case: PeerCase, *hooks: str) -> Any:
    """Return the cache of the clean run, of these hooks alone."""
    return case.wrapped.run_with_cache(case.ids, names_filter=lambda name: name.endswith(hooks))[1]


@torch.no_grad()
def entropy(case: PeerCase) -> list[Tensor]:
    """Take every head's mean entropy from cached patterns."""
    cache = _cached(case, "attn.hook_pattern")
    return [mean_entropies(cache[f"blocks.{layer}.attn.hook_pattern"]) for layer in case.layers]


@torch.no_grad()
def recording(case: PeerCase) -> list[Tensor]:
    """Cache every residual stream, z and MLP output."""
    sites = ("hook_resid_post", "attn.hook_z", "hook_mlp_out")
    cache = _cached(case, *sites)
    return [cache[f"blocks.{layer}.{site}"] for site in sites for layer in case.layers]


def _swept(
    case: PeerCase, texts: Tensor, hooks: list[tuple[str, Callable[..., Tensor]]], metric: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Run the texts once for each hook."""
    return [metric(case.wrapped.run_with_hooks(texts, fwd_hooks=[hook])) for hook in hooks]


@torch.no_grad()
def patch_heads(case: PeerCase) -> list[Tensor]:
    """Patch every head, clean into corrupt, one forward pass each."""
    cache = _cached(case, "attn.hook_z")

    def put(z: Tensor, hook: Any, name: str, head: int) -> Tensor:
        z[:, :, head] = cache[name][:, :, head]
        return z

    return _swept(case, case.corrupt, _head_hooks(case, put), logit_difference)


def _head_hooks(case: PeerCase, put: Callable[..., Tensor]) -> list[tuple[str, Callable[..., Tensor]]]:
    names = [f"blocks.{layer}.attn.hook_z" for layer in case.layers]
    return [(name, lambda z, hook, name=name, head=head: put(z, hook, name, head)) for name in names for head in case.heads]


@torch.no_grad()
def ablation(case: PeerCase) -> list[Tensor]:
    """Zero every head and MLP, one forward pass each."""

    def zero(z: Tensor, hook: Any, name: str, head: int) -> Tensor:
        z[:, :, head] = 0
        return z

    mlps: list[tuple[str, Callable[..., Tensor]]] = [
        (f"blocks.{layer}.hook_mlp_out", lambda value, hook: torch.zeros_like(value)) for layer in case.layers
    ]
    return _swept(case, case.ids, [*_head_hooks(case, zero), *mlps], lambda logits: text_losses(logits, case.ids))


def attribution(case: PeerCase) -> list[Tensor]:
    """Attribute the logit difference to every head: (clean − corrupt) · gradient of the corrupt run."""
    with torch.no_grad():
        clean = _cached(case, "attn.hook_z")
    kept: dict[str, Tensor] = {}

    def keep(z: Tensor, hook: Any, name: str) -> Tensor:
        z.retain_grad()
        kept[name] = z
        return z  # or the model goes on with the unsplit tensor, and no gradient comes by here

    names = [f"blocks.{layer}.attn.hook_z" for layer in case.layers]
    hooks = [(name, lambda z, hook, name=name: keep(z, hook, name)) for name in names]
    logits = case.wrapped.run_with_hooks(case.corrupt, fwd_hooks=hooks)
    logit_difference(logits).sum().backward()
    found = []
    for name in names:
        z = kept[name]
        if z.grad is None:
            raise RuntimeError(f"{name} has no gradient")
        # (text, token, head, feature) to (head, text)
        found.append(((clean[name] - z.detach()) * z.grad).sum((1, 3)).T)
    case.wrapped.zero_grad()
    return found


@torch.no_grad()
def lens(case: PeerCase) -> list[Tensor]:
    """Read the five likeliest tokens behind every block from cached residual streams."""
    cache = _cached(case, "hook_resid_post")
    model = case.wrapped
    return [top_log_probabilities(model.unembed(model.ln_final(cache[f"blocks.{layer}.hook_resid_post"]))) for layer in case.layers]


def _job(
    name: str,
    how: str,
    run: Callable[[PeerCase], list[Tensor]],
    sizes: dict[str, Size],
    numbers: Callable[[list[Tensor]], Any],
    **more: Any,
) -> Job:
    return Job(
        name=name,
        what=f"the same {how}",
        build=builder(bridge, maps=run is entropy),
        run=run,
        sizes=sizes,
        forward=forward,
        numbers=numbers,
        by=BY,
        package="transformer_lens",
        **more,
    )


# sweeps run the model hundreds of times
_LONG, _SWEPT = Size(1, 4096), Size(1, 1024)
_CACHED = {"small": Size(1, 1024), "long": _LONG}
JOBS = (
    _job("entropy", "from cached patterns", entropy, _CACHED, stacked, rounds=3, seconds=55),
    _job("recording", "by run_with_cache", recording, {"small": Size(8, 64), "long": _LONG}, last_token, seconds=35),
    _job("patch_heads", "by run_with_hooks", patch_heads, {"small": Size(8, 16), "long": _SWEPT}, stacked, rounds=1, slow=True, seconds=65),
    _job("ablation", "by run_with_hooks", ablation, {"small": Size(8, 64), "long": _SWEPT}, stacked, rounds=1, slow=True, seconds=200),
    _job("attribution", "by hooks and one backward pass", attribution, {"small": Size(8, 16)}, stacked, seconds=35),
    _job("lens", "from the cache", lens, {"small": Size(8, 128), "long": _LONG}, first_text, rounds=2, seconds=65),
)
