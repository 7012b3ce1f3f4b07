"""A training that keeps every N-th step leaves a series whose steps are the weights it had there."""

from __future__ import annotations

import os

import pytest
import torch

from mechscope.errors import SettingsError
from mechscope.instrument.execution import Execution
from mechscope.store.series import Series
from mechscope.subject.load import load
from tests.adapt.trainings import same_weights, weights


class Killed(BaseException):
    """Stands for kill -9 inside one process: nothing catches it."""


def test_kept_steps_are_the_weights_of_trainings_that_end_there_also_after_kills(run, monkeypatch):
    whole = run("whole", keep_every=3)
    steps = Series.find(whole.path).steps
    assert [step.number for step in steps] == [3, 6, 9]
    assert same_weights(steps[1].folder(), run("ended", until=6).path)
    assert not same_weights(steps[0].folder(), steps[1].folder())

    def die(begun, kept):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("mechscope.adapt.kept.os", type("os", (), {**vars(os), "rename": staticmethod(die)}))
        with pytest.raises(Killed):
            run("cut", keep_every=3)  # while the first is written

    def kill(label, done, total):
        if done == 7:
            raise Killed

    with pytest.raises(Killed):
        run("cut", keep_every=3, execution=Execution(seed=4, progress=kill))
    continued = run("cut", keep_every=3)
    assert sorted(path.name for path in continued.path.glob("*checkpoint*")) == [f"checkpoint-{step.number}" for step in steps]
    assert all(same_weights(step.folder(), continued.path / f"checkpoint-{step.number}") for step in steps)


def test_a_kept_step_of_a_full_training_is_a_model_by_itself_and_the_result_stays_one(run):
    tuned = run("full", "full", keep_every=4)
    step = load(tuned.path / "checkpoint-4")
    assert step.tokenizer is not None
    saved = weights(tuned.path / "checkpoint-4")["transformer.wpe.weight"]
    assert torch.equal(dict(step.plain.named_parameters())["transformer.wpe.weight"], saved)
    assert load(tuned.path).fingerprint != step.fingerprint
    assert {file.name for file in (tuned.path / "checkpoint-4").iterdir()}.isdisjoint({"optimizer.pt", "trainer_state.json"})


def test_keeping_no_step_at_all_is_refused(run):
    with pytest.raises(SettingsError, match="'keep_every' is 12, but the training has 11 steps"):
        run("out", keep_every=12)
