"""The tuned model beside controls: trained by `mechscope tune --control`, measured by `mechscope diff --controls`, on the same documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from mechscope.adapt.training import Tuned
from mechscope.errors import RunError, SettingsError
from mechscope.report.sections import sections
from mechscope.report.theme import number
from mechscope.settings import resolve
from mechscope.studies.controls import Controlled, named_controls
from mechscope.studies.job import Result
from mechscope.studies.jobs.diff import JOB as DIFF
from mechscope.studies.jobs.tune import JOB as TUNE
from mechscope.studies.runner import run_job
from tests.studies.conftest import TINY
from tests.studies.running import finished, run

TRAINING = {name: value for name, value in TINY.items() if name not in ("seeds", "rouge_documents", "max_new_tokens", "replicates")}
# as many documents as a verdict needs; smallest effects that are set need no pass in another precision
MEASURED: dict[str, Any] = {
    "data": "newsroom",
    "documents": 13,
    "max_tokens": 96,
    "replicates": 20,
    "control_documents": 12,
    "smallest_entropy_change": 0.01,
    "smallest_attention_kl": 1e-4,
    "smallest_write_change": 0.03,
    "smallest_residual_cosine": 1e-4,
    "smallest_output_kl": 1e-3,
    "smallest_loss_change": 0.01,
}


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
    assert (models["n"] == 12).all()
    weight = models.set_index("control")["weight_change"]
    assert weight["noise 0"] == pytest.approx(weight["tuned"], rel=1e-3)
    assert len(compared.control_heads) == 5 * 3 * 16
    assert len(compared.control_layers) == 5 * 3 * 4
    assert len(compared.control_outputs) == 5 * 3
    for name in ("control_heads", "control_layers", "control_outputs", "control_weights", "control_selection"):
        table = compared.tables[name]
        kind = "control_kind" if "control_kind" in table else "kind"
        assert table.groupby("control", sort=False)[[kind, "seed"]].first().reset_index().to_dict("list") == {
            "control": models["control"].tolist(),
            kind: models["kind"].tolist(),
            "seed": models["seed"].tolist(),
        }


def test_a_control_has_the_tables_of_a_difference_with_it_as_the_tuned_model(tiny_model: Path, trained: Path, compared: Result) -> None:
    settings = {**MEASURED, "noise_draws": 0, "documents": MEASURED["control_documents"]}
    for name in ("tuned", "mixed"):
        alone = diff(base=str(tiny_model), tuned=str(trained / name), **settings)
        assert "controls" not in alone.tables
        for table in ("heads", "layers", "outputs", "weights", "selection"):
            ours, theirs = compared.tables[f"control_{table}"], alone.tables[table]
            # a kind of matrix or of candidate is the table's own, and stays
            own = [column for column in theirs if column not in ("frequency", "n_resamples")]
            ours = ours[ours["control"] == name][own].reset_index(drop=True)
            assert not ours.empty
            # batches of other documents round otherwise; q is by rank, and no number of the documents
            pd.testing.assert_frame_equal(ours, theirs[own], rtol=2e-4, atol=1e-9, check_dtype=False)
    verdicts = compared.control_heads["write_change_verdict"]
    assert {"changed", "negligible"} <= set(verdicts)


def test_the_tuned_model_is_not_measured_twice_on_the_same_documents(tiny_model: Path, trained: Path) -> None:
    settings = {**MEASURED, "documents": 6, "noise_draws": 1}
    result = diff(base=str(tiny_model), tuned=str(trained / "tuned"), **settings)
    for table in ("heads", "layers", "outputs", "weights"):
        own = result.tables[f"control_{table}"]
        own = own[own["control"] == "tuned"][list(result.tables[table])].reset_index(drop=True)
        pd.testing.assert_frame_equal(own, result.tables[table], check_exact=True, check_dtype=False)


def test_noise_has_norms_of_every_draw_and_spectra_of_the_first(compared: Result) -> None:
    weights = compared.control_weights.set_index(["control", "name"])
    inside = weights.loc["tuned"].index[(weights.loc["tuned"]["columns"] > 1) & (weights.loc["tuned"]["change"] > 0)]
    for draw in ("noise 0", "noise 1"):
        np.testing.assert_allclose(weights.loc[draw]["change"], weights.loc["tuned"]["change"], rtol=2e-3)
    assert weights.loc["noise 0"].loc[inside, "effective_rank"].notna().all()
    assert weights.loc["noise 1"].loc[inside, ["effective_rank", "stable_rank", "intruders", "sv1"]].isna().to_numpy().all()
    # noise goes into all directions, fine-tuning into some
    assert (weights.loc["noise 0"].loc[inside, "effective_rank"] > weights.loc["tuned"].loc[inside, "effective_rank"]).mean() > 0.9


DIFFERENCE_SECTIONS = ("heads", "layers", "weights", "selection")


def test_every_figure_of_a_difference_shows_its_controls(compared: Result) -> None:
    kinds = {"shuffled": {"shuffled", "shuffled summaries"}, "seed": {"other seeds"}, "noise": {"noise", "noise of the same size"}}
    drawn = [figure for name in DIFFERENCE_SECTIONS for figure in sections()[name].figures(compared.tables)]
    assert len(drawn) > 20
    for figure in drawn:
        texts = {
            str(text).split(",")[0] for rows in figure.datasets.values() for row in rows for text in row.values() if isinstance(text, str)
        }
        for kind, words in kinds.items():
            assert texts & words, (figure.name, kind)
        assert "Controls: 1 training with another seed, 1 training on shuffled summaries and " in figure.caption, figure.name
    assert len({figure.name for figure in drawn}) == len(drawn)
    assert list(sections()["controls"].figures(compared.tables)) == []


def test_every_table_of_a_difference_shows_its_controls(compared: Result) -> None:
    shown = [shown for name in ("heads", "layers", "weights", "outputs") for shown in sections()[name].views(compared.tables)]
    shown = [each for each in shown if each.heading != "Smallest effects of interest"]
    assert len(shown) >= 8
    for each in shown:
        beside = [at for at, heading in enumerate(each.view.columns) if heading.startswith("controls: ")]
        assert beside, each.heading
        for row in each.view.rows:
            for at in beside:
                # spectra of vectors are not there in any model
                said = {line.split(" ")[0] for line in row[at].note.split("\n") if line}
                assert said == {"other", "shuffled", "noise"} or (not said and row[at - 1].text == "–")


def test_a_number_beside_the_tuned_one_is_that_of_the_table(compared: Result) -> None:
    view = next(each.view for each in sections()["layers"].views(compared.tables) if each.view.kind == "all")
    at = view.columns.index("controls: KL(base||tuned)")
    layers = compared.control_layers[compared.control_layers["rows"] == "all"].set_index(["control", "layer"])["kl_base_tuned"]
    for row in view.rows:
        layer = int(row[0].text)
        noise = sorted([layers["noise 0", layer], layers["noise 1", layer]])
        lines = row[at].note.split("\n")
        assert lines[0] == f"other seeds {number(layers['again', layer], digits=2)}"
        assert lines[1] == f"shuffled {number(layers['mixed', layer], digits=2)}"
        ends = list(dict.fromkeys(number(end, digits=2) for end in noise))
        assert lines[2] == f"noise {' to '.join(ends)}"


def test_of_equal_models_nothing_is_drawn_and_nothing_differs(tiny_model: Path) -> None:
    result = diff(base=str(tiny_model), tuned=str(tiny_model), **{**MEASURED, "documents": 6, "noise_draws": 2})
    assert result.controls["control"].tolist() == ["tuned"]
    assert result.controls["weight_change"].tolist() == [0.0]
    assert (result.weights["change"] == 0).all()
    for table, column in (
        ("heads", "write_change"),
        ("heads", "entropy_change"),
        ("layers", "cosine_distance"),
        ("outputs", "loss_change"),
    ):
        assert (result.tables[table][column] == 0).all()
    for name in DIFFERENCE_SECTIONS:
        for figure in sections()[name].figures(result.tables):
            assert "Controls:" not in figure.caption


def test_without_controls_noise_is_drawn_and_decides_nothing_about_fine_tuning(tiny_model: Path, trained: Path) -> None:
    result = diff(base=str(tiny_model), tuned=str(trained / "tuned"), **MEASURED)
    assert result.controls["kind"].tolist() == ["tuned", *["noise"] * Controlled().noise_draws]
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
    done = [stage for stage in finished(compared.path)[before:] if stage not in ("caveats", "report")]
    assert done == ["controls", "control_selection", "claims"]


def test_controls_are_refused_before_the_comparison(
    tiny_model: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **settings: Any) -> None:
        raise AssertionError("the comparison has begun")

    monkeypatch.setattr("mechscope.difference.one_pass.launch", never)
    monkeypatch.setattr("mechscope.difference.lockstep.launch", never)
    settings = {"base": str(tiny_model), "tuned": str(trained / "tuned"), **MEASURED}
    with pytest.raises(AssertionError, match="has begun"):
        diff(**settings)
    other = tmp_path / "other"
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=8, n_layer=2, n_head=2, n_positions=160)).save_pretrained(other)
    for controls, message in (
        (trained / "tuned", "names '.*tuned', which has the same weights as the tuned model: a training counts once, leave it out"),
        (tiny_model, "names '.*', which has the same weights as the base"),
        (f"{trained / 'mixed'},{trained / 'mixed'}", "names '.*mixed' twice: a training counts once"),
        (other, "names '.*other': tuned model '.*other' has n_layers = 2, base .* has 4"),
        (tmp_path / "nowhere", "names '.*nowhere': "),
    ):
        with pytest.raises(SettingsError, match=f"setting 'controls' {message}"):
            diff(**settings, controls=str(controls))


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
        ({"control": "shuffled"}, SettingsError, "'control' needs setting 'like'"),
        ({"like": "somewhere"}, SettingsError, "'like' needs setting 'control'"),
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
