"""Sweeps into run folders: tables, a report, resuming, and messages for what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.data.newsroom import newsroom_model_path
from mechscope.errors import DataError, MechscopeError, RunError, SettingsError
from mechscope.studies.interventions import ablate_run, parse_positions, patch_run
from mechscope.studies.pair_settings import AblateSettings, PatchSettings

MODEL = str(newsroom_model_path())


def settings(**changes: Any) -> PatchSettings:
    return PatchSettings(**{"model": MODEL, "pairs": "newsroom:when", "limit": 6, **changes})


def test_a_patch_run_holds_its_table_its_notes_and_a_page(tmp_path: Path) -> None:
    found = patch_run(settings(site="residual", positions="fact,last"), tmp_path / "run")
    table = found.tables["effects"]
    assert list(table["component"].unique()) == [f"r{layer}" for layer in range(6)]
    assert list(table["positions"].unique()) == ["fact", "last"]
    assert (table["n"] == 6).all()
    assert table.set_index(["component", "positions"]).loc[("r5", "last"), "normalised"] == pytest.approx(1.0, abs=1e-3)
    page = found.report.read_text(encoding="utf-8")
    assert "Patching newsroom/model" in page
    assert "The largest effect on logit-diff is" in page
    assert "Not part of this run" not in page
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"]["direction"] == "denoise"


def test_the_same_command_again_runs_nothing_and_other_settings_are_refused(tmp_path: Path) -> None:
    first = patch_run(settings(), tmp_path / "run")
    before = (tmp_path / "run" / "tables" / "effects.parquet").stat().st_mtime_ns
    again = patch_run(settings(), tmp_path / "run")
    assert (tmp_path / "run" / "tables" / "effects.parquet").stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(first.tables["effects"], again.tables["effects"])
    with pytest.raises(RunError, match="site"):
        patch_run(settings(site="mlp"), tmp_path / "run")


def test_attribution_reports_its_error_against_exact_patching(tmp_path: Path) -> None:
    found = patch_run(settings(method="attribution", check=5), tmp_path / "run").tables["effects"]
    assert found["exact"].notna().sum() == 5
    notes = json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"]
    assert notes["mean_absolute_error"] == pytest.approx((found["effect"] - found["exact"]).abs().mean())


@pytest.mark.parametrize(("source", "again"), [("zero", False), ("resample", True)])
def test_smaller_batches_change_nothing_but_what_is_drawn_among_their_texts(tmp_path: Path, source: Any, again: bool) -> None:
    written = []
    for tokens in (1024, 320):  # one batch of six texts, two of three
        ablate_run(
            AblateSettings(model=MODEL, pairs="newsroom:when", limit=6, sites="mlp", source=source, tokens_per_batch=tokens),
            tmp_path / "run",
        )
        written.append((tmp_path / "run" / "tables" / "effects.parquet").stat().st_mtime_ns)
    assert (written[0] != written[1]) is again


@pytest.mark.parametrize("source", ["mean", "zero", "resample"])
def test_documents_are_ablated_by_the_loss_on_their_summaries(source: Any, tmp_path: Path) -> None:
    asked = AblateSettings(model=MODEL, data="newsroom", documents=4, source=source, sites="mlp")
    table = ablate_run(asked, tmp_path / "run").tables["effects"]
    assert list(table["component"]) == [f"m{layer}" for layer in range(6)]
    assert set(table["metric"]) == {"loss"}
    assert table["effect"][0] > 0


def test_positions_are_names_or_numbers() -> None:
    assert parse_positions("all") == "all"
    assert parse_positions(" io, s1 ") == ["io", "s1"]
    assert parse_positions("-1,3") == [-1, 3]
    with pytest.raises(SettingsError, match="positions are empty"):
        parse_positions(" , ")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pairs": None}, SettingsError, r"no pairs were given: name a JSONL file, a task \(ioi, greater_than"),
        ({"pairs": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ({"pairs": "newsroom:why"}, DataError, "why"),
        ({"components": "a40.h2"}, SettingsError, "component a40.h2 does not exist"),
        ({"site": "head", "positions": "subject"}, DataError, "positions 'subject' are not known"),
        ({"metric": "loss"}, DataError, "has no target span"),
    ],
)
def test_what_cannot_be_used_is_named(changes: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        patch_run(settings(**changes), tmp_path / "run")


def test_an_ablation_needs_pairs_or_documents(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"give either pairs .* or data"):
        ablate_run(AblateSettings(model=MODEL), tmp_path / "run")
