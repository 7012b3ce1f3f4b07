"""The one runner: what it does whatever the job."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mechscope.errors import RunError
from mechscope.store.run import verify
from mechscope.studies.jobs import patch
from mechscope.studies.runner import draw_again
from tests.studies.jobs.running import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a finished run."""
    return run(patch.JOB, tmp_path / "run", site="mlp").path


def test_the_report_is_written_again_whenever_that_is_wanted(folder: Path) -> None:
    page = folder / "report.html"
    before, text = page.stat().st_mtime_ns, page.read_text(encoding="utf-8")
    assert draw_again(folder) == page
    assert page.stat().st_mtime_ns > before
    assert page.read_text(encoding="utf-8") == text
    assert set(verify(folder)["status"]) <= {"ok", "unrecorded"}


def test_a_run_without_tables_has_no_report(folder: Path) -> None:
    shutil.rmtree(folder / "tables")
    with pytest.raises(RunError, match=r"holds no table to report on|cannot read the table"):
        draw_again(folder)


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
