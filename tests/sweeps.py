"""Every sweep over pairs that goes through `Gathered`, small: what it finds of each text, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from mechscope.causal import (
    Direction,
    Effects,
    ablate,
    attribute,
    cross_patch,
    flow,
    patch,
    patch_paths,
    run_worlds,
    scrub,
    sweep_strength,
    trace,
)
from mechscope.circuits import Circuit, Graph, Scores, attribute_edges, evaluate
from mechscope.circuits.exact import exact_effects
from mechscope.circuits.routes import flow_routes
from mechscope.lens import attribute_logits, spectrum, suppress
from mechscope.lens.spectroscopy import bands
from mechscope.subject import Pair, Subject, pair
from tests import families
from tests.causal.pairs import random_pairs

Found = dict[str, np.ndarray]

SUBJECT: Subject = families.subject("gpt2", torch.float64)
# three batches of two texts
PAIRS = random_pairs(6, lengths=(9, 10))
EQUALLY_LONG = random_pairs(6, lengths=(9,))
TOKENS = 20


@lru_cache
def models() -> Pair:
    """Return the model beside one that differs a little."""
    return pair(SUBJECT, families.subject("gpt2", torch.float64, seed=1))


def _numbers(found: Effects) -> Found:
    every = {"values": found.values, "unchanged": found.unchanged, "clean": found.clean, "corrupt": found.corrupt}
    return {name: values for name, values in every.items() if values is not None}


def _exchanged(by: Any, options: dict[str, Any]) -> Found:
    found = cross_patch(models(), PAIRS, levels=("attention", "mlp"), by=by, **options)
    return {f"{into} {name}": values for into, one in found.items() for name, values in _numbers(one).items()}


def _per_text(found: Scores) -> Found:
    assert found.per_text is not None
    return {"per text": found.per_text, "mean": found.mean}


def _evaluated(options: dict[str, Any]) -> Found:
    graph = Graph.of(SUBJECT)
    half = Circuit(graph, np.random.default_rng(0).random(len(graph)) < 0.5)
    found = evaluate(SUBJECT, PAIRS, [half, Circuit(graph, np.ones(len(graph), dtype=bool))], **options)
    return {"values": found.values, "clean": found.clean, "empty": found.empty}


def _scrubbed(options: dict[str, Any]) -> Found:
    found = scrub(SUBJECT, EQUALLY_LONG, {"layers:1": None, "a2.h1": [0, 1, 0, 1, 0, 1]}, samples=2, **options)
    return {"full": found.full, "everything": found.everything, "scrubbed": found.scrubbed}


def _steered(options: dict[str, Any]) -> Found:
    direction = Direction.from_vector(torch.linspace(-1, 1, families.WIDTH, dtype=torch.float64), layer=1)
    found = sweep_strength(SUBJECT, direction, PAIRS, PAIRS, strengths=(-1, 2), tokens_per_batch=options["tokens_per_batch"])
    return {name: found[name].to_numpy() for name in ("n", "value", "mean", "se")}


def _worlds(options: dict[str, Any]) -> Found:
    worlds = {"one": {"a1.h2": "corrupt", "m2": "zero"}, "two": {"layers:1": "corrupt"}}
    return _numbers(run_worlds(SUBJECT, PAIRS, worlds, tokens_per_batch=options["tokens_per_batch"]))


def _attributed(options: dict[str, Any]) -> Found:
    found = attribute_logits(SUBJECT, PAIRS, neurons=(1,), **options)
    return {"effects": found.effects, "neurons": found.neurons[1], "values": found.values}


def _spectral(options: dict[str, Any]) -> Found:
    found = spectrum(SUBJECT, PAIRS, using=bands(SUBJECT, n=4), **options)
    return {name: found[name].to_numpy() for name in ("share_of_norm", "share_of_norm_se", "n")}


def _suppressed(options: dict[str, Any]) -> Found:
    found = suppress(SUBJECT, PAIRS, [1], using=bands(SUBJECT, n=4), **options)
    return {name: found[name].to_numpy() for name in ("loss", "loss_suppressed", "loss_change_se", "n")}


def _traced(options: dict[str, Any]) -> Found:
    return _numbers(trace(SUBJECT, PAIRS, segment="beginning", samples=2, **options))


# by name: the sweep, given progress and tokens per batch
SWEEPS: dict[str, Callable[[dict[str, Any]], Found]] = {
    "patch": lambda options: _numbers(patch(SUBJECT, PAIRS, positions="each", **options)),
    "attribute": lambda options: _numbers(attribute(SUBJECT, PAIRS, metric="kl", check=3, **options)),
    "ablate": lambda options: _numbers(ablate(SUBJECT, PAIRS, sites=("mlp",), source="zero", **options)),
    "patch paths": lambda options: _numbers(patch_paths(SUBJECT, PAIRS, "a0.h1,a1.h2,m1", ["logits", "a2.h1<k>"], **options)),
    "flow": lambda options: _numbers(flow(SUBJECT, PAIRS, ("beginning", "changed fact", "last"), **options)),
    "exchange activations": lambda options: _exchanged("activations", options),
    "exchange weights": lambda options: _exchanged("weights", options),
    "trace": _traced,
    "scrub": _scrubbed,
    "steer": _steered,
    "worlds": _worlds,
    "edges": lambda options: _per_text(attribute_edges(SUBJECT, PAIRS, method="eap-ig", steps=2, **options)),
    "edges by activations": lambda options: _per_text(attribute_edges(SUBJECT, PAIRS, method="eap-ig-activations", steps=2, **options)),
    "exact edges": lambda options: _per_text(exact_effects(SUBJECT, PAIRS, edges=Graph.of(SUBJECT).names[::20], **options)),
    "routes": lambda options: _per_text(flow_routes(SUBJECT, PAIRS, **options)),
    "circuits": _evaluated,
    "logit attribution": _attributed,
    "spectrum": _spectral,
    "suppress": _suppressed,
}
