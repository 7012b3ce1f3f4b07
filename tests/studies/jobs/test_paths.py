"""`mechscope paths` gives what `path_patch` gives, shows it, and refuses receivers and senders that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.causal import path_patch
from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.studies.jobs.paths import JOB
from tests.studies.jobs.running import PAIRS, findings, refuses, run, shown, subject


def test_table_is_that_of_the_function_and_the_page_shows_heads_and_mlps(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", receivers="a2.h1<k>, logits", through_mlps=True)
    expected = path_patch(subject(), PAIRS, None, ["a2.h1<k>", "logits"], through_mlps=True).table
    pd.testing.assert_frame_equal(result.paths, expected)
    assert set(result.paths["receivers"]) == {"a2.h1<k>, logits"}
    page = shown(result, "paths")
    assert "paths-heads" in page
    assert "paths-mlps" in page
    # what a person wrote is escaped
    assert "a2.h1<k>" not in page


def test_senders_patched_together_are_one_row(tmp_path: Path) -> None:
    result = run(JOB, None, receivers="logits", senders="a0.h1,m1", together=True)
    assert list(result.paths["component"]) == ["a0.h1,m1"]
    assert list(result.paths["site"]) == ["set"]


def test_the_sentence_names_the_sender_with_the_largest_effect() -> None:
    table = path_patch(subject(), PAIRS, "layers:0", ["logits"]).table
    table.loc[table["component"] == "a0.h2", ["effect", "low", "high"]] = [-5.0, -6.0, -4.0]
    (sentence,) = findings("paths", paths=table)
    assert "the paths to logits from one sender at a time changes logit-diff most for a0.h2: by −5.00 [−6.00, −4.00]" in sentence


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"receivers": "a2.h1"}, SettingsError, "receiver 'a2.h1' is not understood"),
        ({"receivers": "a9.h1<q>"}, SettingsError, "a9.h1 does not exist"),
        ({"receivers": " , "}, SettingsError, "no receiver was given"),
        ({"receivers": "logits", "senders": "a7.h0"}, SettingsError, "a7.h0 does not exist"),
        ({"receivers": "logits", "direction": "sideways"}, SettingsError, "'direction' is 'sideways'"),
    ],
)
def test_paths_that_are_none_are_refused_before_the_model_runs(
    settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    refuses(JOB, tmp_path / "run", error, message, **settings)


def test_pairs_without_what_the_metric_needs_are_refused_before_the_model_runs(tmp_path: Path) -> None:
    from tests.causal.pairs import random_pairs

    refuses(
        JOB, tmp_path / "run", DataError, "has no target span", pairs=random_pairs(4, with_target=False), receivers="logits", metric="loss"
    )
