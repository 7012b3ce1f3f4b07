"""A model over two devices is observed and changed as on one; no layer waits for a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechscope.instrument import (
    AttentionCall,
    CachedRun,
    Edit,
    Knockout,
    Reading,
    Walk,
    check_subject,
    compare,
    describe,
    intervene,
    model_inputs,
    observed,
    pattern,
    record,
)
from mechscope.instrument.edits import EditSite
from mechscope.instrument.padding import Padding
from mechscope.instrument.record import SITES, Recording
from mechscope.instrument.walk import next_token_losses
from mechscope.subject.load import Subject, load
from tests import families
from tests.devices import FAMILIES, assert_same, both, spread, subjects
from tests.pretend import pretended, traffic

EDITED: tuple[EditSite, ...] = ("query", "key", "value", "z", "attention_output", "neuron", "mlp_output", "residual")


def texts() -> families.Texts:
    return families.padded(families.documents(), "left")


def calls_of(subject: Subject) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    with torch.no_grad(), observed(subject, calls.append):
        Walk(subject, texts().ids, texts().real).run()
    return calls


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_check_at_load_passes(family: str) -> None:
    with pretended():
        found = check_subject(load(spread(families.build(family))))
    assert [check.name for check in found if not check.passed] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_does_not_depend_on_the_devices(family: str) -> None:
    one, two = subjects(both(family))
    with pretended():
        assert two.fingerprint == one.fingerprint
        assert str(two.device) == "cuda:0"


@pytest.mark.parametrize("family", FAMILIES)
def test_recordings_are_equal(family: str) -> None:
    def recorded(subject: Subject) -> dict[Any, Any]:
        inputs = model_inputs(texts().ids.to(subject.device), texts().real)
        with torch.no_grad(), record(subject, *(site for site in SITES if site != "expert_output")) as recording:
            subject.model(**inputs, use_cache=False)
        return recording.values

    one, two = subjects(both(family))
    expected = recorded(one)
    with pretended():
        found = recorded(two)
        assert {str(value.device) for value in found.values()} == {"cuda:0", "cuda:1"}
        assert_same(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_pattern_statistics_are_equal(family: str) -> None:
    one, two = subjects(both(family))
    with pretended():
        for found, expected in zip(calls_of(two), calls_of(one), strict=True):
            real = texts().real
            for gini in (False, True):
                options: dict[str, Any] = {"segments": {"first half": real.cumsum(1) < 5}, "gini": gini}
                rows = real[:, None].expand(-1, expected.query.shape[1], -1)
                here, there = (describe(call, real, **options) for call in (found, expected))
                for name in ("entropy", "distance", "sink"):
                    assert_same(getattr(here, name).cpu()[rows], getattr(there, name)[rows], where=name)
                assert_same(here.segments["first half"].cpu()[rows], there.segments["first half"][rows])
            assert_same(pattern(found), pattern(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_models_cut_at_different_layers_are_compared(family: str) -> None:
    pairs = both(family)
    rows = texts().real[:, None].expand(-1, families.HEADS, -1)
    with pretended():
        padding = Padding.of(texts().real)
        calls = [[calls_of(side) for side in (pair.base, pair.tuned)] for pair in pairs]
        assert [str(call.query.device) for call in calls[1][0]] != [str(call.query.device) for call in calls[1][1]]
        for base, tuned, one, other in zip(*calls[1], *calls[0], strict=True):
            found, expected = compare(base, tuned, padding), compare(one, other, padding)
            assert found.kl_base_tuned.device == base.query.device
            for name in ("kl_base_tuned", "kl_tuned_base"):
                assert_same(getattr(found, name).cpu()[rows], getattr(expected, name)[rows], where=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_gives_the_same_logits_and_losses(family: str) -> None:
    def walked(subject: Subject) -> list[Any]:
        with torch.no_grad(), observed(subject):
            walk = Walk(subject, texts().ids, texts().real)
            last = walk.run()
            return [walk.logits(last).cpu()[texts().real], next_token_losses(subject, last[0], texts().ids[0])]

    one, two = subjects(both(family))
    expected = walked(one)
    with pretended():
        assert_same(walked(two), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_interventions_are_equal(family: str) -> None:
    real = texts().real

    def changed(subject: Subject, values: Recording) -> list[torch.Tensor]:
        found = []
        edits: list[tuple[Edit | Knockout, ...]] = [
            (Knockout(2, real, torch.arange(real.shape[1]).eq(9).expand_as(real), heads=(0,)),),
            (Edit("z", 2, values["z", 0]), Edit("pattern", 2, values["pattern", 0], heads=(0, 3))),
        ]
        for site in EDITED:
            heads = (1,) if site in ("query", "key", "value", "z") else None
            edits.append((Edit(site, 1, lambda part: 2 * part, heads=heads, positions=real),))
            edits.append((Edit(site, 2, torch.ones(()), heads=heads),))
        for changes in edits:
            with torch.no_grad(), intervene(subject, *changes):
                logits = subject.model(**model_inputs(texts().ids.to(subject.device), real), use_cache=False).logits
            found.append(logits.cpu()[real])
        return found

    one, two = subjects(both(family))
    with record(one, "z", "pattern") as values, torch.no_grad():
        one.model(**model_inputs(texts().ids, real), use_cache=False)
    expected = changed(one, values)
    with pretended():  # the values stay on the CPU: they are brought to where they are put
        assert_same(changed(two, values), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_reruns_from_every_layer_are_equal(family: str) -> None:
    real = texts().real
    reading = Reading.of(real & torch.arange(real.shape[1]).eq(real.shape[1] - 1))
    units = [(Edit(site, layer, 0.0),) for layer in (1, 2) for site in EDITED]

    def rerun(subject: Subject) -> list[Any]:
        prefix = CachedRun(subject, texts().ids, real, sites=EDITED)
        return [[indices, hidden] for indices, hidden in prefix.rerun(units, reading)]

    one, two = subjects(both(family))
    expected = rerun(one)
    with pretended():
        assert_same(rerun(two), expected)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_statistics_of_a_layer_wait_for_no_device(family: str, padding: str) -> None:
    with pretended():
        subject = load(spread(families.build(family)))
        placed = Padding.of(families.padded(families.documents(), padding).real)
        calls = calls_of(subject)
        describe(calls[0], placed), describe(calls[-1], placed)
        with traffic() as counted:
            for call in calls:
                describe(call, placed, segments={"text": placed.real})
                compare(call, call, placed)
                describe(call, placed, gini=True)
    assert counted.waits == 0, counted.places


def test_a_mask_alone_is_asked_about_once_for_each_call() -> None:
    with pretended():
        subject = load(spread(families.build("llama")))
        calls = calls_of(subject)
        here = texts().real.to("cuda:0")
        with traffic() as counted:
            describe(calls[0], here)
    assert counted.waits == 1, counted.places
