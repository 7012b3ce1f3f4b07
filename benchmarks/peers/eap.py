"""EAP, EAP-IG and the evaluation of circuits by their authors' code (Hanna et al. 2024), on a copy of the model in the kind of model it runs.

That is TransformerLens before 4.0. The code is on no package index as `eap`: put the repository's `src` on PYTHONPATH of a Python that has the older
TransformerLens, and name that Python with `--peers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.harness import Job
from benchmarks.models import half_of, logit_difference
from benchmarks.peers.cases import PeerCase, builder, forward
from benchmarks.peers.older_lens import config_of, with_weights
from benchmarks.shapes import Size

BY = "EAP-IG's code"
STEPS = 5


class OnDevice(TorchFunctionMode):
    """Creates on the model's device what the authors' code asks to be created on a GPU."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        asked = kwargs or {}
        return func(*args, **(asked | {"device": self.device} if asked.get("device") == "cuda" else asked))


def hooked(model: Any) -> tuple[Any, Any]:
    """Copy the weights, as they are, into the kind of model the authors' code runs, and make its graph."""
    hooks = dict.fromkeys(("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"), True)
    made = with_weights(importlib.import_module("transformer_lens").HookedTransformer(config_of(model, **hooks)), model)
    return made, importlib.import_module("eap.graph").Graph.from_model(made)


def _tokens(_: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    return ids, torch.ones_like(ids), torch.full((len(ids),), ids.shape[1]), ids.shape[1]


def _module(name: str) -> Any:
    found: Any = importlib.import_module(f"eap.{name}")
    found.tokenize_plus = _tokens  # the texts are token ids already
    return found


def _scored(case: PeerCase, method: str) -> np.ndarray:
    """Return the authors' scores, ``(sender, receiver)``; their order of nodes is mechscope's."""
    model, graph = case.wrapped

    def metric(logits: Tensor, *_: Any) -> Tensor:
        return logit_difference(logits).sum()

    with OnDevice(str(case.model.device)):
        _module("attribute").attribute(model, graph, [(case.ids, case.corrupt, None)], metric, method, ig_steps=STEPS, quiet=True)
    return graph.scores.detach().cpu().numpy()


def eap(case: PeerCase) -> np.ndarray:
    """Score every edge by attribution patching."""
    return _scored(case, "EAP")


def eap_ig(case: PeerCase) -> np.ndarray:
    """Score every edge by attribution patching with gradients integrated over inputs."""
    return _scored(case, "EAP-IG-inputs")


def evaluate(case: PeerCase) -> np.ndarray:
    """Run the model with a random half of the edges, the corrupt run included; there is no way to keep that run for further circuits."""
    model, graph = case.wrapped
    graph.in_graph[:] = half_of(*graph.in_graph.shape).to(graph.in_graph.device) & graph.real_edge_mask
    graph.nodes_in_graph[:] = True

    def metric(logits: Tensor, *_: Any) -> Tensor:
        return logit_difference(logits)

    with OnDevice(str(case.model.device)):
        found = _module("evaluate").evaluate_graph(model, graph, [(case.ids, case.corrupt, None)], metric, quiet=True)
    return found.cpu().numpy()


def _flat(found: np.ndarray) -> np.ndarray:
    return found.ravel()


JOBS = tuple(
    Job(
        name=name,
        what="the same by the authors' code",
        build=builder(hooked),
        run=run,
        sizes={"small": Size(16, 16), "long": Size(1, 1024)},
        forward=forward,
        numbers=_flat,
        by=BY,
        package="eap",
        rounds=1,
        slow=True,
        seconds=seconds,
    )
    for name, run, seconds in (("eap", eap, 70), ("eap_ig", eap_ig, 170), ("prepare_and_evaluate", evaluate, 60))
)
