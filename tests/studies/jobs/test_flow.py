"""`mechscope flow` gives what `attention_flow` gives, shows it, and refuses segments that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.causal import attention_flow
from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.studies.jobs.flow import JOB
from tests.studies.jobs.running import PAIRS, findings, refuses, run, shown, subject

SEGMENTS = ["beginning", "changed fact", "last"]


def test_table_is_that_of_the_function_and_the_page_shows_it(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", segments=",".join(SEGMENTS))
    pd.testing.assert_frame_equal(result.flow, attention_flow(subject(), PAIRS, SEGMENTS).table)
    assert "last → beginning" in shown(result, "flow")


def test_the_sentence_names_the_way_with_the_largest_effect_and_counts_the_ways() -> None:
    table = attention_flow(subject(), PAIRS, SEGMENTS).table
    row = table.index[table["positions"] == "last → beginning"][1]
    table.loc[row, ["effect", "low", "high"]] = [7.0, 6.0, 8.0]
    (sentence,) = findings("flow", flow=table)
    assert f"Of {table['positions'].nunique()} ways between segments the largest effect has last → beginning in layer 1: cut" in sentence
    assert "by +7.00 [+6.00, +8.00]; 0 of 15 effects differ from zero at q < 0.05 (n = 6 texts)." in sentence


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"segments": "beginning,middle"}, DataError, "positions 'middle' are not known"),
        ({"segments": "last,last"}, SettingsError, "each once"),
        ({"segments": " , "}, SettingsError, "give one name or more"),
        ({"segments": "beginning,last", "window": 4}, SettingsError, "window of 4 layers"),
        ({"segments": "beginning,last", "components": "layers:7"}, SettingsError, "layers:7 does not exist"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_the_model_runs(
    settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    refuses(JOB, tmp_path / "run", error, message, **settings)
