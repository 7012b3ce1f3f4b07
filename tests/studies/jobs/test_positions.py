"""`mechscope positions` gives what `position_scores` gives beside chance, shows it for learned and rotary positions, and refuses bad settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.errors import MechscopeError, SettingsError
from mechscope.settings import resolve
from mechscope.studies.job import Result
from mechscope.studies.jobs.positions import JOB
from mechscope.studies.runner import run_job
from mechscope.subject import Subject
from mechscope.weights import position_scores
from tests import families
from tests.studies.jobs.running import findings, shown, subject


def run(model: Subject, out: Path | None, **settings: Any) -> Result:
    """Read a model's positions."""
    return run_job(JOB, resolve(JOB.settings, model="given in memory", **settings), out, given={"model": model})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_table_is_that_of_the_function_and_the_page_shows_it(family: str, tmp_path: Path) -> None:
    model = subject() if family == "gpt2" else families.subject(family)
    result = run(model, tmp_path / "run", offsets=4, components="layers:0-1", embedding="raw")
    expected = position_scores(model, heads="layers:0-1", offsets=4, embedding="raw")
    pd.testing.assert_frame_equal(result.positions.drop(columns="chance"), expected)
    assert "Elhage et al. 2021" in shown(result, "positions")
    assert "nan" not in " ".join(findings("positions", positions=result.positions))


def test_chance_is_that_of_a_query_that_picks_a_key_at_random() -> None:
    chance = run(subject(), None, offsets=3, components="a0.h0").positions["chance"]
    # queries at positions 2 to 63 see 3 to 64 keys
    assert chance.tolist() == pytest.approx([sum(1 / keys for keys in range(3, 65)) / 62] * 3)
    assert run(families.subject("llama"), None, offsets=3, components="a0.h0").positions["chance"].isna().all()


def test_the_sentence_names_the_most_positional_head() -> None:
    table = run(subject(), None, offsets=3).positions
    table["share"], table["chance"] = 0.1, 0.02
    table.loc[(table["component"] == "a1.h2") & (table["offset"] == 1), "share"] = 0.9
    table.loc[(table["component"] == "a2.h0") & (table["offset"] == 1), "share"] = 0.6
    (sentence,) = findings("positions", positions=table)
    assert "a1.h2 scores the token before highest for 90\u202f% of all queries, the most of 12 heads and offsets 0–2" in sentence
    assert "at random would do so in 2.0\u202f%. 2 of 12 heads score the token before highest for half" in sentence


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"offsets": 65}, SettingsError, "'offsets' is 65: the model has 64 positions"),
        ({"offsets": 0}, SettingsError, "'offsets' is 0"),
        ({"components": "m1"}, SettingsError, "hold no heads"),
        ({"components": "a7.h0"}, MechscopeError, "a7"),
        ({"embedding": "normal"}, SettingsError, "'embedding' is 'normal'"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], error: type[MechscopeError], message: str) -> None:
    with pytest.raises(error, match=message):
        run(subject(), None, **settings)
