"""Controls of a fine-tuning: nobody keeps a summary, and steps, schedule and settings are those of the training they are matched with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mechscope.adapt.controls import matched, shuffled_summaries
from mechscope.adapt.training import Tuned, tune
from mechscope.data.documents import Corpus, Document
from mechscope.errors import DataError, SettingsError
from mechscope.instrument.execution import Execution
from mechscope.settings.training import TrainSettings

SETTINGS = TrainSettings(learning_rate_full=3e-3, batch_size=8, epochs=4, eval_every=2, patience=None)
PLAIN: dict[str, Any] = {"method": "full", "placed": None, "scaling": 2.0, "dropout": 0.0}


def corpus(n: int) -> Corpus:
    return Corpus(tuple(Document(f"d{i}", f"text {i}", f"summary {i}") for i in range(n)), source="made here")


@pytest.mark.parametrize("n", [2, 3, 40])
@pytest.mark.parametrize("seed", range(5))
def test_every_document_gets_the_summary_of_another_and_every_summary_is_given_once(n: int, seed: int) -> None:
    own, mixed = corpus(n), shuffled_summaries(corpus(n), seed=seed)
    assert [(d.id, d.document) for d in mixed.documents] == [(d.id, d.document) for d in own.documents]
    assert all(ours.summary != theirs.summary for ours, theirs in zip(own.documents, mixed.documents, strict=True))
    assert sorted(d.summary for d in mixed.documents) == sorted(d.summary for d in own.documents)


def test_the_shuffling_hangs_on_the_seed_and_needs_two_documents() -> None:
    assert shuffled_summaries(corpus(20), seed=1) == shuffled_summaries(corpus(20), seed=1)
    assert shuffled_summaries(corpus(20), seed=1) != shuffled_summaries(corpus(20), seed=2)
    with pytest.raises(DataError, match=r"1 document .*two or more"):
        shuffled_summaries(corpus(1), seed=0)


@pytest.fixture
def trained(make_subject, examples, tmp_path) -> Tuned:
    """Return a training whose best step is not its last: its validation examples are those it soon unlearns."""
    tuned = tune(
        make_subject("gpt2"), examples(20), examples(9, seed=1), tmp_path / "tuned", settings=SETTINGS, execution=Execution(seed=4)
    )
    assert tuned.steps == 12
    return tuned


def test_a_control_ends_at_its_step_of_the_same_schedule_whatever_its_validation_loss(trained, make_subject, examples, tmp_path) -> None:
    subject, train, validation = make_subject("gpt2"), examples(20), examples(9, seed=1)
    match = matched(trained.path, subject, train, validation, **PLAIN, settings=SETTINGS)
    assert (match.settings.max_steps, match.step, match.seed) == (12, trained.best_step, 4)
    # the same examples and seed, ended on the way: the same path, which a schedule of other length or a choice of the best would leave
    step = 6
    control = tune(
        subject,
        train,
        validation,
        tmp_path / "control",
        settings=match.settings,
        until=step,
        control={"kind": "seed"},
        execution=Execution(seed=4),
    )
    assert (control.steps, control.best_step, control.stopped_early) == (step, step, False)
    curve = trained.curve.set_index("step")["validation_loss"]
    assert control.curve["step"].tolist() == [0, 2, 4, 6]
    assert control.curve["validation_loss"].to_numpy() == pytest.approx(curve.loc[:step].to_numpy(), rel=1e-6)
    assert control.best_loss == control.curve["validation_loss"].iloc[-1]
    assert Tuned.read(control.path).control == {"kind": "seed"}
    assert Tuned.read(trained.path).seed == 4


def test_a_control_keeps_its_last_step_also_where_an_earlier_one_was_better(make_subject, examples, tmp_path) -> None:
    # so large a rate that the loss rises
    settings = replace(SETTINGS, learning_rate_full=1.0)
    control = tune(
        make_subject("gpt2"), examples(20), examples(9, seed=1), tmp_path / "out", settings=settings, until=6, control={"kind": "shuffled"}
    )
    losses = control.curve["validation_loss"].iloc[1:]
    assert losses.idxmin() != losses.index[-1], "this training was to get worse"
    assert control.best_loss == losses.iloc[-1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": replace(SETTINGS, batch_size=4)}, "settings.batch_size: 8 -> 4"),
        ({"scaling": 1.0}, "scaling: 2.0 -> 1.0"),
    ],
)
def test_a_control_of_another_training_is_refused_by_name(trained, make_subject, examples, changed, message) -> None:
    with pytest.raises(SettingsError, match=message):
        matched(trained.path, make_subject("gpt2"), examples(20), examples(9, seed=1), **{**PLAIN, "settings": SETTINGS, **changed})
    with pytest.raises(SettingsError, match="examples"):
        matched(trained.path, make_subject("gpt2"), examples(19), examples(9, seed=1), **PLAIN, settings=SETTINGS)


def test_a_control_is_not_matched_with_a_control(make_subject, examples, tmp_path: Path) -> None:
    subject, train, validation = make_subject("gpt2"), examples(20), examples(9, seed=1)
    control = tune(subject, train, validation, tmp_path / "control", settings=SETTINGS, until=2, control={"kind": "shuffled"})
    with pytest.raises(SettingsError, match="is itself a control"):
        matched(control.path, subject, train, validation, **PLAIN, settings=SETTINGS)


def test_a_step_that_too_few_examples_never_reach_is_refused_before_training(make_subject, examples, tmp_path: Path) -> None:
    # 20 examples in batches of 8 over 4 epochs are 12 steps
    assert SETTINGS.steps(20) == 12
    with pytest.raises(SettingsError, match=r"kept the weights of step 13, and 20 examples give but 12 steps"):
        tune(make_subject("gpt2"), examples(20), examples(9, seed=1), tmp_path / "control", settings=SETTINGS, until=13)
    assert not (tmp_path / "control").exists()
