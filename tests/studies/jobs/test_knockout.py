"""`mechscope knockout` gives what `attention_knockout` gives, shows it, and refuses what cannot be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.causal import attention_knockout
from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.studies.jobs.knockout import JOB
from tests.studies.jobs.running import PAIRS, findings, refuses, run, shown, subject


def test_table_is_that_of_the_function_and_the_page_shows_it(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", keys="beginning", window=2)
    expected = attention_knockout(subject(), PAIRS, keys="beginning", window=2).table
    pd.testing.assert_frame_equal(result.knockout, expected)
    page = shown(result, "knockout")
    assert "Attention knockout in" in page
    assert "Geva et al. 2023" in page


def test_single_heads_are_drawn_as_layers_by_heads(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", keys="2,4", queries="last", each_head=True, components="layers:1")
    assert list(result.knockout["component"]) == [f"a1.h{head}" for head in range(4)]
    shown(result, "knockout")


def test_the_sentence_names_the_largest_effect_of_either_sign() -> None:
    table = attention_knockout(subject(), PAIRS, keys="beginning").table
    table.loc[2, ["effect", "value", "low", "high", "q"]] = [-9.0, -8.0, -9.5, -8.5, 0.001]
    table["q"] = [0.5, 0.5, 0.001]
    (sentence,) = findings("knockout", knockout=table)
    assert "most in layer 2: by −9.00 [−9.50, −8.50] to −8.00; " in sentence
    assert sentence.endswith("; 1 of 3 effects differs from zero at q < 0.05 (n = 6 texts).")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"keys": "middle"}, DataError, "positions 'middle' are not known"),
        ({"keys": "beginning,changed fact"}, SettingsError, "name several places"),
        ({"keys": "last", "queries": "beginning"}, SettingsError, "swap the two"),
        ({"keys": "beginning", "window": 9}, SettingsError, "window of 9 layers"),
        ({"keys": "beginning", "heads": "a9.h1"}, SettingsError, "a9.h1 does not exist"),
        ({"keys": "beginning", "components": "layers:7"}, SettingsError, "layers:7 does not exist"),
        ({"keys": "beginning", "metric": "nonsense"}, SettingsError, "'metric' is 'nonsense'"),
        ({"keys": "beginning", "heads": "a1.h1", "each_head": True}, SettingsError, "choose those by --components"),
        ({"keys": "beginning", "window": 2, "each_head": True}, SettingsError, "leave one of them out"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_the_model_runs(
    settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    refuses(JOB, tmp_path / "run", error, message, **settings)
