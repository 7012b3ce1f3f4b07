"""Every sweep over texts that is halved where memory runs out, small: what it finds, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch

from mechscope.adapt.generate import Decoding, summarize
from mechscope.adapt.loss import Collator, mean_loss
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
from mechscope.causal.das import random_alignment
from mechscope.causal.sources import mean_of
from mechscope.causal.steering import difference_of_means
from mechscope.circuits import Circuit, Graph, Scores, attribute_edges, evaluate
from mechscope.circuits.acdc import acdc
from mechscope.circuits.cards import component_cards
from mechscope.circuits.exact import exact_effects
from mechscope.circuits.routes import flow_routes
from mechscope.circuits.written import Written
from mechscope.data.pairs import PairBatch
from mechscope.heads.attention import run_probes
from mechscope.instrument import AttentionCall
from mechscope.lens import attribute_logits, spectrum, suppress
from mechscope.lens.backward import backward_lens, gradient_directions
from mechscope.lens.logit_lens import read
from mechscope.lens.spectroscopy import bands
from mechscope.lens.token_attribution import attribute_positions, attribute_sources
from mechscope.subject import Pair, Subject, pair
from mechscope.weights.activity import neuron_activity
from mechscope.weights.activity_change import activity_change
from tests import families
from tests.causal.pairs import random_pairs
from tests.difference import oracle

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


def _in_batches(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a sweep that tells of no progress."""
    return {"tokens_per_batch": options["tokens_per_batch"]}


def _columns(table: pd.DataFrame) -> Found:
    """Return a table's numbers, lists of tokens, and texts letter by letter."""
    found = {}
    for name, column in table.items():
        if column.dtype.kind in "biuf":
            found[str(name)] = column.to_numpy()
        elif len(column) and isinstance(column.iloc[0], tuple) and isinstance(column.iloc[0][0], int):
            found[str(name)] = np.array(column.tolist())
        else:
            found[str(name)] = _letters(*map(str, column))
    return found


def _letters(*texts: str) -> np.ndarray:
    return np.frombuffer("\n".join(texts).encode(), dtype=np.uint8)


def _means(options: dict[str, Any]) -> Found:
    of_all = mean_of(SUBJECT, PAIRS, ("embedding", "z"), **_in_batches(options))
    by_position = mean_of(SUBJECT, EQUALLY_LONG, ("mlp_output",), per_position=True, **_in_batches(options))
    return {f"{site} {layer}": value.numpy() for (site, layer), value in (of_all.values | by_position.values).items()}


def _written(options: dict[str, Any]) -> Found:
    found = Written.mean_over(SUBJECT, PAIRS, **_in_batches(options))
    return {str(index): part.numpy() for index, part in enumerate(found.parts)}


def _searched(options: dict[str, Any]) -> Found:
    found = acdc(SUBJECT, PAIRS, thresholds=(0.01, 0.1), edges=Graph.of(SUBJECT).names[::10], **_in_batches(options))
    circuits = np.stack([circuit.edges for circuit in found.circuits])
    return {"circuits": circuits, "values": found.values, "clean": np.array(found.clean), "scores": found.scores.mean}


def _probed(options: dict[str, Any]) -> Found:
    def beginning(call: AttentionCall, batch: PairBatch) -> torch.Tensor:
        return call.z[:, :5].sum((1, 3)) + batch.real.sum(1)[:, None]

    return {"found": run_probes(SUBJECT, PAIRS, beginning, **options)}


def _read(options: dict[str, Any]) -> Found:
    found = read(SUBJECT, PAIRS, sites=("residual", "head_output"), k=3, **options)
    names = ("tokens", "targets", "log_probability", "rank", "entropy", "kl", "top")
    return {name: np.concatenate([getattr(text, name).ravel() for text in found.texts]) for name in names}


def _changed_activity(options: dict[str, Any]) -> Found:
    # memory runs out in the tuned model, when the base has run
    both = pair(families.subject("gpt2", torch.float64, seed=1), SUBJECT)
    return _columns(activity_change(both, PAIRS, contexts=2, **options).table())


def _loss(options: dict[str, Any]) -> Found:
    return {"loss": np.array(mean_loss(SUBJECT.model, oracle.examples(lengths=(9, 10) * 3), collator=Collator(5), **_in_batches(options)))}


def _summaries(options: dict[str, Any]) -> Found:
    prompts = [pair.clean for pair in PAIRS]
    decoding = Decoding(max_new_tokens=4, no_repeat_ngram=2)
    return {"letters": _letters(*summarize(SUBJECT.model, families.tokenizer(), prompts, decoding=decoding, **options))}


def _aligned(options: dict[str, Any]) -> Found:
    alignment = random_alignment(SUBJECT, layer=1, dimensions=12)
    return {"accuracy": np.array(alignment.accuracy(SUBJECT, PAIRS, among="answers", **_in_batches(options)))}


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
    "means": _means,
    "difference of means": lambda options: {
        "vector": difference_of_means(SUBJECT, PAIRS, EQUALLY_LONG, layer=1, **_in_batches(options)).vector.numpy()
    },
    "alignment": _aligned,
    "what is written": _written,
    "cards": lambda options: _columns(component_cards(SUBJECT, PAIRS, Circuit.full(Graph.of(SUBJECT)), **_in_batches(options))),
    "acdc": _searched,
    "probes": _probed,
    "lens": _read,
    "backward lens": lambda options: _columns(backward_lens(SUBJECT, PAIRS, k=3, **_in_batches(options))),
    "gradient directions": lambda options: _columns(gradient_directions(SUBJECT, PAIRS, k=3, rank=2, **_in_batches(options))),
    "positions": lambda options: _columns(attribute_positions(SUBJECT, PAIRS, **_in_batches(options))),
    "source tokens": lambda options: _columns(attribute_sources(SUBJECT, PAIRS, "a1.h2,a2.h0", **_in_batches(options))),
    "activity": lambda options: _columns(neuron_activity(SUBJECT, PAIRS, contexts=2, **options).table()),
    "change of activity": _changed_activity,
    "loss": _loss,
    "summaries": _summaries,
}
