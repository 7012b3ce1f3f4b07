"""Differences of models over two devices, cut at different layers, equal those on one; the host waits a fixed number of times per batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechscope.difference import difference, lockstep, measure, one_pass
from mechscope.difference.lockstep import Measured, Pending
from mechscope.difference.weights import _heads
from mechscope.instrument.execution import Execution
from mechscope.subject.load import load
from mechscope.subject.pair import pair
from tests import families
from tests.devices import FAMILIES, assert_same, batch, both, encoded, spread
from tests.pretend import Traffic, pretended, traffic


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_measures_the_same(family: str, padding: str) -> None:
    pairs = both(family)
    expected = measure(pairs.single, batch(padding))
    with pretended():
        assert_same(measure(pairs.spread, batch(padding)), expected)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_exact_path_measures_the_same(family: str) -> None:
    pairs = both(family)
    expected = measure(pairs.single, batch(), gini=True)
    with pretended():
        assert_same(measure(pairs.spread, batch(), gini=True), expected)


@pytest.mark.parametrize(("where", "most"), [("single", 0), ("spread", 1)])
def test_the_numbers_of_one_batch_wait_for_a_device_and_of_none_for_a_cpu(where: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Pending] = []
    left: list[int] = []
    batches: list[Pending] = []

    def watched(*args: Any, **options: Any) -> list[Pending]:
        left.append(len(batches) - len(fetched))
        found = lockstep.launch(*args, **options)
        batches.extend(found)
        return found

    def taken(pending: Pending) -> Measured:
        fetched.append(pending)
        return fetch(pending)

    fetch = Pending.fetch
    monkeypatch.setattr(one_pass, "launch", watched)
    monkeypatch.setattr(Pending, "fetch", taken)
    with pretended():
        difference(getattr(both("gpt2"), where), encoded(), replicates=10, execution=Execution(tokens_per_batch=15))
    assert len(left) > 2
    assert left == [min(at, most) for at in range(len(left))]
    assert len(fetched) == len(batches)


def waited(layers: int, padding: str) -> Traffic:
    with pretended():
        models = [load(spread(families.build("llama", seed=seed, num_hidden_layers=layers), first=seed + 1)) for seed in (0, 1)]
        compared = pair(*models)
        with traffic() as counted:
            measure(compared, batch(padding))
    return counted


@pytest.mark.parametrize(("padding", "most"), [("right", 9), ("left", 12)])
def test_the_host_waits_no_oftener_for_more_layers(padding: str, most: int) -> None:
    few, many = waited(3, padding), waited(6, padding)
    # 6 fetch the results, and transformers asks for 1 or 2 numbers to build the masks of each pass: the base, the tuned, and the tuned on the base's stream
    assert few.waits == many.waits <= most, many.places
    kinds = ("to host", "to device", "scalar", "mask", "equal")
    assert [few.events[kind] for kind in kinds] == [many.events[kind] for kind in kinds]


@torch.no_grad()
def test_the_change_of_all_heads_is_fetched_once() -> None:
    with pretended():
        models = [load(spread(families.build("llama", seed=seed), first=seed + 1)) for seed in (0, 1)]
        base, tuned = (dict(model.weights()) for model in models)
        with traffic() as counted:
            _heads(pair(*models), base, tuned)
    assert counted.waits == 1, counted.places
