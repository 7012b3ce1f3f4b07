"""The one runner: what it does whatever the job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.errors import RunError
from mechscope.store.run import RunFolder, verify
from mechscope.store.tables import write_table
from mechscope.studies.jobs import patch
from mechscope.studies.runner import draw_again, run_job
from tests.studies.jobs.running import PAIRS, run, subject


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a finished run."""
    return run(patch.JOB, tmp_path / "run", site="mlp").path


def test_the_report_is_written_again_whenever_that_is_wanted(folder: Path) -> None:
    page = folder / "report.html"
    before, text = page.stat().st_mtime_ns, page.read_text(encoding="utf-8")
    assert draw_again(folder) == (page, [])
    assert page.stat().st_mtime_ns > before
    assert page.read_text(encoding="utf-8") == text
    assert set(verify(folder)["status"]) <= {"ok", "unrecorded"}


def test_a_table_that_was_edited_is_named_on_the_page_until_it_is_put_back(folder: Path) -> None:
    file = folder / "tables" / "effects.parquet"
    before = file.read_bytes()
    write_table(pd.read_parquet(file).assign(effect=7.0, low=6.0, high=8.0), file)
    page, edited = draw_again(folder)
    assert edited == ["effects"]
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert "the table effects is not what the run wrote (it was changed since, or put there by hand)" in text
    assert "+7.00" in text
    file.write_bytes(before)
    page, edited = draw_again(folder)
    assert edited == []
    assert "Edited:" not in page.read_text(encoding="utf-8")


def test_a_table_that_no_stage_wrote_is_named_too(folder: Path) -> None:
    row = {"level": "layer", "by": "weights", "into": "into_base", "rho": 0.5, "low": 0.1, "high": 0.8, "p": 0.01, "n": 6}
    write_table(pd.DataFrame([row]), folder / "tables" / "importance.parquet")
    assert draw_again(folder)[1] == ["importance"]


def test_tables_that_are_damaged_or_missing_are_all_named_and_nothing_is_drawn(folder: Path) -> None:
    page = (folder / "report.html").read_bytes()
    (folder / "tables" / "effects.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(RunError, match=r"effects \(damaged\)"):
        draw_again(folder)
    shutil.rmtree(folder / "tables")
    with pytest.raises(RunError, match=r"effects \(missing\)"):
        draw_again(folder)
    assert (folder / "report.html").read_bytes() == page


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ({"source": "a.jsonl", "documents": 1200}, "a.jsonl: 1,200 documents"),
        ({"source": "newsroom", "documents": {"train": 16, "test": 5}}, "newsroom: 16 train, 5 test documents"),
        ({"source": "ioi", "pairs": 1}, "ioi: 1 pair"),
    ],
)
def test_the_header_says_what_was_measured_and_how_much_of_it(folder: Path, data: dict[str, Any], shown: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "data": data}), encoding="utf-8")
    page, _ = draw_again(folder)
    assert f"<dt>data</dt><dd><bdi>{shown}</bdi></dd>" in page.read_text(encoding="utf-8")


def test_the_manifest_and_the_page_keep_every_command_that_did_work(tmp_path: Path) -> None:
    first, second = ["mechscope", "patch", "--site", "mlp"], ["mechscope", "patch", "--site", "attention"]
    given = {"model": subject(), "pairs": PAIRS}
    for command, site in ((first, "mlp"), (first, "mlp"), (second, "attention")):
        settings = patch.JOB.resolve(**dict.fromkeys(given, "given in memory"), site=site)
        folder = run_job(patch.JOB, settings, tmp_path / "run", command=command, given=given).path
    assert RunFolder.read(folder).manifest["commands"] == [first, second]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert '<p class="command"><code>mechscope patch --site attention</code></p>' in page
    assert "<code>mechscope patch --site mlp\nmechscope patch --site attention</code>" in page


def test_a_finished_run_is_not_done_again(folder: Path) -> None:
    tables = {file: file.stat().st_mtime_ns for file in (folder / "tables").iterdir()}
    page = (folder / "report.html").stat().st_mtime_ns
    run(patch.JOB, folder, site="mlp")
    assert {file: file.stat().st_mtime_ns for file in (folder / "tables").iterdir()} == tables
    assert (folder / "report.html").stat().st_mtime_ns == page


def test_a_changed_setting_is_no_other_run_but_another_text_is(folder: Path) -> None:
    assert set(run(patch.JOB, folder, site="attention").effects["site"]) == {"attention_output"}
    with pytest.raises(RunError, match="pairs"):
        run(patch.JOB, folder, pairs="newsroom:what")


def test_a_run_without_a_folder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run(patch.JOB, None, site="mlp")
    assert len(result.effects) == 3
    assert result.report is None
    assert list(tmp_path.iterdir()) == []
