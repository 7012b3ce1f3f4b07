"""The tuned model beside controls: trained by `mechscope tune --control`, measured by `mechscope diff --controls`, on the same documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.adapt.training import Tuned
from mechscope.errors import RunError, SettingsError
from mechscope.settings import resolve
from mechscope.studies.controls import Controlled, named_controls
from mechscope.studies.job import Result
from mechscope.studies.jobs.diff import JOB as DIFF
from mechscope.studies.jobs.tune import JOB as TUNE
from mechscope.studies.runner import run_job
from tests.studies.conftest import TINY
from tests.studies.running import finished, run

TRAINING = {name: value for name, value in TINY.items() if name not in ("seeds", "rouge_documents", "max_new_tokens", "replicates")}
MEASURED: dict[str, Any] = {"data": "newsroom", "documents": 5, "max_tokens": 128, "replicates": 20, "control_documents": 4}


def tune(base: Path, out: Path, **settings: Any) -> Tuned:
    assert TUNE.execute is not None
    trained: Tuned = TUNE.execute(TUNE, resolve(TUNE.settings, base=str(base), **{**TRAINING, **settings}), out)
    return trained


def diff(**settings: Any) -> Result:
    """Compare two models into no folder."""
    return run_job(DIFF, resolve(DIFF.settings, **settings), None)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a fine-tuning and two controls of it."""
    folder = tmp_path_factory.mktemp("trained")
    tune(tiny_model, folder / "tuned")
    tune(tiny_model, folder / "mixed", control="shuffled", like=str(folder / "tuned"))
    tune(tiny_model, folder / "again", control="seed", like=str(folder / "tuned"))
    return folder


@pytest.fixture(scope="module")
def compared(tiny_model: Path, trained: Path) -> Result:
    controls = f"{trained / 'mixed'}, {trained / 'again'}"
    return run(DIFF, trained / "run", base=str(tiny_model), tuned=str(trained / "tuned"), controls=controls, noise_draws=2, **MEASURED)


def test_controls_have_the_steps_of_their_training_and_say_what_they_are(trained: Path) -> None:
    tuned, mixed, again = (Tuned.read(trained / name) for name in ("tuned", "mixed", "again"))
    assert tuned.control is None
    assert mixed.control is not None
    assert again.control is not None
    assert (mixed.control["kind"], again.control["kind"]) == ("shuffled", "seed")
    assert mixed.control["like"] == again.control["like"]
    assert mixed.best_step == again.best_step == tuned.best_step
    # a shuffled control has the seed of its training, so that the two differ in the summaries alone
    assert (tuned.seed, mixed.seed, again.seed) == (0, 0, 1)
    assert mixed.curve["validation_loss"].iloc[0] == tuned.curve["validation_loss"].iloc[0]
    assert mixed.best_loss > tuned.best_loss


def test_the_tables_say_which_model_is_what(compared: Result) -> None:
    models = compared.controls
    assert models["control"].tolist() == ["tuned", "mixed", "again", "noise 0", "noise 1"]
    assert models["kind"].tolist() == ["tuned", "shuffled", "seed", "noise", "noise"]
    assert models["seed"].tolist() == [0, 0, 1, 0, 1]
    assert (models["n"] == 4).all()
    weight = models.set_index("control")["weight_change"]
    assert weight["noise 0"] == pytest.approx(weight["tuned"], rel=1e-3)
    assert len(compared.control_heads) == 5 * 3 * 16
    assert len(compared.control_layers) == 5 * 3 * 4


def test_controls_are_measured_as_the_tuned_model_is(tiny_model: Path, trained: Path, compared: Result) -> None:
    for name, source in (("tuned", "tuned"), ("mixed", "mixed")):
        settings = {**MEASURED, "noise_draws": 0}
        alone = diff(base=str(tiny_model), tuned=str(trained / source), **settings)
        # the first four of the documents, which are those of a run that has no more
        first = diff(base=str(tiny_model), tuned=str(trained / source), **{**settings, "documents": 4})
        assert "controls" not in alone.tables
        for table, places, columns in (
            ("heads", ["rows", "layer", "head"], ["kl_base_tuned", "kl_base_tuned_se", "entropy_change", "entropy_change_se"]),
            ("layers", ["rows", "layer"], ["kl_base_tuned", "entropy_change", "cosine_distance", "share_focused"]),
        ):
            ours = compared.tables[f"control_{table}"]
            ours = ours[ours["control"] == name].set_index(places)[columns].sort_index()
            theirs = first.tables[table].set_index(places)[columns].sort_index()
            pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=1e-9)
    loss = compared.controls.set_index("control")["loss_change"]
    assert loss["tuned"] < loss["mixed"]


def test_without_controls_noise_is_drawn_and_decides_nothing_about_fine_tuning(tiny_model: Path, trained: Path) -> None:
    result = diff(base=str(tiny_model), tuned=str(trained / "tuned"), **MEASURED)
    assert result.controls["kind"].tolist() == ["tuned", *["noise"] * 5]
    claims = result.claims.set_index("claim")
    for name in ("heads_focused_all", "heads_focused_selected", "change_concentrated"):
        assert claims["verdict"][name] == "undecided"
        assert claims["note"][name].startswith("Undecided: no control.")
        assert "--control shuffled" in claims["overturn"][name]
    for name in ("heads_focused_all.noise", "change_concentrated.noise"):
        assert claims["unit"][name] == "noise draw"
        assert "not what noise of the same size" in claims["statement"][name]


def test_another_control_repeats_controls_and_claims_alone(tiny_model: Path, trained: Path, compared: Result) -> None:
    before = len(finished(compared.path))
    settings = {**MEASURED, "controls": str(trained / "mixed"), "noise_draws": 1}
    run(DIFF, compared.path, base=str(tiny_model), tuned=str(trained / "tuned"), **settings)
    assert finished(compared.path)[before:] == ["controls", "claims", "report"]


def test_the_same_weights_do_not_count_twice(tiny_model: Path, trained: Path) -> None:
    settings = {"base": str(tiny_model), "tuned": str(trained / "tuned"), **MEASURED}
    with pytest.raises(SettingsError, match=r"has the same weights as the tuned model: a training counts once"):
        diff(**settings, controls=str(trained / "tuned"))
    with pytest.raises(SettingsError, match=r"has the same weights as the base"):
        diff(**settings, controls=str(tiny_model))
    with pytest.raises(SettingsError, match=r"'controls' names .*mixed' twice"):
        diff(**settings, controls=f"{trained / 'mixed'},{trained / 'mixed'}")


def test_what_a_control_is_can_be_said_and_is_other_where_nobody_says(tmp_path: Path) -> None:
    named = named_controls(Controlled(controls="shuffled:here/model, there/model,  seed:far/one"))
    assert [(control.name, control.kind, control.source) for control in named] == [
        ("here/model", "shuffled", "here/model"),
        ("there/model", "other", "there/model"),
        ("one", "seed", "far/one"),
    ]
    with pytest.raises(SettingsError, match="'controls' is ' , '"):
        named_controls(Controlled(controls=" , "))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"control": "shuffled"}, SettingsError, "'control' needs 'like'"),
        ({"like": "somewhere"}, SettingsError, "'like' needs 'control'"),
        ({"control_seed": 3}, SettingsError, "'control_seed' is for controls"),
        ({"control": "seed", "like": "nowhere"}, RunError, "nowhere"),
    ],
)
def test_a_control_that_cannot_be_trained_is_refused(tiny_model: Path, tmp_path: Path, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        tune(tiny_model, tmp_path / "out", **settings)


def test_a_control_must_have_another_seed_and_the_same_settings(tiny_model: Path, trained: Path, tmp_path: Path) -> None:
    like = str(trained / "tuned")
    with pytest.raises(SettingsError, match="'control_seed' is 0, the seed of the training"):
        tune(tiny_model, tmp_path / "out", control="seed", like=like, control_seed=0)
    with pytest.raises(SettingsError, match=r"was another than this control would be \(settings.max_steps: 4 -> 3"):
        tune(tiny_model, tmp_path / "out", control="shuffled", like=like, max_steps=3)


def test_numbers_of_a_run_do_not_hang_on_how_many_draws_there_are(tiny_model: Path, trained: Path, compared: Result) -> None:
    settings = {**MEASURED, "noise_draws": 1, "tokens_per_batch": 200}
    one = diff(base=str(tiny_model), tuned=str(trained / "tuned"), **settings).control_heads
    ours, theirs = (table[table["control"] == "noise 0"]["entropy_change"].to_numpy() for table in (one, compared.control_heads))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def test_a_control_in_a_folder_called_tuned_keeps_its_path_as_its_name() -> None:
    settings = resolve(DIFF.settings, base="b", tuned="t", data="newsroom", controls="shuffled:/x/models/tuned,/y/other,/z/noise 0")
    assert [control.name for control in named_controls(settings)] == ["/x/models/tuned", "other", "/z/noise 0"]
