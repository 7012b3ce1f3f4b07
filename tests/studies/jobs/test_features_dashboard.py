"""`mechscope features dashboard` writes what the function gathers, a page per dictionary, and what another run says of latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from mechscope.errors import MechscopeError, SettingsError
from mechscope.features import DashboardSettings, Dictionary, Rule, crosscoder, dashboard, promoted_tokens
from mechscope.instrument import Execution
from mechscope.store.run import verify
from mechscope.store.tables import write_table
from mechscope.studies.jobs.features_dashboard import JOB
from mechscope.studies.runner import run_job
from mechscope.subject.load import load
from tests import families
from tests.causal.pairs import random_pairs
from tests.report.measured import random_dictionary
from tests.studies.jobs.running import refuses, run, shown, subject

PAIRS = random_pairs(24)
QUICK: dict[str, Any] = {"pairs": PAIRS, "drawn": 20, "before": 3, "after": 2}


def test_the_tables_are_those_of_the_function_and_the_page_stands_beside_the_report(tmp_path: Path) -> None:
    file = tmp_path / "random.safetensors"
    random_dictionary().save(file)
    result = run(JOB, tmp_path / "run", **QUICK, dictionary=str(file), seed=3)
    settings = DashboardSettings(drawn=20, before=3, after=2)
    found = dashboard(subject(), random_dictionary(), PAIRS, settings=settings, execution=Execution(2048, seed=3))
    tokenizer = subject().tokenizer
    latents, examples = result.dashboard_latents, result.dashboard_examples
    pd.testing.assert_frame_equal(latents[["component", "density", "share"]], found.latents[["component", "density", "share"]])
    assert latents["promotes"][0].tolist() == [tokenizer.decode([token]) for token in found.latents["promotes"][0]]
    assert (latents["n"] == 24).all()
    assert examples["text"].tolist() == [PAIRS.pairs[text].id for text in found.examples["text"]]
    by_id = {pair.id: pair.clean for pair in PAIRS}
    spelled = dict(zip(result.dashboard_tokens["token"], result.dashboard_tokens["text"], strict=True))
    for row in examples.to_dict("records"):
        assert tuple(row["ids"]) == by_id[row["text"]][row["start"] : row["start"] + len(row["ids"])]
        assert all(spelled[token] == tokenizer.decode([token]) for token in row["ids"])
    page = shown(result, "dashboards")
    assert 'href="pages/dashboard-random.html"' in page
    assert latents["component"][0] in (tmp_path / "run" / "pages" / "dashboard-random.html").read_text(encoding="utf-8")
    assert set(verify(result.path)["status"]) == {"ok"}
    again = run(JOB, tmp_path / "again", **QUICK, dictionary=str(file), seed=3)
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(table, again.tables[name])


def test_classes_and_effects_come_from_another_run(tmp_path: Path) -> None:
    for name in ("one", "other"):
        random_dictionary().save(tmp_path / f"{name}.safetensors")
    both = f"{tmp_path}/one.safetensors,{tmp_path}/other.safetensors"
    # a table that names its dictionary, and one that does not
    classes = pd.DataFrame({"dictionary": ["one", "other"], "component": "resid1.f5", "class": ["shared", "tuned only"]})
    write_table(classes, tmp_path / "beside" / "tables" / "latent_classes.parquet")
    write_table(pd.DataFrame({"component": ["resid1.f4"], "effect": [-0.5]}), tmp_path / "beside" / "tables" / "effects.parquet")
    said = pd.DataFrame({"component": ["resid1.f7"], "explanation": ["<b>the token</b> “w3”"]})
    write_table(said, tmp_path / "said" / "tables" / "explanations.parquet")
    result = run(JOB, tmp_path / "run", **QUICK, dictionary=both, beside=f"{tmp_path}/beside,{tmp_path}/said")
    page = (tmp_path / "run" / "pages" / "dashboard-one.html").read_text(encoding="utf-8")
    assert "\\u003cb\\u003ethe token" in page
    assert "<b>the" not in page + shown(result, "dashboards")
    told = result.dashboard_latents.set_index(["dictionary", "component"])
    assert told.loc[("one", "resid1.f5"), "class"] == "shared"
    assert told.loc[("other", "resid1.f5"), "class"] == "tuned only"
    assert told["class"].notna().sum() == 2
    assert [told.loc[(name, "resid1.f4"), "effect"] for name in ("one", "other")] == [-0.5, -0.5]
    assert told["effect"].notna().sum() == 2
    assert told["explanation"].dropna().tolist() == ["<b>the token</b> “w3”"] * 2


def test_tables_that_do_not_agree_are_refused_and_controls_are_not_read(tmp_path: Path) -> None:
    """Two dictionaries of one place whose table does not name them: which is meant is not known."""
    random_dictionary().save(tmp_path / "random.safetensors")
    given = {"dictionary": str(tmp_path / "random.safetensors")}
    for folder, effects in (("one", [-0.5]), ("other", [0.25]), ("twice", [-0.5, 0.25]), ("same", [-0.5, -0.5])):
        table = pd.DataFrame({"component": "resid1.f4", "effect": effects})
        write_table(table, tmp_path / folder / "tables" / "effects.parquet")
    said = r"two values of column effect of resid1\.f4: -0\.5 of .*effects\.parquet, 0\.25 of .*effects\.parquet; name runs"
    for beside in (f"{tmp_path}/one,{tmp_path}/other", f"{tmp_path}/twice"):
        refuses(JOB, tmp_path / "run", SettingsError, said, **given, beside=beside)
    table = pd.DataFrame({"control": ["", "half"], "component": "resid1.f4", "class": ["shared", "tuned only"]})
    write_table(table, tmp_path / "same" / "tables" / "classes.parquet")
    told = run(JOB, None, **QUICK, **given, beside=f"{tmp_path}/one,{tmp_path}/same").dashboard_latents.set_index("component")
    assert (told.loc["resid1.f4", "effect"], told.loc["resid1.f4", "class"]) == (-0.5, "shared")


def test_a_crosscoder_of_two_models_shows_what_features_diff_judged_and_the_tokens_of_the_model_that_has_a_latent(tmp_path: Path) -> None:
    width = subject().anatomy.d_model
    layout = crosscoder("base:resid1,tuned:resid1", (width, width), 40, Rule("topk", 8))
    tensors = layout.tensors(seed=1)
    tensors["decoder.0"][4, :width] = 0
    tensors["decoder.0"][5, width:] = 0
    Dictionary.plain(layout, tensors).save(tmp_path / "crosscoder.safetensors")
    judged = {
        "comparison": ["crosscoder"] * 4,
        "component": [f"base:resid1.f{latent}" for latent in (4, 5, 7, 38)],
        "by_norm": ["second only", "first only", "shared", "second only"],
        "judged": ["new", "", "", "new"],
        "beyond": pd.array([True, None, None, False], dtype="object"),
    }
    write_table(pd.DataFrame(judged), tmp_path / "diff" / "tables" / "feature_latents.parquet")
    other = load(families.build("gpt2", seed=5), tokenizer=families.tokenizer())
    given = {"model": subject(), "tuned": other, "pairs": PAIRS}
    settings = JOB.resolve(
        model="one",
        tuned="other",
        pairs="given in memory",
        dictionary=f"{tmp_path}/crosscoder.safetensors",
        beside=f"{tmp_path}/diff",
        drawn=20,
    )
    result = run_job(JOB, settings, None, given=given)
    told = result.dashboard_latents.set_index("component")
    promotes = dict(zip(result.dashboard_latents["component"], result.dashboard_latents["promotes"], strict=True))
    assert told["class"].dropna().to_dict() == {
        "base:resid1.f4": "new beyond control",
        "base:resid1.f5": "first only",
        "base:resid1.f7": "shared",
        "base:resid1.f38": "new",
    }
    # without controls nothing is said to be beyond them
    judged["beyond"] = pd.array([None] * 4, dtype="boolean")
    write_table(pd.DataFrame(judged), tmp_path / "diff" / "tables" / "feature_latents.parquet")
    classes = run_job(JOB, settings, None, given=given).dashboard_latents.set_index("component")["class"]
    assert classes["base:resid1.f4"] == "new"
    dictionary = Dictionary.plain(layout, tensors)
    for latent, model, place in ((4, other, layout.outputs[1]), (5, subject(), layout.outputs[0])):
        ((up, _),) = promoted_tokens(model, dictionary, [latent], place=place)
        assert promotes[f"base:resid1.f{latent}"].tolist() == [subject().tokenizer.decode([token]) for token in up]


def test_what_does_not_fit_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    random_dictionary().save(tmp_path / "random.safetensors")
    given = {"dictionary": str(tmp_path / "random.safetensors")}
    refuses(JOB, tmp_path / "run", SettingsError, "'beside' names '.*absent': .*no such", **given, beside=str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    refuses(
        JOB,
        tmp_path / "run",
        SettingsError,
        "no table with a column component and one of class, effect, explanation",
        **given,
        beside=str(tmp_path / "empty"),
    )
    write_table(pd.DataFrame({"dictionary": ["r"], "component": "resid1.f5", "class": "x"}), tmp_path / "r" / "tables" / "classes.parquet")
    said = r"says nothing of latents of random: class is of others \(the first: r resid1.f5\)"
    refuses(JOB, tmp_path / "run", SettingsError, said, **given, beside=str(tmp_path / "r"))
    for name in ("a l1", "A-l1"):
        random_dictionary().save(tmp_path / f"{name}.safetensors")
    twins = f"{tmp_path}/a l1.safetensors,{tmp_path}/A-l1.safetensors"
    refuses(JOB, tmp_path / "run", SettingsError, "'a l1' and 'A-l1' would share the page", dictionary=twins)
    refuses(JOB, tmp_path / "run", MechscopeError, "no such file", dictionary=str(tmp_path / "absent.safetensors"))
    refuses(JOB, tmp_path / "run", SettingsError, "'examples' is 0", **given, examples=0)
