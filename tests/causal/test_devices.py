"""The host waits for a device a fixed number of times per batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mechscope import causal
from mechscope.data.scoring import Runs, metric_of
from mechscope.instrument import CachedRun, Edit
from mechscope.subject.load import Subject, load
from tests import families
from tests.devices import prompts, spread
from tests.pretend import Traffic, pretended, traffic

PROMPTS = prompts()
WAITING: dict[str, Callable[[Subject], Any]] = {
    "patch heads": lambda subject: causal.patch(subject, PROMPTS),
    "patch heads at each position": lambda subject: causal.patch(subject, PROMPTS, positions="each", metric="loss"),
    "patch keys": lambda subject: causal.patch(subject, PROMPTS, site="key"),
    "patch patterns": lambda subject: causal.patch(subject, PROMPTS, site="pattern", metric="kl"),
    "ablate one": lambda subject: causal.ablate(subject, PROMPTS),
    "ablate all but one": lambda subject: causal.ablate(subject, PROMPTS, mode="keep", metric="probability"),
    "ablate by resampling": lambda subject: causal.ablate(subject, PROMPTS, source="resample"),
    "paths": lambda subject: causal.path_patch(subject, PROMPTS, None, ["logits", "a2.h1<k>"]),
    "paths to logits": lambda subject: causal.path_patch(subject, PROMPTS, None, ["logits"], through_mlps=True),
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
        runs = Runs(CachedRun(subject, batch.clean, batch.real, sites={"z", "neuron"}), metric_of("logit-diff", batch, None))
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
