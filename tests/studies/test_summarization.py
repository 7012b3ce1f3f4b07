"""The whole study on a tiny model: every table, the same twice, continued after a kill, and honest about models that do not differ."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from transformers import GPT2Model

from mechscope import ranks
from mechscope.errors import RunError, SettingsError
from mechscope.instrument import trust
from mechscope.report.sections import table_specs
from mechscope.settings import leaves, resolve
from mechscope.store.run import RunFolder, verify
from mechscope.store.tables import read_table
from mechscope.studies import runner
from mechscope.studies.job import Result
from mechscope.studies.jobs import jobs
from mechscope.studies.jobs.diff import JOB as DIFF
from mechscope.studies.jobs.summarization import JOB as STUDY
from mechscope.studies.runner import run_job
from tests.studies.conftest import TINY_STUDY
from tests.studies.running import finished, run

TABLES = ("heads", "layers", "weights", "outputs", "selection", "bakeoff", "learning_curves", "claims", "summaries", "rouge", "pairs")


def tables_of(folder: Path) -> dict[str, pd.DataFrame]:
    return {path.stem: read_table(path) for path in sorted((folder / "tables").glob("*.parquet"))}


def assert_equal_tables(folder: Path, expected: Path) -> None:
    first, second = tables_of(folder), tables_of(expected)
    assert first.keys() == second.keys()
    for name in first:
        pd.testing.assert_frame_equal(first[name], second[name], check_exact=True, obj=name)


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(STUDY, tmp_path_factory.mktemp("runs") / "undisturbed", base=str(tiny_model), **TINY_STUDY)


def test_a_study_writes_every_table_with_the_promised_columns(undisturbed):
    assert set(TABLES) <= tables_of(undisturbed.path).keys()
    for name, table in undisturbed.tables.items():
        spec = table_specs()[name]
        assert set(spec.required) <= set(table), name
        assert [column for column in table if not spec.knows(str(column))] == [], name


def test_heads_are_there_for_every_kind_of_query_rows(undisturbed):
    heads = undisturbed.tables["heads"]
    assert heads.groupby("rows").size().to_dict() == {"all": 16, "document": 16, "summary": 16}
    assert (heads["n"] == 8).all()
    assert heads["component"].tolist()[5] == "a1.h1"


def test_training_changed_the_model_and_the_study_saw_it(undisturbed):
    outputs = undisturbed.tables["outputs"].set_index("rows")
    assert outputs.loc["summary", "loss_change"] < -0.1
    assert (undisturbed.tables["layers"]["kl_base_tuned"] > 1e-5).all()


def test_a_finished_run_verifies(undisturbed):
    files = verify(undisturbed.path)
    assert set(files["status"]) == {"ok"}
    assert {"report.html", "tables/heads.parquet", "models/tuned/model.safetensors"} <= set(files["file"])


def test_the_manifest_says_what_the_result_depends_on(undisturbed):
    manifest = RunFolder.read(undisturbed.path).manifest
    assert manifest["data"]["documents"] == {"train": 24, "validation": 6, "test": 8}
    assert manifest["seeds"] == {"study": 0, "training": [0, 1]}
    assert len({model["fingerprint"] for model in manifest["models"].values()}) == 3


def test_the_pairs_with_lora_are_measured_too(undisturbed):
    pairs = undisturbed.tables["pairs"]
    assert set(pairs["pair"]) == {"base–LoRA", "tuned–LoRA"}
    # LoRA at the attention of every layer leaves embeddings and MLPs alone
    assert (pairs[pairs["pair"] == "base–LoRA"]["weight_change"] > 0).all()


def files_of(folder: Path) -> dict[Path, int]:
    """Return when each result was written."""
    return {path: path.stat().st_mtime_ns for name in ("tables", "tensors", "models") for path in sorted((folder / name).rglob("*"))}


# batches may be smaller where memory ran out: only how the work is cut up depends on it
@pytest.mark.parametrize("changed", [{}, {"tokens_per_batch": 64}])
def test_run_again_a_finished_study_does_nothing(undisturbed, tiny_model, tmp_path, changed):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.path, folder)
    before, stages = files_of(folder), finished(folder)
    run(STUDY, folder, base=str(tiny_model), **{**TINY_STUDY, **changed})
    assert files_of(folder) == before
    assert finished(folder) == stages


@pytest.mark.parametrize(
    ("changed", "name"), [({"data": "elsewhere.jsonl"}, "data"), ({"tuned": "another"}, "tuned"), ({"base": "another"}, "base")]
)
def test_a_folder_of_other_models_or_documents_is_refused(undisturbed, tiny_model, changed, name):
    before = files_of(undisturbed.path)
    with pytest.raises(RunError, match=rf"belongs to another run.*{name}"):
        run(STUDY, undisturbed.path, **{"base": str(tiny_model), **TINY_STUDY, **changed})
    assert files_of(undisturbed.path) == before


def test_a_changed_setting_repeats_only_what_hangs_on_it(undisturbed, tiny_model, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.path, folder)
    before = len(finished(folder))

    def repeated(**changed: Any) -> list[str]:
        nonlocal before
        run(STUDY, folder, base=str(tiny_model), **{**TINY_STUDY, **changed})
        stages = finished(folder)[before:]
        before += len(stages)
        return stages

    # the models may have been copied elsewhere, but they are the same
    assert repeated() == []
    assert repeated(lens_documents=2) == ["lens", "caveats", "report"]
    assert repeated(lens_documents=2, random_sets=10) == ["causal", "claims", "caveats", "report"]
    # another rule chooses other heads: what is shown of the chosen ones changes, what was measured does not
    stages = repeated(lens_documents=2, random_sets=10, head_rule="random_heads", bakeoff=False)
    assert {"cards", "attention", "causal"} <= set(stages)
    assert not {"tune_tuned", "tune_lora", "difference", "selection", "roles", "lens", "bakeoff"} & set(stages)
    settings = yaml.safe_load((folder / "study.yaml").read_text())
    assert (settings["lens_documents"], settings["head_rule"]) == (2, "random_heads")
    assert set(verify(folder)["status"]) == {"ok"}


def test_another_learning_rate_trains_again_in_the_same_folder(undisturbed, tiny_model, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed.path, folder)
    parts = {"roles": False, "lens": False, "causal": False, "bakeoff": False}
    before = (folder / "models" / "tuned" / "model.safetensors").read_bytes()
    again = run(STUDY, folder, base=str(tiny_model), **{**TINY_STUDY, **parts, "learning_rate_full": 2e-3})
    # what was left out is of the old learning rate: it stays in the folder, and nothing is said of it
    assert (folder / "tables" / "bakeoff.parquet").exists()
    assert not {"bakeoff", "ablation", "head_roles", "lens_summary"} & set(again.tables)
    measured = again.tables["claims"].set_index("claim")["measured"]
    assert measured["fewer_parameters"] == measured["selected_heads_matter"] == "not measured"
    assert undisturbed.tables["claims"].set_index("claim")["measured"]["fewer_parameters"] != "not measured"
    assert (folder / "models" / "tuned" / "model.safetensors").read_bytes() != before
    assert not again.tables["heads"].equals(undisturbed.tables["heads"])
    assert set(verify(folder)["status"]) == {"ok"}


@pytest.mark.parametrize(("job", "places"), [("summarization", {}), ("bakeoff", {"target_layers": "layers:0"}), ("tune", {})])
def test_batches_that_the_ranks_cannot_share_are_refused_before_anything_is_done(job, places, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 3)
    with pytest.raises(SettingsError, match=r"batches of 32 cannot be divided among 3 ranks: choose a multiple of 3 .* divides 32"):
        run_job(jobs()[job], resolve(jobs()[job].settings, base="nowhere", data="newsroom", **places), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def passes(monkeypatch) -> list[Any]:
    """Count forward passes but for those of the checks at load: what is refused must be refused before the first."""
    counted: list[Any] = []
    forward = GPT2Model.forward

    def counting(self: GPT2Model, *given: Any, **named: Any) -> Any:
        counted.append(given)
        return forward(self, *given, **named)

    monkeypatch.setattr(GPT2Model, "forward", counting)
    monkeypatch.setattr(trust, "check_subject", lambda subject: ())
    return counted


PAIRS = {"pairs": "newsroom:what", "limit": 3}
DOCUMENTS = {"data": "newsroom", "documents": 4, "max_tokens": 128}


@pytest.mark.parametrize(
    ("name", "settings", "wrong", "right", "message"),
    [
        ("summarization", TINY_STUDY, {"layer_rule": "nonsense"}, None, "'layer_rule' is 'nonsense'.*'layers_by_kl'"),
        ("summarization", TINY_STUDY, {"selected_layers": 99}, {"selected_layers": 1}, "'selected_layers' is 99: this model has 4 layers"),
        ("summarization", TINY_STUDY, {"selected_heads": 99}, {"selected_heads": 1}, "'selected_heads' is 99: this model has 16 heads"),
        ("summarization", TINY_STUDY, {"target_circuit": "a99.h1"}, {"target_circuit": "a1.h1"}, r"a99\.h1 does not exist"),
        ("summarization", TINY_STUDY, {"selected_layers": 4}, {"selected_layers": 2}, "not all"),
        ("diff", DOCUMENTS, {"layer_rule": "nonsense"}, None, "'layer_rule' is 'nonsense'"),
        ("diff", DOCUMENTS, {"selected_layers": 99}, {"selected_layers": 1}, "'selected_layers' is 99"),
        ("bakeoff", TINY_STUDY, {"target_layers": "layers:99"}, {"target_layers": "layers:1"}, "layer"),
        ("roles", DOCUMENTS, {"show": "z9"}, {"show": "a1.h1"}, "z9"),
        ("patch", PAIRS, {"components": "a99.h1"}, {"components": "a1.h1"}, r"a99\.h1 does not exist"),
        ("weights", {}, {"components": "a99.h1"}, {"components": "a1.h1"}, r"a99\.h1 does not exist"),
    ],
)
def test_a_wrong_setting_is_refused_before_the_first_forward_pass_and_blocks_nothing(
    name, settings, wrong, right, message, tiny_model, tmp_path, passes, monkeypatch
):
    job, out = jobs()[name], tmp_path / "run"
    known = {leaf.name for leaf in leaves(job.settings)}
    models = {"base": str(tiny_model), "model": str(tiny_model), **({"tuned": str(tiny_model)} if name == "diff" else {})}
    given = {key: value for key, value in {**settings, **models}.items() if key in known}
    with pytest.raises(SettingsError, match=message):
        run(job, out, **{**given, **wrong})
    assert not passes
    if right is not None:
        # the corrected command goes on in the folder that the wrong one has left
        assert out.exists()
        monkeypatch.setattr(runner, "draw", lambda folder: folder.path)
        assert run(dataclasses.replace(job, stages=(), title=lambda names: "nothing"), out, **{**given, **right}).path == out


# where the study is killed, and how many seconds behind what its log says; started again by the same command, it may be killed again
KILLED = [
    [("stage difference starts", 0.1), ("bake-off arm equal_parameters, more_rank, seed 1", 0.2)],
    [("stage tune_tuned starts", 1.0)],
    [("stage tune_lora starts", 0.5)],
    [("bake-off arm equal_rank, standard, seed 0", 1.0)],
]
# of what a test does not look at
WITHOUT: dict[str, Any] = {"bakeoff": False, "roles": False, "lens": False, "causal": False, "noise_draws": 0}


# each kind of stage is killed in the tests of its own: `store`, `difference`, `adapt`
@pytest.mark.slow
@pytest.mark.parametrize("killed", KILLED)
def test_a_study_killed_in_the_middle_ends_with_equal_tables(undisturbed, tiny_model, tmp_path, killed):
    folder, config = tmp_path / "run", tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump({"base": str(tiny_model), **TINY_STUDY}))
    command = [sys.executable, "-m", "mechscope", "study", "summarization", "--config", str(config), "--out", str(folder)]
    for after, delay in killed:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        deadline = time.monotonic() + 240
        while after not in _log(folder) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(delay)
        assert process.poll() is None, "the study ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "report.html").exists()
    run_job(STUDY, resolve(STUDY.settings, config), folder)
    assert_equal_tables(folder, undisturbed.path)


def _log(folder: Path) -> str:
    return (folder / "log.jsonl").read_text() if (folder / "log.jsonl").exists() else ""


def test_a_model_beside_itself_supports_no_claim(tiny_model, tmp_path):
    model = str(tiny_model)
    result = run(DIFF, tmp_path / "run", base=model, tuned=model, data="newsroom", documents=6, max_tokens=128)
    assert set(result.claims["verdict"]) <= {"undecided", "no change"}
    heads, layers = result.heads, result.layers
    assert heads[["kl_base_tuned", "kl_tuned_base", "z_cosine_distance", "weight_change"]].abs().max().max() < 1e-6
    assert layers[["kl_base_tuned", "cosine_distance"]].abs().max().max() < 1e-6


def test_an_adapter_can_be_the_tuned_model(undisturbed, tiny_model, tmp_path):
    adapter = undisturbed.path / "models" / "lora"
    result = run(STUDY, tmp_path / "run", base=str(tiny_model), tuned=str(adapter), **{**TINY_STUDY, **WITHOUT})
    ours = result.tables["layers"].set_index(["rows", "layer"])
    pairs = undisturbed.tables["pairs"]
    theirs = pairs[pairs["pair"] == "base–LoRA"].set_index(["rows", "layer"])
    pd.testing.assert_series_equal(ours["kl_base_tuned"], theirs["kl_base_tuned"], check_exact=False, rtol=1e-6)
    assert "bakeoff" not in result.tables
    assert (result.tables["claims"]["measured"].str.contains("not measured")).any()


def test_markup_in_a_document_stays_text_in_the_report(tiny_model, tmp_path):
    nasty = "<script>alert(1)</script> & <b>bold</b> </script><img src=x onerror=alert(2)>"
    rows = [{"document": f"{nasty} In town {i} the council met and voted on the budget.", "summary": f"{nasty} {i}"} for i in range(30)]
    data = tmp_path / "nasty.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = {**TINY_STUDY, "data": str(data), "train_documents": 12, "validation_documents": 4, "test_documents": 4}
    report = run(STUDY, tmp_path / "run", base=str(tiny_model), **{**settings, **WITHOUT}).report
    assert report is not None
    page = report.read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page


def test_resolved_settings_are_in_the_run(undisturbed, tiny_model):
    written: dict[str, Any] = yaml.safe_load((undisturbed.path / "study.yaml").read_text())
    assert written == dataclasses.asdict(resolve(STUDY.settings, base=str(tiny_model), **TINY_STUDY))
