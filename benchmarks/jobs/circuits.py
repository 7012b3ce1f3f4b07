"""Edge attribution and the evaluation of circuits, over all edges: 32,491 in GPT-2 small's shape."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Job
from benchmarks.jobs.cases import PairsCase, build, forward
from benchmarks.models import half_of
from benchmarks.shapes import Size
from mechscope.circuits.attribution import attribute_edges
from mechscope.circuits.forward import CircuitRuns
from mechscope.circuits.graph import Graph
from mechscope.circuits.scores import EdgeScores
from mechscope.data.pairs import collate_pairs

STEPS = 5
_SIZES = {"small": Size(16, 16), "long": Size(1, 1024)}


def eap(case: PairsCase) -> EdgeScores:
    """Score every edge by attribution patching."""
    return attribute_edges(case.subject, case.pairs, method="eap")


def eap_ig(case: PairsCase) -> EdgeScores:
    """Score every edge by attribution patching with gradients integrated over inputs."""
    return attribute_edges(case.subject, case.pairs, method="eap-ig", steps=STEPS)


@torch.no_grad()
def evaluate(case: PairsCase) -> Tensor:
    """Run the model with a random half of the edges, both runs of the batch at hand."""
    return _prepared(case).run(_half(case))


@torch.no_grad()
def prepare_and_evaluate(case: PairsCase) -> Tensor:
    """Run the model with a random half of the edges, from the texts on."""
    return CircuitRuns(case.subject, collate_pairs(tuple(case.pairs))).run(_half(case))


@lru_cache(maxsize=1)
def _prepared(case: PairsCase) -> CircuitRuns:
    return CircuitRuns(case.subject, collate_pairs(tuple(case.pairs)))


@lru_cache(maxsize=1)
def _half(case: PairsCase) -> Tensor:
    graph = Graph(case.subject.anatomy.n_layers, case.subject.anatomy.n_heads)
    senders, receivers = torch.from_numpy(graph.edges).T
    return half_of(len(graph.senders), len(graph.receivers))[senders, receivers][None]


def per_text(found: Tensor) -> np.ndarray:
    """Return the only circuit's metric of every text."""
    return found[0].cpu().numpy()


def by_nodes(found: EdgeScores) -> np.ndarray:
    """Return the scores as ``(sender, receiver)``, as the code of EAP-IG's authors orders them; 0 where there is no edge."""
    return found.graph.matrix(found.mean).ravel()


JOBS = (
    Job(
        name="eap",
        what="EAP of all edges",
        build=build,
        run=eap,
        sizes=_SIZES,
        forward=forward,
        numbers=by_nodes,
        ratio=4.5,
        seconds=30,
    ),
    Job(
        name="eap_ig",
        what=f"EAP-IG of all edges, m = {STEPS}",
        build=build,
        run=eap_ig,
        sizes=_SIZES,
        forward=forward,
        numbers=by_nodes,
        ratio=14,
        seconds=50,
    ),
    Job(
        name="eap_ig_texts",
        what=f"EAP-IG of all edges, m = {STEPS}, longer texts",
        build=build,
        run=eap_ig,
        sizes={"small": Size(8, 128)},
        forward=forward,
        gib=1.2,
        rounds=2,
        slow=True,
        seconds=65,
    ),
    Job(
        name="evaluate",
        what="metric of a circuit of half of all edges",
        build=build,
        run=evaluate,
        sizes=_SIZES,
        forward=forward,
        ratio=3,
        seconds=25,
    ),
    Job(
        name="prepare_and_evaluate",
        what="metric of a circuit of half of all edges, clean and corrupt run included",
        build=build,
        run=prepare_and_evaluate,
        sizes=_SIZES,
        forward=forward,
        numbers=per_text,
        seconds=30,
    ),
)
