"""Every intervention on a model over two devices gives what it gives on one; the host waits a fixed number of times per batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mechscope import causal
from mechscope.data.pairs import Pairs
from mechscope.instrument import Edit, Prefix
from mechscope.scoring import Runs, metric_of
from mechscope.subject.load import Subject, load
from tests import families
from tests.devices import Technique, assert_equal_over_devices, cases, prompts, spread
from tests.pretend import Traffic, pretended, traffic

PROMPTS = prompts()
OF_ONE_LENGTH = Pairs(tuple(pair for pair in PROMPTS if len(pair.clean) == 9), "of one length")
OTHERS = prompts(seed=1, lengths=(9, 9))


def patching(site: str) -> Technique:
    return lambda models: causal.patch(models.base, PROMPTS, site=site).table


SWEEPS: dict[str, Technique] = {
    **{f"patch {site}": patching(site) for site in ("head", "key", "pattern", "attention", "mlp")},
    "patch neurons": lambda models: causal.patch(models.base, PROMPTS, site="neuron", components="m1").table,
    "patch positions": lambda models: causal.patch(models.base, PROMPTS, positions="each", metric="loss", direction="noise").table,
    "patch by kl": lambda models: causal.patch(models.base, PROMPTS, site="residual", metric="kl").table,
    "attribute heads": lambda models: causal.attribute(models.base, PROMPTS, grad_drop=True, check=3).table,
    "attribute by kl": lambda models: causal.attribute(models.base, PROMPTS, site="mlp", metric="kl").table,
    "attribute queries": lambda models: causal.attribute(models.base, PROMPTS, site="query", softmax=True).table,
    "attribute residual": lambda models: causal.attribute(models.base, PROMPTS, site="residual", metric="loss").table,
    "ablate to zero": lambda models: causal.ablate(models.base, PROMPTS, source="zero").table,
    "ablate to means": lambda models: (
        causal.ablate(models.base, PROMPTS, source=causal.mean_of(models.base, PROMPTS, ("z", "mlp_output")), mode="keep").table
    ),
    "path to logits": lambda models: causal.patch_paths(models.base, PROMPTS, "a0.h0,m0,a1.h3", ["logits", "a2.h1<q>"]).table,
    "path through MLPs": lambda models: (
        causal.patch_paths(
            models.base, PROMPTS, "a0.h0,a1.h1", ["a2.h0<k>", "a2.h2<v>", "m2"], through_mlps=True, direction="denoise"
        ).table
    ),
    "knock out": lambda models: causal.knock_out(models.base, PROMPTS, keys="subject", each_head=True).table,
}

OTHER: dict[str, Technique] = {
    **{f"patch {site}": patching(site) for site in ("query", "value", "residual", "embedding")},
    "resample": lambda models: causal.ablate(models.base, PROMPTS, source="resample", metric="logit-diff").table,
    "mean per position": lambda models: (
        causal.ablate(
            models.base, OF_ONE_LENGTH, source=causal.mean_of(models.base, OTHERS, ("z",), per_position=True), sites=("head",)
        ).table
    ),
    "ablate together": lambda models: causal.ablate_together(models.base, PROMPTS, ["a0.h1,a2.h0", "m1", "layers:1"]).table,
    "cross activations": lambda models: [found.table for found in causal.cross_patch(models, PROMPTS).values()],
    "cross weights": lambda models: [
        found.table for found in causal.cross_patch(models, PROMPTS, by="weights", levels=("layer", "head")).values()
    ],
    "worlds": lambda models: (
        causal.run_worlds(
            models.base, PROMPTS, {"mixed": {"a0.h1": "corrupt", "m1": causal.Text("clean", model=models.tuned), "a2.h3": "zero"}}
        ).table
    ),
    "flow": lambda models: causal.flow(models.base, PROMPTS, ["subject", "last"]).table,
    "trace": lambda models: causal.trace(models.base, PROMPTS, site="mlp", samples=2).table,
    "scrub": lambda models: causal.scrub(models.base, OF_ONE_LENGTH, {"a1.h0,m2": None}, samples=2).table,
    "das": lambda models: causal.das(
        models.base, OF_ONE_LENGTH, _renamed(OTHERS), layers=[0, 2], dimensions=2, epochs=2, controls=1, among="answers"
    ),
    "steer": lambda models: causal.sweep_strength(
        models.base,
        causal.difference_of_means(models.base, PROMPTS, PROMPTS.swapped(), layer=1),
        PROMPTS,
        PROMPTS,
        strengths=[0.5, 1.0],
    ),
}


def _renamed(pairs: Pairs) -> Pairs:
    return Pairs(tuple(replace(pair, id=f"test {pair.id}") for pair in pairs), pairs.source)


@cases(SWEEPS, OTHER)
def test_interventions_are_equal(technique: Technique, family: str) -> None:
    assert_equal_over_devices(technique, family)


WAITING: dict[str, Callable[[Subject], Any]] = {
    "patch heads": lambda subject: causal.patch(subject, PROMPTS),
    "patch heads at each position": lambda subject: causal.patch(subject, PROMPTS, positions="each", metric="loss"),
    "patch keys": lambda subject: causal.patch(subject, PROMPTS, site="key"),
    "patch patterns": lambda subject: causal.patch(subject, PROMPTS, site="pattern", metric="kl"),
    "ablate one": lambda subject: causal.ablate(subject, PROMPTS),
    "ablate all but one": lambda subject: causal.ablate(subject, PROMPTS, mode="keep", metric="probability"),
    "ablate by resampling": lambda subject: causal.ablate(subject, PROMPTS, source="resample"),
    "paths": lambda subject: causal.patch_paths(subject, PROMPTS, None, ["logits", "a2.h1<k>"]),
    "paths to logits": lambda subject: causal.patch_paths(subject, PROMPTS, None, ["logits"], through_mlps=True),
}
KINDS = ("to host", "to device", "scalar", "mask", "equal")


def waited(sweep: Callable[[Subject], Any], layers: int) -> Traffic:
    with pretended():
        subject = load(spread(families.build("llama", num_hidden_layers=layers)))
        with traffic() as counted:
            sweep(subject)
    return counted


@pytest.mark.parametrize("name", WAITING)
def test_the_host_waits_no_oftener_for_more_layers_and_their_heads(name: str) -> None:
    few, many = (waited(WAITING[name], layers) for layers in (3, 6))
    # for one batch: the unchanged runs and the sweep are fetched, and transformers asks once for each number of texts run at once
    assert few.waits == many.waits <= 6, many.places
    assert [few.events[kind] for kind in KINDS] == [many.events[kind] for kind in KINDS]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_host_waits_no_oftener_for_more_passes(padding: Any) -> None:
    (batch,) = PROMPTS.batches(tokens_per_batch=10_000, padding=padding)
    with pretended():
        subject = load(spread(families.build("llama")))
        runs = Runs(Prefix(subject, batch.clean, batch.real, sites={"z", "neuron"}), metric_of("logit-diff", batch, None))
        sets = ((0,), (1,), (2,), (3,), (0, 1))
        each = [(Edit("z", layer, 0.0, heads=heads),) for layer in range(subject.anatomy.n_layers) for heads in sets]
        each += [(Edit("neuron", layer, 1.0, features=(1, 2)),) for layer in range(subject.anatomy.n_layers)]
        counted = []
        for units in (each[:5], each, each):  # every layer's sets of heads are run three at once and two at once, its neurons alone
            with traffic() as once:
                runs.of(units, tokens_per_pass=3 * batch.clean.numel())
            counted.append({kind: once.events[kind] for kind in KINDS if once.events[kind]})
    assert counted[0] == {"to host": 1, "scalar": 2 if padding == "right" else 4}, (
        "transformers asks for its masks, and what is found is fetched"
    )
    assert counted[1] == counted[2] == {"to host": 1}
