"""`mechscope gradient-directions` gives what `gradient_directions` gives, says what repeats in halves of the texts, and refuses bad settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechscope.data.pairs import Pairs
from mechscope.errors import MechscopeError, SettingsError
from mechscope.lens import gradient_directions
from mechscope.studies.jobs.gradient_directions import JOB
from tests.studies.jobs.running import PAIRS, findings, refuses, run, shown, subject


def test_table_is_that_of_the_function_and_the_page_shows_it(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", documents=4, layers="1-2", rank=2, top=4)
    expected = gradient_directions(subject(), PAIRS.first(4), layers=(1, 2), rank=2, k=4)
    for column in expected:
        assert [list(x) if isinstance(x, np.ndarray) else x for x in result.gradient_directions[column]] == [
            list(x) if isinstance(x, tuple) else x for x in expected[column]
        ]
    assert (result.gradient_directions["n"] == 4).all()
    assert "Katz et al. 2024" in shown(result, "gradient-directions")


def test_what_repeats_comes_from_both_halves() -> None:
    # by hand: a token of the whole set's direction that either half lists too; the copies of a text stand in one half
    first, second = PAIRS.pairs[:2]
    doubled = Pairs((first, second, replace(first, id="a copy"), replace(second, id="another")), "doubled")
    result = run(JOB, None, pairs=doubled, layers="1", rank=1, top=10).gradient_directions
    halves = [Pairs((pair,), "one text") for pair in (first, second)]
    lists = [set(gradient_directions(subject(), half, layers=(1,), rank=1, k=10)["top_ids"].iloc[0]) for half in halves]
    shared = len(set(result["top_ids"].iloc[0]) & lists[0] & lists[1])
    assert result["repeated"].iloc[0] == shared / 10
    assert shared < 10


def test_one_text_has_no_halves(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", documents=1, layers="1")
    assert "repeated" not in result.gradient_directions
    copies = Pairs(tuple(replace(PAIRS.pairs[0], id=f"copy {at}") for at in range(2)), "copies")
    assert "repeated" not in run(JOB, None, pairs=copies, layers="1", rank=1, top=4).gradient_directions
    (sentence,) = findings("gradient-directions", gradient_directions=result.gradient_directions)
    assert sentence.startswith("Of the mean loss of the texts the strongest direction")
    assert sentence.endswith(" (n = 1 text).")
    assert "half" not in sentence


def test_the_sentence_names_the_strongest_direction() -> None:
    table = run(JOB, None, documents=2, layers="0-1", rank=1).gradient_directions
    table["singular_value"], table["share"], table["repeated"] = [1.0, 3.0], [0.2, 0.85], [0.0, 0.4]
    table["top_tokens"] = [("a", "b"), ("c", " d")]
    (sentence,) = findings("gradient-directions", gradient_directions=table)
    assert (
        "in mlp down of layer 1, with 85\u202f% of that gradient's squared norm: a step raises c, ␣d; 40\u202f% of its top tokens are given by each half"
        in sentence
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "'rank' is 0"),
        ({"matrices": "w_q"}, "names 'w_q'"),
        ({"layers": "7"}, "layers:7 does not exist"),
        ({"top": 200}, "'top' is 200"),
    ],
)
def test_what_cannot_be_read_is_refused_before_the_model_runs(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    error: type[MechscopeError] = SettingsError
    refuses(JOB, tmp_path / "run", error, message, **settings)
