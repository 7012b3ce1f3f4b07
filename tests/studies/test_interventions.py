"""Patching and ablation in run folders: tables, a page, resuming, and messages for what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, MechscopeError, RunError, SettingsError
from mechscope.instrument import CachedRun
from mechscope.settings import resolve
from mechscope.studies.job import Result
from mechscope.studies.jobs.ablate import JOB as ABLATE
from mechscope.studies.jobs.ablate import AblateSettings
from mechscope.studies.jobs.patch import JOB as PATCH
from mechscope.studies.pairs import parse_positions
from tests.studies.running import MODEL, finished, run


def patched(out: Path, **changes: Any) -> Result:
    return run(PATCH, out, **{"model": MODEL, "pairs": "newsroom:when", "limit": 6, **changes})


def test_a_patch_run_holds_its_table_its_notes_and_a_page(tmp_path: Path) -> None:
    result = patched(tmp_path / "run", site="residual", positions="fact,last")
    table = result.effects
    assert list(table["component"].unique()) == [f"resid{layer}" for layer in range(6)]
    assert list(table["positions"].unique()) == ["fact", "last"]
    assert (table["n"] == 6).all()
    assert table.set_index(["component", "positions"]).loc[("resid5", "last"), "normalised"] == pytest.approx(1.0, abs=1e-3)
    assert result.report is not None
    page = result.report.read_text(encoding="utf-8")
    assert "Patching newsroom/model" in page
    assert "The largest effect on logit-diff is" in page
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"]["direction"] == "denoise"


def test_the_same_command_again_runs_nothing_another_site_is_patched_anew_and_other_pairs_are_refused(tmp_path: Path) -> None:
    first = patched(tmp_path / "run")
    done = finished(tmp_path / "run")
    again = patched(tmp_path / "run")
    assert finished(tmp_path / "run") == done
    pd.testing.assert_frame_equal(first.effects, again.effects)
    other = patched(tmp_path / "run", site="mlp")
    assert set(other.effects["site"]) == {"mlp_output"}
    with pytest.raises(RunError, match="pairs"):
        patched(tmp_path / "run", pairs="newsroom:who")


def test_attribution_reports_its_error_against_exact_patching(tmp_path: Path) -> None:
    effects = patched(tmp_path / "run", method="attribution", check=5).effects
    assert effects["exact"].notna().sum() == 5
    notes = json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"]
    assert notes["mean_absolute_error"] == pytest.approx((effects["effect"] - effects["exact"]).abs().mean())


@pytest.mark.parametrize(("source", "again"), [("zero", False), ("resample", True)])
def test_smaller_batches_change_nothing_but_what_is_drawn_among_their_texts(tmp_path: Path, source: str, again: bool) -> None:
    written = []
    for tokens in (1024, 320):  # one batch of six texts, two of three
        run(ABLATE, tmp_path / "run", model=MODEL, pairs="newsroom:when", limit=6, sites="mlp", source=source, tokens_per_batch=tokens)
        written.append((tmp_path / "run" / "tables" / "effects.parquet").stat().st_mtime_ns)
    assert (written[0] != written[1]) is again


@pytest.mark.parametrize("source", ["mean", "zero", "resample"])
def test_documents_are_ablated_by_the_loss_on_their_summaries(source: str, tmp_path: Path) -> None:
    table = run(ABLATE, tmp_path / "run", model=MODEL, data="newsroom", documents=4, source=source, sites="mlp").effects
    assert list(table["component"]) == [f"m{layer}" for layer in range(6)]
    assert set(table["metric"]) == {"loss"}
    assert table["effect"][0] > 0


def test_an_ablation_run_has_a_page_that_says_so(tmp_path: Path) -> None:
    report = run(ABLATE, tmp_path / "run", model=MODEL, pairs="newsroom:when", limit=4, sites="mlp", source="zero").report
    assert report is not None
    assert "Ablating newsroom/model" in report.read_text(encoding="utf-8")


def test_positions_are_names_or_numbers() -> None:
    assert parse_positions("all") == "all"
    assert parse_positions(" io, s1 ") == ["io", "s1"]
    assert parse_positions("-1,3") == [-1, 3]
    with pytest.raises(SettingsError, match="positions are empty"):
        parse_positions(" , ")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pairs": None}, SettingsError, "'pairs' is missing: Prompt pairs: a JSONL file .* a generated task"),
        ({"pairs": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ({"pairs": "newsroom:why"}, DataError, "why"),
        ({"components": "a40.h2"}, SettingsError, "component a40.h2 does not exist"),
        ({"site": "heads"}, SettingsError, "'site' is 'heads'"),
        ({"site": "head", "positions": "subject"}, DataError, "positions 'subject' are not known"),
        ({"metric": "loss"}, DataError, "has no target span"),
    ],
)
def test_what_cannot_be_used_is_named(changes: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        patched(tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sites": "head,tail"}, SettingsError, "site 'tail' is not known"),
        ({"components": "a40.h2"}, SettingsError, "component a40.h2 does not exist"),
        ({"metric": "loss"}, DataError, "has no target span"),
    ],
)
def test_an_ablation_that_cannot_be_is_refused_before_the_pairs_are_run_and_mended_in_the_same_folder(
    changes: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Pairs] = []
    monkeypatch.setattr(CachedRun, "__init__", lambda *given, **options: runs.append(given))
    given = {"model": MODEL, "pairs": "newsroom:when", "limit": 4, "sites": "mlp", "source": "zero"}
    with pytest.raises(error, match=message):
        run(ABLATE, tmp_path / "run", **{**given, **changes})
    assert not runs
    monkeypatch.undo()
    assert len(run(ABLATE, tmp_path / "run", **given).effects) == 6


def test_an_ablation_needs_pairs_or_documents() -> None:
    several: tuple[dict[str, Any], ...] = ({}, {"pairs": "ioi", "data": "newsroom"})
    for given in several:
        with pytest.raises(SettingsError, match=r"give either pairs .* or data"):
            resolve(AblateSettings, model=MODEL, **given)


def test_documents_have_no_corrupt_text_to_ablate_with() -> None:
    with pytest.raises(SettingsError, match="documents have none"):
        resolve(AblateSettings, model=MODEL, data="newsroom", source="corrupt")
