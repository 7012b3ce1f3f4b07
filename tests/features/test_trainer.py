"""Several dictionaries learn from one harvest as each would alone, and an interrupted training ends with the same weights."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mechscope.errors import RunError, SettingsError
from mechscope.features import trainer
from mechscope.features.activations import Block, Live, harvest
from mechscope.features.affine import Affine
from mechscope.features.layout import autoencoder
from mechscope.features.learner import DivergedError
from mechscope.features.places import Place
from mechscope.features.rules import Rule
from mechscope.features.trainer import Plan, train
from mechscope.instrument import Execution
from mechscope.settings.features import FeatureTraining, HarvestSettings
from tests import families
from tests.features.plans import PLANS, TRAINING, WHERE, Made
from tests.features.test_harvest import texts


def test_dictionaries_learn_together_what_each_learns_alone() -> None:
    together = train(Made(), PLANS, training=TRAINING)
    for name, plan in PLANS.items():
        alone = train(Made(), {name: plan}, training=TRAINING)[name]
        for key, tensor in alone.dictionary.tensors.items():
            assert torch.equal(tensor, together[name].dictionary.tensors[key])
        assert alone.curve.equals(together[name].curve)
        losses = alone.curve["loss"]
        assert losses.iloc[-5:].mean() < 0.9 * losses.iloc[:5].mean()
    # a dictionary reads and writes the model's units
    rows = Made().block(2)
    given = together["topk"].dictionary
    (out,) = given([rows[WHERE[0]]])
    left = (out - rows[WHERE[0]]).square().sum() / (rows[WHERE[0]] - rows[WHERE[0]].mean(0)).square().sum()
    assert float(left) == pytest.approx(together["topk"].curve["reconstruction"].iloc[-5:].mean(), rel=0.2)
    assert given.fingerprint == "abc"


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("killed_at", [7, 23])
def test_a_killed_training_ends_with_the_same_weights(killed_at: int, tmp_path: Path) -> None:
    whole = train(Made(), PLANS, training=TRAINING)

    def kill(label: str, done: int, total: int) -> None:
        if done == killed_at:
            raise KilledError

    with pytest.raises(KilledError):
        train(Made(), PLANS, tmp_path / "run", training=TRAINING, keep_every=10, execution=Execution(progress=kill))
    assert not (tmp_path / "run").exists()
    steps = []
    again = train(
        Made(),
        PLANS,
        tmp_path / "run",
        training=TRAINING,
        keep_every=10,
        execution=Execution(progress=lambda _, done, __: steps.append(done)),
    )
    assert steps[0] == (killed_at - 1) // 10 * 10 + 1
    for name, each in whole.items():
        assert all(torch.equal(again[name].dictionary.tensors[key], tensor) for key, tensor in each.dictionary.tensors.items())
        assert again[name].curve.equals(each.curve)
        assert again[name].convergence == each.convergence or each.convergence.late_share != each.convergence.late_share
    steps.clear()
    train(Made(), PLANS, tmp_path / "run", training=TRAINING, execution=Execution(progress=lambda _, done, __: steps.append(done)))
    assert steps == []
    with pytest.raises(RunError, match="other settings or data"):
        train(Made(), {"topk": PLANS["topk"]}, tmp_path / "run", training=TRAINING)


_TRAIN = """
import sys
from pathlib import Path
from mechscope.features.trainer import train
from mechscope.instrument import Execution
from tests.features.plans import PLANS, TRAINING, Made

progress = lambda _, done, __: print(done, flush=True)
train(Made(), PLANS, Path(sys.argv[1]), training=TRAINING, keep_every=3, execution=Execution(progress=progress))
"""


@pytest.mark.slow
def test_a_training_that_the_system_kills_at_any_moment_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, moments = train(Made(), PLANS, training=TRAINING), random.Random(0)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", _TRAIN, str(tmp_path / "run")], stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            assert process.stdout.readline().strip().isdigit()
            time.sleep(moments.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
    again = train(Made(), PLANS, tmp_path / "run", training=TRAINING, keep_every=3)
    for name, each in whole.items():
        assert all(torch.equal(again[name].dictionary.tensors[key], tensor) for key, tensor in each.dictionary.tensors.items())


class Spoiled(Made):
    """Activations that hold a value that is no number in their last block."""

    def block(self, number: int) -> Block:
        rows = super().block(number)
        if number == 3:
            rows[WHERE[0]][::20] = torch.nan
        return rows

    def affine(self, place: Place) -> Affine:
        return Made().affine(place)


def test_first_weights_are_those_of_the_training_or_of_the_plans_own_seed() -> None:
    plan, first = PLANS["topk"], replace(TRAINING, steps=1, learning_rate=1e-9)
    found = train(Made(), {"shared": plan, "own": replace(plan, seed=7)}, training=first)
    for name, seed in (("shared", 0), ("own", 7)):
        start = plan.layout.tensors(seed=seed)["decoder.0"]
        torch.testing.assert_close(found[name].dictionary.tensors["decoder.0"], start, atol=1e-5, rtol=0)


def test_a_loss_that_is_no_number_is_one_error_and_the_last_state_is_kept(tmp_path: Path) -> None:
    words = r"dictionary 'topk' diverged \(loss nan.* at step \d+\): lower its learning_rate; the state of step \d+ is kept in"
    with pytest.raises(DivergedError, match=words):
        train(Spoiled(), {"topk": PLANS["topk"]}, tmp_path / "run", training=TRAINING, keep_every=3)
    (kept,) = tmp_path.glob(".run.work/checkpoint.safetensors")
    assert kept.is_file()


def test_memory_is_said_and_too_much_refused(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.INFO):
        train(Made(), {"topk": PLANS["topk"]}, training=FeatureTraining(steps=1, batch=64))
    assert "1 dictionary of 32 latents needs 0.00 GiB" in caplog.text
    assert "step 1 of 1" in caplog.text
    monkeypatch.setattr(trainer, "free_memory", lambda _: 1000)
    with pytest.raises(RunError, match="train fewer at once"):
        train(Made(), {"topk": PLANS["topk"]}, training=TRAINING)


def test_plans_that_do_not_fit_the_activations_are_refused() -> None:
    with pytest.raises(SettingsError, match="needs activations of resid5, harvested are"):
        train(Made(), {"far": Plan(autoencoder("resid5", 16, 32, Rule("relu")))})
    with pytest.raises(SettingsError, match="width 8 at resid0, its activations have 16"):
        train(Made(), {"narrow": Plan(autoencoder("resid0", 8, 32, Rule("topk", 3)))})
    with pytest.raises(SettingsError, match="at least one plan"):
        train(Made(), {})


def test_training_straight_from_a_model_and_its_resumption(tmp_path: Path) -> None:
    subject = families.subject("llama")
    given = texts(lengths=(14, 9, 11, 6, 12, 13, 14, 10))
    plans = {"one": Plan(autoencoder("resid1", families.WIDTH, 40, Rule("topk", 4)))}
    settings, training = HarvestSettings(rows=30), FeatureTraining(steps=20, batch=8, learning_rate=1e-2)

    def live() -> Live:
        return Live(subject, given, "resid1", settings=settings)

    whole = train(live(), plans, training=training)["one"]
    assert whole.curve["loss"].iloc[-1] < whole.curve["loss"].iloc[0]
    assert whole.dictionary.check(subject) is whole.dictionary

    def kill(label: str, done: int, total: int) -> None:
        if done == 13:
            raise KilledError

    with pytest.raises(KilledError):
        train(live(), plans, tmp_path / "run", training=training, keep_every=5, execution=Execution(progress=kill))
    again = train(live(), plans, tmp_path / "run", training=training, keep_every=5)["one"]
    assert all(torch.equal(again.dictionary.tensors[key], tensor) for key, tensor in whole.dictionary.tensors.items())


def test_a_training_of_a_harvest_is_not_taken_for_one_straight_from_the_model(tmp_path: Path) -> None:
    # the same request, in another precision and with maps of all blocks
    subject, settings, training = families.subject("llama"), HarvestSettings(rows=30), FeatureTraining(steps=3, batch=8)
    plans = {"one": Plan(autoencoder("resid1", families.WIDTH, 40, Rule("topk", 4)))}
    live = Live(subject, texts(), "resid1", settings=settings)
    kept = harvest(subject, texts(), "resid1", tmp_path / "harvest", settings=settings)
    first = train(live, plans, tmp_path / "run", training=training)["one"].dictionary
    with pytest.raises(RunError, match="other settings or data"):
        train(kept, plans, tmp_path / "run", training=training)
    other = train(kept, plans, tmp_path / "other", training=training)["one"].dictionary
    assert not torch.equal(other.tensors["encoder.0"], first.tensors["encoder.0"])
