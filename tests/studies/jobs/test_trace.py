"""`mechscope trace` gives what `causal_trace` gives, reads facts, shows it, and refuses texts without the segment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.causal import causal_trace
from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.studies.jobs.trace import JOB
from tests.studies.jobs.running import PAIRS, findings, refuses, run, shown, subject, write


def test_table_is_that_of_the_function_and_the_page_shows_it(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", segment="beginning", site="mlp", samples=2, window=2)
    expected = causal_trace(subject(), PAIRS, segment="beginning", site="mlp", samples=2, window=2).table
    pd.testing.assert_frame_equal(result.trace, expected)
    assert "Meng et al. 2022" in shown(result, "trace")
    assert json.loads((result.path / "manifest.json").read_text())["notes"]["samples"] == 2


def test_facts_are_read_from_a_file_with_their_subject(tmp_path: Path) -> None:
    facts = [
        {"prompt": "w3 w4 w5 w6 w7", "subject": "w4 w5", "answer": " w8"},
        {"prompt": "w9 w10 w11 w12", "subject": "w9", "answer": " w13"},
    ]
    file = write(tmp_path / "facts.jsonl", "\n".join(map(json.dumps, facts)))
    traced = run(JOB, None, pairs=f"facts:{file}", samples=1).trace
    last = traced[traced["positions"] == "last subject token"]
    assert (last["n"] == 2).all()
    # one subject of one word has no middle, and the other has none either
    assert (traced.loc[traced["positions"] == "middle subject tokens", "n"] == 0).all()


def test_the_sentence_says_what_noise_took_and_what_came_back() -> None:
    table = causal_trace(subject(), PAIRS, segment="beginning", samples=1).table
    row = table.index[(table["component"] == "resid1") & (table["positions"] == "last subject token")][0]
    changed = {"effect": 0.4, "low": 0.3, "high": 0.5, "value": 0.6, "normalised": 0.8, "normalised_low": 0.7, "normalised_high": 0.9}
    table["withheld"] = ""
    table.loc[row, list(changed)] = list(changed.values())
    table.loc[table.index != row, "effect"] = 0.01
    (sentence,) = findings("trace", trace=table)
    assert (
        "With a blurred subject, restoring resid1 at the last subject token changes probability most: by +0.400 [+0.300, +0.500]"
        in sentence
    )
    assert (
        " to 0.600, 80\u202f% [70.0, 90.0] of what the noise took; 0 of 18 effects differ from zero at q < 0.05 (n = 6 texts)." in sentence
    )
    (sentence,) = findings("trace", trace=table.assign(withheld="too few texts: 4 of at least 6"))
    assert "its share of what the noise took is withheld (too few texts: 4 of at least 6); 0 of 18" in sentence
    assert sentence.endswith(" (n = 6 texts).")


def test_roles_that_no_text_has_do_not_spoil_the_page(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", segment="beginning", samples=1)
    assert np.isnan(result.trace.loc[result.trace["positions"] == "middle subject tokens", "effect"]).all()
    assert "nan" not in " ".join(findings("trace", trace=result.trace))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"segment": "subject"}, DataError, "has no segment 'subject' to corrupt"),
        ({"segment": "beginning", "window": 5}, SettingsError, "window of 5 layers"),
        ({"segment": "beginning", "noise": 0}, SettingsError, "'noise' is 0"),
        ({"segment": "beginning", "samples": 0}, SettingsError, "'samples' is 0"),
        ({"segment": "beginning", "site": "head"}, SettingsError, "'site' is 'head'"),
    ],
)
def test_what_cannot_be_traced_is_refused_before_the_model_runs(
    settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    refuses(JOB, tmp_path / "run", error, message, **settings)
