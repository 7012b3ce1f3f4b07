"""`mechscope features train` and `features measure` do what the functions do, show it beside controls, and refuse what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope import features
from mechscope.data.labels import read_labelled
from mechscope.data.splits import held_out
from mechscope.errors import DataError, MechscopeError, ModelError, SettingsError
from mechscope.features.formats import write_saelens
from mechscope.instrument import Execution
from mechscope.store.run import verify
from mechscope.studies.jobs.features_measure import JOB as MEASURE
from mechscope.studies.jobs.features_train import JOB as TRAIN
from tests.causal.pairs import random_pairs
from tests.features.labelled_files import labelled_file
from tests.studies.jobs.running import findings, refuses, run, shown, subject

PAIRS = random_pairs(24)
QUICK: dict[str, Any] = {
    "pairs": PAIRS,
    "latents": "40",
    "k": 4,
    "steps": 6,
    "batch": 8,
    "rows": 60,
    "learning_rate": 1e-2,
    "test_share": 0.4,
}


def test_dictionaries_are_those_of_the_functions_and_the_page_shows_them_beside_controls(tmp_path: Path) -> None:
    result = run(TRAIN, tmp_path / "run", **QUICK, places="resid1,a1.z", transcoders="2", seed=3, latents_shown=5, examples=2)
    learned, judged = held_out(PAIRS, 0.4, 3)
    file = tmp_path / "run" / "dictionaries" / "resid1-40.safetensors"
    kept = features.Dictionary.load(file)
    settings = features.HarvestSettings(rows=60)
    source = features.harvest(
        subject(), learned, "resid1,a1.z,m2.in,m2", tmp_path / "activations", settings=settings, execution=Execution(seed=3)
    )
    width = subject().anatomy.d_model
    plan = features.Plan(features.autoencoder("resid1", width, 40, features.Rule("topk", 4)))
    training = features.FeatureTraining(steps=6, batch=8, learning_rate=1e-2)
    expected = features.train(source, {"one": plan}, training=training, execution=Execution(seed=3))["one"]
    assert all((kept.tensors[name] == tensor).all() for name, tensor in expected.dictionary.tensors.items())
    curve = result.dictionary_training.query("dictionary == 'resid1-40'").reset_index(drop=True)
    pd.testing.assert_frame_equal(curve.drop(columns="dictionary"), expected.curve)
    assert result.dictionaries["dictionary"].tolist() == ["resid1-40", "a1.z-40", "m2.in-m2-40"]
    measured = result.dictionary_measures
    own = measured[(measured["dictionary"] == "resid1-40") & (measured["control"] == "")].reset_index(drop=True)
    again = features.measure(subject(), kept, judged, execution=Execution(seed=3)).table
    pd.testing.assert_frame_equal(own[list(again)], again)
    latents = result.dictionary_latents.query("dictionary == 'm2.in-m2-40'")
    assert latents["component"].tolist() == [f"m2.f{latent}" for latent in range(40)]
    controls = measured.groupby("dictionary")["control"].unique().map(sorted).to_dict()
    assert controls["resid1-40"] == controls["a1.z-40"] == ["", "principal components", "random directions"]
    assert controls["m2.in-m2-40"] == ["", "linear map", "random directions"]
    assert result.latents_shown.groupby("dictionary").size().max() == 5
    assert result.latent_examples.groupby(["dictionary", "component"])["text"].nunique().max() == 2
    # a.z is no part of the residual stream: its latents promote nothing that could be read off
    assert all(len(tokens) == 0 for tokens in result.latents_shown.query("dictionary == 'a1.z-40'")["promotes"])
    assert all(len(tokens) == 8 for tokens in result.latents_shown.query("dictionary == 'resid1-40'")["promotes"])
    assert "What dictionaries keep, beside controls" in shown(result, "dictionaries")
    assert set(verify(result.path)["status"]) == {"ok"}
    # the activations went with the stage that was finished
    assert not list((tmp_path / "run").rglob("block-*.safetensors"))


def test_controls_are_measured_on_the_tokens_that_their_dictionary_is_measured_on(tmp_path: Path) -> None:
    # the first three tokens of each text, which are not those that are left out where nothing is said
    result = run(TRAIN, tmp_path / "run", **QUICK, first=3, latents_shown=0)
    silent = result.dictionary_measures.query("measure == 'dead'").set_index("control")["note"]
    read = sum(len(pair.clean) - 3 for pair in held_out(PAIRS, 0.4, 0)[1])
    assert set(silent) == {f"silent in all {read} tokens that were read"}
    again = run(
        MEASURE, None, pairs=PAIRS, dictionary=str(tmp_path / "run" / "dictionaries" / "resid0-40.safetensors"), first=2, latents_shown=0
    )
    read = sum(len(pair.clean) - 2 for pair in PAIRS)
    assert set(again.dictionary_measures.query("measure == 'dead'")["note"]) == {f"silent in all {read} tokens that were read"}


def test_listed_latents_are_the_strongest_with_their_own_texts(tmp_path: Path) -> None:
    result = run(TRAIN, tmp_path / "run", **QUICK, latents_shown=4, examples=3)
    dictionary = features.Dictionary.load(tmp_path / "run" / "dictionaries" / "resid0-40.safetensors")
    _, judged = held_out(PAIRS, 0.4, 0)
    found = features.top_examples(subject(), dictionary, judged, count=3)
    shares = found.energy / found.energy.sum()
    assert result.latents_shown["component"].tolist() == [f"resid0.f{latent}" for latent in (-shares).argsort(kind="stable")[:4]]
    assert result.latents_shown["share"].tolist() == pytest.approx(sorted(shares, reverse=True)[:4])
    by_id = {str(pair.id): pair.clean for pair in judged}
    tokenizer = subject().tokenizer
    for row in result.latent_examples.to_dict("records"):
        ids, at = by_id[row["text"]], row["position"]
        assert row["token"] == tokenizer.decode([ids[at]])
        assert row["before"] == tokenizer.decode(list(ids[max(0, at - 12) : at]))
        assert row["after"] == tokenizer.decode(list(ids[at + 1 : at + 5]))


def test_straight_from_the_model_and_several_widths_with_nested_ones(tmp_path: Path) -> None:
    quick = {**QUICK, "latents": "32,48"}
    result = run(TRAIN, tmp_path / "run", **quick, live=True, matryoshka="8", rule="batchtopk", latents_shown=0)
    assert result.dictionaries["dictionary"].tolist() == ["resid0-32", "resid0-48"]
    assert {"latents_shown", "latent_examples"}.isdisjoint(result.tables)
    about = features.Dictionary.load(tmp_path / "run" / "dictionaries" / "resid0-48.safetensors").about
    assert about["plans"]["resid0-48"]["objective"]["prefixes"] == [8, 48]


def test_a_dictionary_is_trained_for_what_the_model_predicts(tmp_path: Path) -> None:
    result = run(TRAIN, tmp_path / "run", **QUICK, end="kl", reconstruction=0.0, latents_shown=0)
    learned, _ = held_out(PAIRS, 0.4, 0)
    width = subject().anatomy.d_model
    plan = features.Plan(
        features.autoencoder("resid0", width, 40, features.Rule("topk", 4)), features.Objective(end="kl", reconstruction=0.0)
    )
    training = features.FeatureTraining(steps=6, batch=8, learning_rate=1e-2)
    expected = features.train_end_to_end(subject(), learned, {"one": plan}, training=training)["one"]
    curve = result.dictionary_training.drop(columns="dictionary")
    pd.testing.assert_frame_equal(curve, expected.curve)


def test_of_few_texts_measures_are_withheld_and_controls_have_as_many_latents_all_the_same() -> None:
    result = run(TRAIN, None, **{**QUICK, "pairs": PAIRS.first(8), "batch": 4, "test_share": 0.2}, latents_shown=0)
    measured = result.dictionary_measures
    assert set(measured[measured["measure"] == "explained variance"]["withheld"]) == {"too few texts: 2 of at least 6"}
    (sentence, _) = findings("dictionaries", dictionary_measures=measured)
    assert "withheld, as too few texts: 2 of at least 6" in sentence
    assert set(measured["control"]) == {"", "random directions", "principal components"}


def test_the_sentence_gives_the_dictionary_and_its_controls() -> None:
    measures = [
        ("l0", "", 4.0),
        ("explained variance", "", 0.83),
        ("explained variance", "random directions", 0.2),
        ("l0", "random directions", 4.0),
    ]
    rows = [
        {
            "dictionary": "d",
            "control": control,
            "measure": name,
            "place": "resid1",
            "n": 30,
            "value": value,
            "low": value - 0.01,
            "high": value + 0.01,
        }
        for name, control, value in measures
    ]
    table = pd.DataFrame(rows).assign(withheld="", note="")
    (sentence,) = findings("dictionaries", dictionary_measures=table)
    assert sentence == (
        "Dictionary d keeps 83\u202f% [82.0, 84.0] of the variance at resid1 with 4.00 active latents of a token; with as many, random directions 20\u202f% "
        "[19.0, 21.0] (n = 30 texts)."
    )
    linear = pd.DataFrame([{**rows[2], "control": "linear map", "value": 0.6, "low": 0.59, "high": 0.61, "withheld": "", "note": ""}])
    (sentence,) = findings("dictionaries", dictionary_measures=pd.concat([table, linear], ignore_index=True))
    assert sentence.endswith("random directions 20\u202f% [19.0, 21.0]; the linear map 60\u202f% [59.0, 61.0] (n = 30 texts).")
    table.loc[1, ["value", "low", "high", "withheld"]] = [float("nan")] * 3 + ["too few texts: 3 of at least 6"]
    (sentence,) = findings("dictionaries", dictionary_measures=table)
    assert sentence.startswith("Of dictionary d, how much of the variance at resid1 it keeps: withheld, as too few texts: 3 of at least 6")


def test_measuring_reads_what_training_wrote_and_what_others_wrote(tmp_path: Path) -> None:
    run(TRAIN, tmp_path / "run", **QUICK, latents_shown=0)
    file = tmp_path / "run" / "dictionaries" / "resid0-40.safetensors"
    mine = run(MEASURE, tmp_path / "measured", pairs=PAIRS, dictionary=str(file), latents_shown=3)
    assert mine.latents_shown["component"].str.startswith("resid0.f").all()
    shown(mine, "dictionaries")
    write_saelens(features.Dictionary.load(file), tmp_path / "saelens")
    theirs = run(MEASURE, tmp_path / "others", pairs=PAIRS, dictionary=str(tmp_path / "saelens"), format="saelens", latents_shown=0)
    one, other = (each.dictionary_measures.query("control == ''").set_index("measure")["value"] for each in (mine, theirs))
    assert one["explained variance"] == pytest.approx(other["explained variance"], rel=1e-4)


def test_dictionaries_are_compared_and_what_their_latents_stand_for_is_measured_beside_controls(tmp_path: Path) -> None:
    trained = run(TRAIN, tmp_path / "run", **{**QUICK, "latents": "40,48"}, matryoshka="8", rule="batchtopk", latents_shown=0)
    # widths, and the parts of each nested one
    pairs = trained.dictionary_splitting[["dictionary", "against"]].drop_duplicates().to_numpy().tolist()
    assert pairs == [
        ["resid0-40, latents 0 to 7", "resid0-40, latents 8 to 39"],
        ["resid0-48, latents 0 to 7", "resid0-48, latents 8 to 47"],
        ["resid0-40", "resid0-48"],
    ]
    files = {width: str(tmp_path / "run" / "dictionaries" / f"resid0-{width}.safetensors") for width in (40, 48)}
    concepts = str(labelled_file(tmp_path))
    found = run(MEASURE, tmp_path / "measured", pairs=PAIRS, dictionary=files[40], against=files[48], concepts=concepts, latents_shown=0)
    narrow, wide = (features.Dictionary.load(file) for file in files.values())
    expected = features.difference_of(*(features.measure(subject(), each, PAIRS) for each in (narrow, wide)))
    pd.testing.assert_frame_equal(found.dictionary_differences[list(expected)], expected)
    again = features.splitting(narrow, wide)
    between = found.dictionary_splitting.query("dictionary == 'resid0-40' and against == 'resid0-48'").reset_index(drop=True)
    pd.testing.assert_frame_equal(between[list(again)], again)
    scores = found.dictionary_concepts
    assert set(scores["dictionary"]) == {"resid0-40", "resid0-48"}
    assert set(scores["control"]) == {"", "random directions", "principal components"}
    labelled = read_labelled(concepts, subject().tokenizer, limit=400, max_tokens=subject().anatomy.max_positions)
    alone = features.concept_scores(subject(), {"": narrow}, labelled)[""]
    own = scores[(scores["dictionary"] == "resid0-40") & (scores["control"] == "")].reset_index(drop=True)
    pd.testing.assert_frame_equal(own[list(alone)], alone)
    assert found.report is not None
    page = found.report.read_text(encoding="utf-8")
    for section in ("concepts", "splitting"):
        assert f'<section id="{section}">' in page
    for settings, message in (
        ({"against": files[40]}, "both name resid0-40"),
        ({"against": ","}, "'against' is empty"),
        ({"concepts": str(tmp_path / "absent.jsonl")}, "absent"),
    ):
        refuses(MEASURE, tmp_path / "no", MechscopeError, message, dictionary=files[40], **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"places": "resid9"}, SettingsError, "resid9 does not exist"),
        ({"places": "q1"}, SettingsError, "place 'q1' is not understood"),
        ({"places": "resid1,resid1"}, SettingsError, "resid1-40 is asked for twice"),
        ({"k": 41}, SettingsError, "k=41 of 40 latents"),
        ({"latents": "many"}, SettingsError, "'latents' is 'many': give whole numbers"),
        ({"rule": "relu"}, SettingsError, "rule relu is sparse by a penalty"),
        ({"transcoders": "7"}, SettingsError, "layers:7 does not exist"),
        ({"skip": True}, SettingsError, "'skip' is for transcoders"),
        ({"reconstruction": 0.0}, SettingsError, "reconstruction=0 leaves nothing to learn"),
        ({"cross_layer": "0-1", "end": "kl"}, SettingsError, "end 'kl' needs a dictionary of one place"),
        ({"matryoshka": "50"}, SettingsError, "must rise to all 40 latents"),
        ({"pairs": PAIRS.first(1)}, DataError, "give at least two"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_model_runs(
    settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    refuses(TRAIN, tmp_path / "run", error, message, **{**QUICK, **settings})


def test_dictionaries_that_do_not_fit_are_refused_before_the_model_runs(tmp_path: Path) -> None:
    layout = features.autoencoder("resid1", subject().anatomy.d_model + 1, 8, features.Rule("topk", 2))
    features.Dictionary.plain(layout, layout.tensors()).save(tmp_path / "wide.safetensors")
    refuses(MEASURE, tmp_path / "run", ModelError, "has width 33 at resid1", dictionary=str(tmp_path / "wide.safetensors"))
    refuses(MEASURE, tmp_path / "run", MechscopeError, "absent", dictionary=str(tmp_path / "absent.safetensors"))
    refuses(MEASURE, tmp_path / "run", SettingsError, "'dictionary' is empty", dictionary=",")
    for settings, message in (
        ({"place": "resid1"}, "'place' is for dictionaries of other formats"),
        ({"output": "m1"}, "'output' is for transcoders of saelens and circuit-tracer: format mechscope"),
        ({"format": "sparsify", "output": "m1"}, "'output' is for transcoders of saelens and circuit-tracer: format sparsify"),
        ({"format": "circuit-tracer", "place": "mlp.hook_in"}, "give both, or none"),
    ):
        refuses(MEASURE, tmp_path / "run", SettingsError, message, dictionary=str(tmp_path / "wide.safetensors"), **settings)
