"""A fine-tuning that is killed, wherever that is, ends as one that was not."""

from __future__ import annotations

import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from mechscope.adapt.trainer import SummaryTrainer
from mechscope.adapt.training import tune
from mechscope.errors import RunError
from mechscope.instrument.execution import Execution
from mechscope.subject.load import load
from tests.adapt.trainings import SETTINGS, placed_on, same_weights


class Killed(BaseException):
    """Stands for kill -9 inside one process: nothing catches it."""


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_killed_again_and_again_ends_with_the_same_weights(run, method):
    whole = run("whole", method)
    # before any checkpoint, between two, inside an epoch, at an epoch's end, after the last one
    for step in (1, 3, 5, 9, 11):

        def kill(label, done, steps, step=step):
            if done == step:
                raise Killed

        with pytest.raises(Killed):
            run("cut", method, execution=Execution(seed=4, progress=kill))
    continued = run("cut", method)
    assert same_weights(whole.path, continued.path)
    pd.testing.assert_frame_equal(whole.curve, continued.curve, check_exact=True)
    assert (whole.tokens, whole.best_step, whole.stopped_early) == (continued.tokens, continued.best_step, continued.stopped_early)


def test_a_continued_training_does_not_start_over(run):
    def kill(label, done, steps):
        if done == 9:
            raise Killed

    with pytest.raises(Killed):
        run("out", execution=Execution(seed=4, progress=kill))
    seen = []
    run("out", execution=Execution(seed=4, progress=lambda label, done, steps: seen.append(done)))
    assert seen == [8, 9, 10, 11]


@pytest.mark.parametrize("place_of_death", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_kill_while_a_checkpoint_is_written_costs_only_that_checkpoint(run, monkeypatch, place_of_death):
    whole = run("whole")

    def die(self, *arguments):
        if self.state.global_step == 6:
            raise Killed
        original(self, *arguments)

    original = getattr(SummaryTrainer, place_of_death)
    with monkeypatch.context() as patched:
        patched.setattr(SummaryTrainer, place_of_death, die)
        with pytest.raises(Killed):
            run("cut")
    assert same_weights(whole.path, run("cut").path)


@pytest.mark.parametrize("place_of_death", ["copytree", "rename", "rmtree"])
def test_a_kill_while_the_result_is_published_loses_nothing(run, monkeypatch, tmp_path, place_of_death):
    whole = run("whole")

    def die(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patched:
        if place_of_death == "rmtree":
            # only the removal after the renaming
            kept = shutil.rmtree
            patched.setattr("shutil.rmtree", lambda path, **rest: die() if (tmp_path / "cut").exists() else kept(path, **rest))
        else:
            patched.setattr({"copytree": "shutil.copytree", "rename": "os.rename"}[place_of_death], die)
        with pytest.raises(Killed):
            run("cut")
    assert same_weights(whole.path, run("cut").path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_a_run_folder_may_be_moved_between_kill_and_continuation(run, make_subject, examples, tmp_path):
    whole = run("whole")

    def kill(label, done, steps):
        if done == 9:
            raise Killed

    with pytest.raises(Killed):
        run("here/cut", execution=Execution(seed=4, progress=kill))
    (tmp_path / "here").rename(tmp_path / "there")
    assert same_weights(whole.path, run("there/cut").path)


def test_early_stopping_is_remembered_across_a_kill(run):
    ruinous = replace(SETTINGS, learning_rate_full=10.0, max_steps=60, patience=3, schedule="constant", warmup=0.0)
    whole = run("whole", "full", settings=ruinous)

    def kill(label, done, steps):
        if done == whole.steps - 1:
            raise Killed

    with pytest.raises(Killed):
        run("cut", "full", settings=ruinous, execution=Execution(seed=4, progress=kill))
    assert run("cut", "full", settings=ruinous).steps == whole.steps


KILLED_SCRIPT = """
import os, pickle, signal, sys
from mechscope.adapt.training import tune
from mechscope.instrument.execution import Execution
from mechscope.subject.load import load

def progress(label, done, steps):
    if done == 7:
        os.kill(os.getpid(), signal.SIGKILL)

with open(sys.argv[1], "rb") as file:
    base, arguments, options = pickle.load(file)
tune(load(base, device="cpu"), *arguments, **options, execution=Execution(progress=progress))
"""


def test_a_training_killed_by_kill_9_is_continued_by_another_process(make_subject, examples, tmp_path):
    base = tmp_path / "base"
    make_subject("gpt2").model.save_pretrained(base)
    make_subject("gpt2").tokenizer.save_pretrained(base)
    subject = load(base, device="cpu")
    options: dict[str, Any] = {"method": "lora", "placed": placed_on(subject), "settings": SETTINGS}
    cut = (examples(20), examples(9, seed=1), tmp_path / "cut")
    with (tmp_path / "request").open("wb") as file:
        pickle.dump((base, cut, options), file)
    command = [sys.executable, "-c", KILLED_SCRIPT, str(tmp_path / "request")]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not cut[-1].exists()
    seen = []
    continued = tune(subject, *cut, **options, execution=Execution(progress=lambda label, done, steps: seen.append(done)))
    assert seen[0] == 6
    whole = tune(subject, *cut[:2], tmp_path / "whole", **options)
    assert same_weights(whole.path, continued.path)


def test_an_unfinished_training_of_other_settings_is_refused(run):
    def kill(label, done, steps):
        raise Killed

    with pytest.raises(Killed):
        run("out", execution=Execution(seed=4, progress=kill))
    with pytest.raises(RunError, match=r"unfinished work with other settings or data \(seed: 4 -> 9\)"):
        run("out", execution=Execution(seed=9))
