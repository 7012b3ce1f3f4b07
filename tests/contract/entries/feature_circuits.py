"""The contract of latents and errors as nodes: effects, edges, patching, faithfulness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mechscope import features
from mechscope.causal import ablate, attribution_patch, mean_of, patch
from mechscope.data.two_labels import TwoLabels
from mechscope.features import Dictionary, Rule
from mechscope.features.shift import _Pooled
from mechscope.instrument import Execution
from tests import families
from tests.contract.technique import Case, Result, Technique, columns


def _dictionary(layout: features.Layout) -> Dictionary:
    """Return random directions, of which some are active everywhere and none for want of a digit."""
    return Dictionary.plain(layout, layout.tensors(seed=1, dtype=torch.float64))


def _standing(case: Case) -> tuple[features.Standing, ...]:
    layouts = (
        features.autoencoder("resid0", families.WIDTH, 30, Rule("topk", 6)),
        features.autoencoder("a1", families.WIDTH, 30, Rule("relu")),
        features.autoencoder("m1", families.WIDTH, 30, Rule("topk", 6)),
    )
    return features.in_order([features.Standing.of(_dictionary(layout), case.subject) for layout in layouts])


def node_effects(case: Case, execution: Execution) -> Result:
    """Estimate what latents and errors do."""
    found = features.node_effects(case.subject, _standing(case), case.pairs, points=2, execution=execution)
    return columns(found.table)


def node_edges(case: Case, execution: Execution) -> Result:
    """Estimate what latents do through each other."""
    nodes = [features.Node.parse(name) for name in ("resid0.f1", "resid0.error", "a1.f2", "a1.f9", "m1.f3", "m1.error")]
    return columns(features.node_edges(case.subject, _standing(case), case.pairs, nodes, method="attribution", execution=execution))


def node_means(case: Case, execution: Execution) -> Result:
    """Average latents."""
    found = features.node_means(case.subject, _standing(case), case.pairs, execution=execution)
    return {f"{place.name} {name}": getattr(means, name).cpu().numpy() for place, means in found.items() for name in ("x", "latents")}


def patch_nodes(case: Case, execution: Execution) -> Result:
    """Replace latents and errors."""
    nodes = [features.Node.parse(name) for name in ("resid0.f1", "a1.error", "m1.f3")]
    found = features.patch_nodes(case.subject, _standing(case), case.pairs, nodes, execution=execution)
    places = features.patch_places(case.subject, _standing(case), case.pairs, filling="zero", execution=execution)
    return {"nodes": found, "places": places}


def feature_faithfulness(case: Case, execution: Execution) -> Result:
    """Judge a circuit of latents."""
    nodes = [features.Node.parse(name) for name in ("resid0.f1", "a1.error", "m1.f3", "a1.f7")]
    active = {each.place: range(30) for each in _standing(case)}
    found = features.faithfulness(case.subject, _standing(case), case.pairs, nodes, active=active, draws=1, execution=execution)
    return columns(found)


LATENTS = "a1.f2,a1.f9,m1.f3,resid0.f1"


def ablate_latents(case: Case, execution: Execution) -> Result:
    """Ablate latents to their means."""
    means = mean_of(case.subject, case.pairs, [], standing=_standing(case), execution=execution)
    found = ablate(
        case.subject, case.pairs, sites=["latent"], source=means, components=LATENTS, standing=_standing(case), execution=execution
    )
    # of a latent that is silent at these tokens rounding decides the p
    return {"values": found.values}


def patch_latents(case: Case, execution: Execution) -> Result:
    """Patch latents at some tokens."""
    found = patch(
        case.subject, case.pairs, site="latent", positions=[2, 4], components=LATENTS, standing=_standing(case), execution=execution
    )
    # of a latent that is silent at these tokens rounding decides the p
    return {"values": found.values}


def attribute_latents(case: Case, execution: Execution) -> Result:
    """Estimate what patching latents does."""
    found = attribution_patch(case.subject, case.pairs, site="latent", standing=_standing(case), execution=execution)
    return columns(found.table)


@dataclass(frozen=True)
class _Direction:
    """A probe that was not fitted: fits of so few texts are no claim of the contract."""

    direction: np.ndarray


def shift_effects(case: Case, execution: Execution) -> Result:
    """Average activations with latents ablated, and estimate what latents do to a probe of them."""
    pooled = _Pooled(case.subject, _standing(case), features.Place.parse("resid1"), execution)
    labels = np.arange(len(case.pairs)) % 2 == 0
    probe: Any = _Direction(np.linspace(-1, 1, families.WIDTH))
    (effects,) = pooled.effects(TwoLabels(case.pairs, labels, labels), (labels, probe))
    nodes = [features.Node.parse(name) for name in ("resid0.f1", "a1.f2")]
    return {"x": pooled(case.pairs, nodes)} | {place.name: values for place, values in effects.items()}


TECHNIQUES: dict[str, Technique] = {
    "node_effects": node_effects,
    "node_edges": node_edges,
    "node_means": node_means,
    "patch_nodes": patch_nodes,
    "feature_faithfulness": feature_faithfulness,
    "shift effects": shift_effects,
    "ablate latents": ablate_latents,
    "patch latents": patch_latents,
    "attribute latents": attribute_latents,
}
