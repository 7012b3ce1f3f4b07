"""A fine-tuning learns, stops, and saves the best."""

from __future__ import annotations

import contextlib
import io
import json
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechscope.adapt import trainer as trainer_module
from mechscope.adapt import training
from mechscope.adapt.loss import Collator, mean_loss
from mechscope.adapt.training import Tuned, load_tuned, tune
from mechscope.errors import DataError, RunError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.settings.training import TrainSettings
from tests.adapt.trainings import SETTINGS, same_weights, weights


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_lowers_the_validation_loss_and_keeps_the_best_weights(run, make_subject, examples, method):
    tuned = run("out", method, settings=replace(SETTINGS, max_steps=60, eval_every=10))
    assert tuned.best_loss < tuned.curve["validation_loss"][0] - 0.05
    assert tuned.best_loss == tuned.curve["validation_loss"][1:].min()
    model = load_tuned(make_subject("gpt2"), tuned)
    assert mean_loss(model, examples(9, seed=1), collator=Collator(0)) == pytest.approx(tuned.best_loss, rel=1e-6)


def test_the_curve_begins_with_the_base_and_counts_real_tokens(run, make_subject, examples):
    tuned = run("out")
    base = mean_loss(make_subject("gpt2").model, examples(9, seed=1), collator=Collator(0))
    assert tuned.curve["step"].tolist() == [0, 2, 4, 6, 8, 10, 11]
    assert tuned.curve["validation_loss"][0] == pytest.approx(base, rel=1e-6)
    per_epoch = sum(len(example) for example in examples(20))
    seen = dict(zip(tuned.curve["step"], tuned.curve["tokens"], strict=True))
    assert seen[0] == 0
    assert seen[6] == 2 * per_epoch  # two epochs of three steps
    assert tuned.curve["train_loss"].notna().tolist() == [False] + [True] * 6


def test_the_first_training_loss_is_the_loss_of_the_first_batch_of_tokens(make_subject, examples, tmp_path):
    # one batch holds all examples, so the loss before the first step is the base's loss on them (dropout off)
    subject = make_subject("llama")
    settings = TrainSettings(batch_size=20, max_steps=1, eval_every=1)
    tuned = tune(subject, examples(20), examples(4, seed=1), tmp_path / "out", method="full", settings=settings)
    assert tuned.curve["train_loss"][1] == pytest.approx(mean_loss(subject.model, examples(20), collator=Collator(0)), rel=1e-5)


def test_accumulating_small_batches_equals_one_large_batch(make_subject, examples, tmp_path):
    losses = []
    for size, accumulation in ((20, 1), (5, 4)):
        settings = TrainSettings(learning_rate_full=3e-3, batch_size=size, gradient_accumulation=accumulation, max_steps=4, eval_every=1)
        out = tmp_path / f"{size}"
        losses.append(tune(make_subject("llama"), examples(20), examples(4, seed=1), out, settings=settings).curve["validation_loss"])
    assert losses[0].to_numpy() == pytest.approx(losses[1].to_numpy(), rel=1e-5)


def test_patience_stops_a_training_that_does_not_improve(run):
    # a step of size 10 ruins the model at once; nothing after the first evaluation is better
    ruinous = replace(SETTINGS, learning_rate_full=10.0, max_steps=60, patience=2, schedule="constant", warmup=0.0)
    tuned = run("out", "full", settings=ruinous)
    assert tuned.stopped_early
    assert (tuned.converged, tuned.unconverged) == (True, "")
    best = tuned.curve["validation_loss"][1:].idxmin()
    assert len(tuned.curve) == best + 1 + 2
    assert tuned.steps == tuned.curve["step"].iloc[-1] < 60


def test_without_patience_all_steps_are_done(run):
    tuned = run("out")
    assert not tuned.stopped_early
    assert tuned.steps == 11
    assert not tuned.converged
    assert "its last quarter" in tuned.unconverged


def test_what_was_reached_says_whether_it_arrived(run):
    long = replace(SETTINGS, max_steps=24, eval_every=1, schedule="constant", warmup=0.0)
    assert run("arrived", settings=long).converged
    still = run("still", settings=replace(long, learning_rate_lora=1e-3))
    assert not still.converged
    assert still.late_share > 0.1
    read = Tuned.read(still.path)
    assert (read.converged, read.late_share, read.unconverged) == (still.converged, still.late_share, still.unconverged)


def test_steps_end_with_the_epochs_if_those_end_first(run):
    assert run("out", settings=replace(SETTINGS, epochs=2, max_steps=100)).steps == 6


def test_a_tuned_model_loads_by_plain_transformers(run, make_subject, examples):
    tuned = run("out", "full")
    model = AutoModelForCausalLM.from_pretrained(tuned.path).eval()
    assert mean_loss(model, examples(9, seed=1), collator=Collator(0)) == pytest.approx(tuned.best_loss, rel=1e-6)
    assert model.config.use_cache == make_subject("gpt2").model.config.use_cache
    assert AutoTokenizer.from_pretrained(tuned.path)("w3 w4")["input_ids"] == [7, 8]


def test_a_tuned_adapter_loads_by_plain_peft(run, make_subject, examples):
    tuned = run("out")
    model = PeftModel.from_pretrained(make_subject("gpt2").model, tuned.path).eval()
    assert mean_loss(model, examples(9, seed=1), collator=Collator(0)) == pytest.approx(tuned.best_loss, rel=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_same_training_gives_the_same_weights(run, method):
    assert same_weights(run("one", method).path, run("two", method).path)


def test_another_seed_gives_other_weights(run):
    assert not same_weights(run("one").path, run("two", execution=Execution(seed=5)).path)


def seed_everything():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def test_training_leaves_the_callers_model_and_random_generators_alone(make_subject, examples, tmp_path):
    subject = make_subject("gpt2")
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    seed_everything()
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    seed_everything()
    tune(subject, examples(8), examples(4), tmp_path / "out", method="full", settings=replace(SETTINGS, max_steps=2))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert all(torch.equal(before[name], value) for name, value in subject.model.state_dict().items())
    assert not subject.model.training


def test_nothing_is_printed(run, capfd):
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured):
        run("out")
    assert captured.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_only_the_result_is_left_behind(run, tmp_path):
    tuned = run("out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = {path.name for path in tuned.path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "training.json", "tokenizer.json"} <= names
    assert not names & {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}


def test_a_finished_training_is_not_done_again(run, monkeypatch):
    first = run("out")
    monkeypatch.setattr(training, "_train", lambda *arguments: pytest.fail("trained again"))
    again = run("out")
    pd.testing.assert_frame_equal(first.curve, again.curve)
    assert replace(first, curve=again.curve) == again


def test_a_result_of_other_settings_is_refused(run):
    run("out")
    with pytest.raises(RunError, match=r"other settings or data \(seed: 4 -> 9\)"):
        run("out", execution=Execution(seed=9))


def test_a_result_of_other_settings_is_replaced_where_that_is_allowed(run, tmp_path):
    run("out")
    run("out", execution=Execution(seed=9), replace=True)
    other = run("other", execution=Execution(seed=9))
    assert same_weights(tmp_path / "out", other.path)


def test_weights_that_were_changed_are_not_taken_for_the_result(run):
    next(run("out").path.glob("*model.safetensors")).write_bytes(b"other weights")
    with pytest.raises(RunError, match=r"was changed after it was finished \(adapter_model\.safetensors\)"):
        run("out")


def test_a_folder_of_something_else_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="not a result of mechscope"):
        run("out")


def test_a_diverging_training_says_so_and_saves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "summed_loss", lambda model, inputs: (next(model.parameters()).sum() * float("nan"), 1))
    with pytest.raises(RunError, match=r"training loss became nan at step 1: lower the learning rate"):
        run("out", "full")
    assert list(tmp_path.iterdir()) == []


def test_float16_is_refused_for_training(make_subject, examples, tmp_path):
    subject = make_subject("gpt2")
    subject.model.half()
    with pytest.raises(Exception, match="float16, in which training overflows"):
        tune(subject, examples(4), examples(4), tmp_path / "out", settings=SETTINGS)


def test_no_examples_are_refused_by_name(make_subject, examples, tmp_path):
    with pytest.raises(DataError, match="no validation examples"):
        tune(make_subject("gpt2"), examples(4), [], tmp_path / "out", settings=SETTINGS)


def test_an_unwritable_place_is_refused_by_name(run, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match=r"cannot write .*file"):
        run("file/out")


def test_mixed_precision_keeps_float32_weights_inside_the_slices(run, make_subject):
    tuned = run("out", settings=replace(SETTINGS, bf16=True))
    assert {tensor.dtype for tensor in weights(tuned.path).values()} == {torch.float32}
    assert tuned.best_loss < tuned.curve["validation_loss"][0]


def test_a_bfloat16_base_is_fully_tuned_in_float32(make_subject, examples, tmp_path):
    subject = make_subject("llama")
    subject.model.bfloat16()
    tuned = tune(subject, examples(16), examples(4, seed=1), tmp_path / "out", settings=replace(SETTINGS, max_steps=4))
    assert {tensor.dtype for tensor in weights(tuned.path).values()} == {torch.float32}


def test_the_record_reads_back_as_it_was_returned(run):
    tuned = run("out")
    assert json.loads((tuned.path / "request.json").read_text())["request"]["seed"] == 4
    again = Tuned.read(tuned.path)
    pd.testing.assert_frame_equal(tuned.curve, again.curve, check_exact=True)


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", 0), ("warmup", 1.5), ("schedule", "zigzag"), ("loss_on", "titles"), ("weight_decay", -1.0)]
)
def test_impossible_settings_are_refused_by_name(name, value):
    with pytest.raises(SettingsError, match=name):
        TrainSettings(**{name: value})
