"""The whole study on a tiny model: every table, the same twice, continued after a kill, and honest about models that do not differ."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from mechscope import ranks
from mechscope.errors import RunError, SettingsError
from mechscope.store.run import RunFolder, verify
from mechscope.store.tables import read_table
from mechscope.studies.resolving import resolve
from mechscope.studies.settings import BakeOffSettings, DiffSettings, StudySettings
from mechscope.studies.summarization import Study, bakeoff_run, diff_run, study
from tests.studies.conftest import TINY_STUDY

HEADS = [
    "rows",
    "layer",
    "head",
    "component",
    "n",
    "entropy_base",
    "entropy_tuned",
    "entropy_change",
    "entropy_change_se",
    "entropy_change_low",
    "entropy_change_high",
    "entropy_change_p",
    "entropy_change_q",
    "relative_entropy_base",
    "relative_entropy_tuned",
    "kl_base_tuned",
    "kl_base_tuned_se",
    "kl_tuned_base",
    "kl_tuned_base_se",
    "distance_base",
    "distance_tuned",
    "sink_base",
    "sink_tuned",
    "z_cosine_distance",
    "weight_change",
]
LAYERS = [
    "rows",
    "layer",
    "n",
    "kl_base_tuned",
    "kl_tuned_base",
    "entropy_change",
    "share_focused",
    "activation_norm_base",
    "activation_norm_tuned",
    "activation_abs_base",
    "activation_abs_tuned",
    "cosine_distance",
    "cka",
    "rsa",
    "weight_change",
    "score",
]
TABLES = ("heads", "layers", "weights", "outputs", "selection", "bakeoff", "learning_curves", "claims", "summaries", "rouge", "pairs")


def tables_of(run: Path) -> dict[str, pd.DataFrame]:
    return {path.stem: read_table(path) for path in sorted((run / "tables").glob("*.parquet"))}


def assert_equal_tables(found: Path, expected: Path) -> None:
    first, second = tables_of(found), tables_of(expected)
    assert first.keys() == second.keys()
    for name in first:
        pd.testing.assert_frame_equal(first[name], second[name], check_exact=True, obj=name)


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study(resolve(StudySettings, base=str(tiny_model), **TINY_STUDY), tmp_path_factory.mktemp("runs") / "undisturbed")


def test_a_study_writes_every_table_with_the_promised_columns(undisturbed):
    assert set(TABLES) <= tables_of(undisturbed.path).keys()
    assert undisturbed.tables["heads"].columns[: len(HEADS)].tolist() == HEADS
    assert undisturbed.tables["layers"].columns[: len(LAYERS)].tolist() == LAYERS


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


# batches may be smaller where memory ran out: only how the work is cut up depends on it
@pytest.mark.parametrize("changed", [{}, {"tokens_per_batch": 64}])
def test_asked_again_a_finished_study_runs_nothing(undisturbed, tiny_model, changed):
    before = {path: path.stat().st_mtime_ns for path in (undisturbed.path / "tables").iterdir()}
    study(resolve(StudySettings, base=str(tiny_model), **{**TINY_STUDY, **changed}), undisturbed.path)
    assert {path: path.stat().st_mtime_ns for path in (undisturbed.path / "tables").iterdir()} == before
    events = RunFolder.read(undisturbed.path).events()
    begun = max(index for index, event in enumerate(events) if event["message"] == "run continues")
    assert not [event for event in events[begun:] if " starts" in event["message"]]


def test_other_settings_on_the_same_folder_are_refused(undisturbed, tiny_model):
    with pytest.raises(RunError, match="max_tokens"):
        study(resolve(StudySettings, base=str(tiny_model), **{**TINY_STUDY, "max_tokens": 96}), undisturbed.path)


@pytest.mark.parametrize(("begin", "settings"), [(study, StudySettings), (bakeoff_run, BakeOffSettings)])
def test_batches_that_the_ranks_cannot_share_are_refused_before_anything_is_done(begin, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 3)
    places = {} if settings is StudySettings else {"target_layers": "layers:0"}
    with pytest.raises(SettingsError, match=r"batches of 32 cannot be divided among 3 ranks: choose a multiple of 3 .* divides 32"):
        begin(resolve(settings, base="nowhere", data="newsroom", **places), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# where the study is killed, and how many seconds behind what its log says; started again by the same command, it may be killed again
KILLED = [
    [("stage difference starts", 0.1), ("bake-off arm equal_parameters, more_rank, seed 1", 0.2)],
    pytest.param([("stage tune_tuned starts", 1.0)], marks=pytest.mark.slow),
    pytest.param([("stage tune_lora starts", 0.5)], marks=pytest.mark.slow),
    pytest.param([("bake-off arm equal_rank, standard, seed 0", 1.0)], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("killed", KILLED)
def test_a_study_killed_in_the_middle_ends_with_equal_tables(undisturbed, tiny_model, tmp_path, killed):
    run, config = tmp_path / "run", tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump({"base": str(tiny_model), **TINY_STUDY}))
    command = [sys.executable, "-m", "mechscope", "study", "summarization", "--config", str(config), "--out", str(run)]
    for after, delay in killed:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        deadline = time.monotonic() + 240
        while after not in _log(run) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(delay)
        assert process.poll() is None, "the study ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (run / "report.html").exists()
    study(resolve(StudySettings, config), run)
    assert_equal_tables(run, undisturbed.path)


def _log(run: Path) -> str:
    return (run / "log.jsonl").read_text() if (run / "log.jsonl").exists() else ""


def test_a_model_beside_itself_supports_no_claim(tiny_model, tmp_path):
    found = diff_run(
        resolve(DiffSettings, base=str(tiny_model), tuned=str(tiny_model), data="newsroom", documents=6, max_tokens=128), tmp_path / "run"
    )
    assert set(found.tables["claims"]["verdict"]) <= {"undecided", "no change"}
    heads, layers = found.tables["heads"], found.tables["layers"]
    assert heads[["kl_base_tuned", "kl_tuned_base", "z_cosine_distance", "weight_change"]].abs().max().max() < 1e-6
    assert layers[["kl_base_tuned", "cosine_distance"]].abs().max().max() < 1e-6


def test_an_adapter_can_be_the_tuned_model(undisturbed, tiny_model, tmp_path):
    adapter = undisturbed.path / "models" / "lora"
    settings = resolve(StudySettings, base=str(tiny_model), tuned=str(adapter), bakeoff=False, **TINY_STUDY)
    found = study(settings, tmp_path / "run")
    ours = found.tables["layers"].set_index(["rows", "layer"])
    pairs = undisturbed.tables["pairs"]
    theirs = pairs[pairs["pair"] == "base–LoRA"].set_index(["rows", "layer"])
    pd.testing.assert_series_equal(ours["kl_base_tuned"], theirs["kl_base_tuned"], check_exact=False, rtol=1e-6)
    assert "bakeoff" not in found.tables
    assert (found.tables["claims"]["measured"].str.contains("not measured")).any()


def test_markup_in_a_document_stays_text_in_the_report(tiny_model, tmp_path):
    nasty = "<script>alert(1)</script> & <b>bold</b> </script><img src=x onerror=alert(2)>"
    rows = [{"document": f"{nasty} In town {i} the council met and voted on the budget.", "summary": f"{nasty} {i}"} for i in range(30)]
    data = tmp_path / "nasty.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = {**TINY_STUDY, "data": str(data), "train_documents": 12, "validation_documents": 4, "test_documents": 4}
    found = study(resolve(StudySettings, base=str(tiny_model), bakeoff=False, **settings), tmp_path / "run")
    page = found.report.read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page


def test_resolved_settings_are_in_the_run(undisturbed, tiny_model):
    written: dict[str, Any] = yaml.safe_load((undisturbed.path / "study.yaml").read_text())
    assert written == dataclasses.asdict(resolve(StudySettings, base=str(tiny_model), **TINY_STUDY))
