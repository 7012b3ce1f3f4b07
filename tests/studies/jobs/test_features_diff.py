"""`mechscope features diff` says of both models and of every control what the functions say, and withholds what its tables do not show."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope import features
from mechscope.data.pairs import Pairs, from_examples
from mechscope.data.prompt import Encoded
from mechscope.data.splits import held_out
from mechscope.errors import MechscopeError, ModelError, SettingsError
from mechscope.features.diffing import LatentSet, carried, classified, latent_scaling
from mechscope.features.places import places
from mechscope.features.rows import Reader
from mechscope.instrument import Execution
from mechscope.report.sections import sections
from mechscope.settings.diffing import ExclusiveSettings
from mechscope.settings.features import TokenSettings
from mechscope.store.run import verify
from mechscope.studies import feature_difference
from mechscope.studies.job import Result
from mechscope.studies.jobs.features_diff import JOB
from mechscope.studies.runner import run_job
from mechscope.subject import Pair, pair
from mechscope.subject.load import load
from mechscope.subject.spelling import Spelling
from tests import families
from tests.difference.oracle import examples, perturbed
from tests.studies.jobs.running import findings

SECTIONS = ("feature-difference", "feature-carried", "feature-candidates")
# thresholds by which a dictionary of no training has latents of either model
LOOSE: dict[str, Any] = {"exclusive": 0.501, "shared": 0.5005, "nu_error": 1e6, "nu_reconstruction": 1e6, "least_tokens": 1, "recurs": 0.05}
QUICK: dict[str, Any] = {
    "places": "resid1",
    "latents": 40,
    "k": 4,
    "steps": 8,
    "batch": 16,
    "rows": 200,
    "learning_rate": 1e-2,
    "test_share": 0.4,
    "causal_documents": 8,
    "random_draws": 2,
    "plant_share": 0.1,
    "plant_directions": 2,
    "latents_shown": 4,
    "examples": 2,
    **LOOSE,
}


@cache
def both() -> Pair:
    base = families.build("gpt2")
    return pair(*(load(model, tokenizer=families.tokenizer()) for model in (base, perturbed(base, size=0.3))))


def documents(count: int = 24) -> Encoded:
    return Encoded(examples(lengths=[12 + at % 7 for at in range(count)]), {})


def run(out: Path | None, given: Pair | None = None, **settings: Any) -> Result:
    given = given or both()
    named = {"base": "base in memory", "tuned": "tuned in memory", "data": "given in memory"}
    loaded = {"base": given.base, "tuned": given.tuned, "data": documents()}
    return run_job(JOB, JOB.resolve(**named, **{**QUICK, **settings}), out, given=loaded)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("diff") / "run")


def crosscoder(result: Result) -> features.Dictionary:
    return features.Dictionary.load(result.path / "dictionaries" / "crosscoder.safetensors")


def judged_texts() -> Pairs:
    return held_out(from_examples(documents(), "given in memory"), 0.4, 0)[1]


def test_latents_are_scaled_and_classified_as_by_the_functions(whole: Result) -> None:
    models = {"base": both().base, "tuned": both().tuned}
    expected = classified(latent_scaling(models, crosscoder(whole), judged_texts()), ExclusiveSettings(**LOOSE))
    own = whole.feature_latents.query("comparison == 'crosscoder'").reset_index(drop=True)
    assert own["component"].tolist() == [f"base:resid1.f{latent}" for latent in range(40)]
    for name in ("tokens", "energy", "relative_norm", "nu_error", "nu_reconstruction", "by_norm", "judged"):
        pd.testing.assert_series_equal(own[name], expected[name], check_dtype=False)
    assert {"new", "lost"} <= set(own["judged"])
    row = whole.feature_comparisons.set_index("comparison").loc["crosscoder"]
    assert row["new"] == (own["judged"] == "new").sum()
    assert row["beyond"] == own["beyond"].sum()
    beyond = own[own["beyond"].astype(bool)]
    assert (beyond["judged"] == "new").all()
    assert (beyond["again"] >= 0.05).all()


def test_every_control_is_trained_with_the_same_budget_and_judged_by_the_same_thresholds(whole: Result) -> None:
    names = ["crosscoder", "difference", "same", "half", "planted", "shuffled pairs"]
    assert whole.feature_comparisons["comparison"].tolist() == names
    assert whole.dictionaries["dictionary"].tolist() == names
    # eight steps of sixteen tokens
    assert set(whole.dictionaries["tokens"]) == {8 * 16}
    assert set(whole.dictionaries["steps"]) == {8}
    assert set(whole.dictionaries["latents"]) == {40}
    judged = whole.feature_comparisons
    assert judged["tokens"].nunique() == 1
    latents = whole.feature_latents
    for row in judged[judged["comparison"] != "difference"].to_dict("records"):
        own = latents[latents["comparison"] == row["comparison"]]
        assert row["silent"] == (own["by_norm"] == "silent").sum()
        assert row["shrunk"] + row["decoupled"] + row["new"] + row["lost"] + row["unclear"] == row["first_only"] + row["second_only"]
    # equal models start with decoders apart: what so short a training leaves of that is counted, by thresholds that let all pass
    same = judged.set_index("comparison").loc["same"]
    assert min(same["first_only"], same["second_only"], same["new"]) > 0
    assert latents.query("comparison == 'same'")["relative_norm"].nunique() == 40
    # the other half starts elsewhere: latents found again there are no matter of the first weights
    kept = {name: features.Dictionary.load(whole.path / "dictionaries" / f"{name}.safetensors").about for name in ("crosscoder", "half")}
    assert [kept[name]["plans"][name].get("seed", kept[name]["seed"]) for name in kept] == [0, 1]
    planted = whole.feature_planted
    assert planted["direction"].tolist() == [1, 2]
    assert planted["share"].between(0.05, 0.25).all()


def test_latents_of_differences_are_as_strong_as_what_both_models_hold_says(whole: Result) -> None:
    given = features.Dictionary.load(whole.path / "dictionaries" / "difference.safetensors")
    reader = Reader({"base": both().base, "tuned": both().tuned}, places("base:resid1,tuned:resid1"), TokenSettings())
    reader.limits = {place: given.about["limits"][place.name] for place in reader.places}
    base, tuned = reader.run(judged_texts(), range(len(judged_texts())), Execution()).values.values()
    f = given.encode([tuned - base]).dense().double()
    table = whole.feature_differences
    assert table["component"].tolist() == [f"difference:resid1.f{latent}" for latent in range(40)]
    np.testing.assert_allclose(table["squares"], f.square().mean(0), rtol=1e-5)
    assert table["tokens"].tolist() == (f != 0).sum(0).tolist()
    np.testing.assert_allclose(table["density"], (f != 0).double().mean(0))


def test_what_new_latents_carry_is_that_of_the_function(whole: Result) -> None:
    own = whole.feature_latents.query("comparison == 'crosscoder'").reset_index(drop=True)
    chosen = tuple(int(latent) for latent in np.flatnonzero(own["beyond"].astype(bool)))
    found = carried(
        both(),
        crosscoder(whole),
        judged_texts().first(8),
        {"new": LatentSet(chosen), "whole": LatentSet(instead="whole")},
        tokens=TokenSettings(),
        limits=crosscoder(whole).about["limits"],
        execution=Execution(),
    )
    table = whole.feature_carried.query("comparison == 'crosscoder'").set_index(["set", "change"])
    assert table["loss"]["new", "put into base"] == pytest.approx(found.into_base["new"].mean())
    assert table["loss"]["new", "taken from tuned"] == pytest.approx(found.out_of_tuned["new"].mean())
    assert table["loss"]["whole difference", "put into base"] == pytest.approx(found.into_base["whole"].mean())
    assert table["gain"].iloc[0] == pytest.approx((found.base - found.tuned).mean())
    row: Any = table.loc[("new", "put into base")]
    assert row["latents"] == len(chosen) > 0
    assert table["energy"]["random vectors", "put into base"] == pytest.approx(row["energy"], rel=0.5)
    if not row["withheld"]:
        assert row["share"] == pytest.approx((found.base - found.into_base["new"]).mean() / (found.base - found.tuned).mean())
    assert table["draws"]["other latents", "put into base"] == 2
    assert {"strongest", "all latents"} <= set(whole.feature_carried.query("comparison == 'difference'")["set"])


def test_candidates_stand_on_the_page_with_what_they_write(whole: Result) -> None:
    assert whole.report is not None
    page = whole.report.read_text(encoding="utf-8")
    for name in SECTIONS:
        own = sections()[name]
        assert f'<section id="{name}">' in page
        for figure in own.figures(whole.tables):
            assert f'id="{figure.name}"' in page
        assert own.views(whole.tables)
        for table in own.tables:
            spec = own.tables[table]
            assert [column for column in whole.tables[table] if not spec.knows(str(column))] == []
            assert [column for column in spec.required if column not in whole.tables[table]] == []
            alone = {table: whole.tables[table]}
            assert all(made is not None for made in (*own.figures(alone), *own.views(alone)))
            assert all(text.endswith(".") for text in [finding.sentence for finding in own.findings(alone)])
    candidates, examples_of = whole.feature_candidates, whole.feature_examples
    assert 0 < len(candidates) <= 4
    assert candidates["beyond"].astype(bool).tolist() == sorted(candidates["beyond"].astype(bool), reverse=True)
    assert set(candidates["by_norm"]) <= {"second only", "between"}
    assert all(len(tokens) == 8 for tokens in candidates["promotes"])
    # by what they write into the tuned model
    chosen, given = [int(name.partition(".f")[2]) for name in candidates["component"]], crosscoder(whole)
    up = features.promoted_tokens(both().tuned, given, chosen, place=places("tuned:resid1")[0])
    assert [list(tokens) for tokens in candidates["promotes"]] == [Spelling(both().tokenizer).tokens(tokens) for tokens, _ in up]
    assert set(examples_of["component"]) <= set(candidates["component"])
    assert set(verify(whole.path)["status"]) == {"ok"}
    assert not list(whole.path.rglob("block-*.safetensors"))


def test_other_thresholds_judge_again_without_training_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick: dict[str, Any] = {"own_controls": "none", "difference": False, "latents_shown": 0}
    first = run(tmp_path / "run", **quick)
    assert set(first.feature_comparisons["comparison"]) == {"crosscoder"}
    monkeypatch.setattr(features, "train", lambda *args, **options: pytest.fail("trained again"))
    again = run(tmp_path / "run", **quick, nu_error=1e-9)
    assert first.feature_comparisons["new"].iloc[0] > again.feature_comparisons["new"].iloc[0]
    # without another half, nothing is said to be beyond it
    assert first.feature_comparisons["beyond"].isna().all()
    assert first.feature_latents["beyond"].isna().all()
    said = findings("feature-difference", **first.tables)[0]
    assert "new by thresholds, without a control of other documents" in said
    assert "beyond control" not in said


def test_several_places_an_l1_penalty_and_no_disk(tmp_path: Path) -> None:
    result = run(
        tmp_path / "run",
        places="resid0,m1",
        rule="relu",
        sparsity=0.1,
        live=True,
        own_controls="same",
        difference=False,
        causal_documents=6,
    )
    assert crosscoder(result).layout.inputs == places("base:resid0,base:m1,tuned:resid0,tuned:m1")
    assert result.feature_latents["component"].iloc[0] == "base:resid0.f0"
    assert set(result.feature_carried["comparison"]) == {"crosscoder"}
    # the other half was left out: there is nothing that could be beyond it
    assert "new" not in set(result.feature_carried["set"])
    assert result.feature_candidates["beyond"].isna().all()


def test_what_rounding_hides_is_said(tmp_path: Path) -> None:
    base = families.build("gpt2")
    narrow = pair(
        *(load(model, tokenizer=families.tokenizer(), dtype="bfloat16") for model in (base.bfloat16(), perturbed(base, size=0.3)))
    )
    result = run(tmp_path / "run", narrow, own_controls="none", difference=False, latents_shown=0)
    assert "read in bfloat16, whose rounding adds up over the layers" in " ".join(result.caveats["caveat"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"own_controls": "same,other"}, "'own_controls' names 'other': give some of same, half, planted, shuffled, or none"),
        ({"own_controls": ","}, "'own_controls' names nothing"),
        ({"places": "base:resid1"}, "names base:resid1: name the place alone"),
        ({"places": "m1.in"}, "which an MLP reads and no one writes"),
        ({"places": "resid9"}, "resid9 does not exist"),
        ({"places": "resid1,resid1"}, "names a place twice"),
        ({"shared": 0.9, "exclusive": 0.8}, "no latent can be both"),
        ({"rule": "relu"}, "its weight is 0: give sparsity"),
        ({"sparsity": 0.1}, "has its sparsity by k=4"),
        ({"k": 41}, "k=41 of 40 latents"),
        ({"plant_share": 0.45, "plant_directions": 8}, "rare tokens for"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_models_run(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    passes: list[Any] = []
    handle = both().base.anatomy.embedding.register_forward_pre_hook(lambda module, args: passes.append(args))
    try:
        with pytest.raises((SettingsError, MechscopeError), match=message):
            run(tmp_path / "run", **settings)
    finally:
        handle.remove()
    assert not passes


def test_equal_models_are_refused_in_one_sentence(tmp_path: Path) -> None:
    base = both().base
    twin = load(families.build("gpt2"), tokenizer=families.tokenizer())
    with pytest.raises(ModelError, match=r"have the same weights .*: nothing was added; give the fine-tuned model"):
        run(tmp_path / "run", pair(base, twin))


def test_a_place_in_front_of_what_was_tuned_is_refused_before_anything_is_harvested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = families.build("gpt2")
    with torch.no_grad():
        tuned.transformer.h[1].mlp.c_proj.weight.mul_(1.5)
    late = pair(both().base, load(tuned, tokenizer=families.tokenizer()))
    monkeypatch.setattr(features, "harvest", lambda *args, **options: pytest.fail("harvested"))
    for places_named in ("resid0", "m1,resid0"):
        with pytest.raises(ModelError, match="base and tuned model do not differ at resid0: name a later place"):
            run(tmp_path / places_named, late, places=places_named, difference=False)


def test_settings_that_name_files_twice_are_refused() -> None:
    from mechscope.features.diffing import Comparison

    twice = (Comparison("a b", ("base", "other0"), "seed"), Comparison("a-b", ("base", "other1"), "seed"))
    with pytest.raises(SettingsError, match="would share a file"):
        feature_difference.file_names(twice)
