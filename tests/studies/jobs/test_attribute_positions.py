"""`mechscope attribute-positions` gives what `attribute_positions` gives, averages it over texts, shows it, and refuses what has no metric."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, SettingsError
from mechscope.lens import attribute_logits, attribute_positions
from mechscope.settings import resolve
from mechscope.studies.jobs.attribute_positions import JOB
from mechscope.studies.runner import run_job
from tests.studies.jobs.running import PAIRS, findings, refuses, run, shown, subject


def test_table_is_that_of_the_function_and_the_page_shows_it(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", documents=2)
    pd.testing.assert_frame_equal(result.attribute_positions, attribute_positions(subject(), PAIRS.first(2)))
    assert "Elhage et al. 2021" in shown(result, "attribute-positions")


def test_every_token_of_a_bare_text_is_attributed() -> None:
    settings = resolve(JOB.settings, model="given", text="w3 w4 w5 w6")
    result = run_job(JOB, settings, None, given={"model": subject()})
    assert sorted(set(result.attribute_positions["position"])) == [0, 1, 2]


def test_means_over_texts_are_those_of_logit_attribution() -> None:
    summary = run(JOB, None, documents=6).attribute_positions_summary.set_index("component")
    expected = attribute_logits(subject(), PAIRS, metric="target-logit").table().set_index("component")
    own = summary.loc[expected.index.intersection(summary.index)]
    assert len(own) > 10
    for column, other in (("effect", "effect"), ("effect_low", "low"), ("effect_high", "high")):
        pd.testing.assert_series_equal(own[column], expected.loc[own.index, other], check_names=False, rtol=1e-4, atol=1e-6)
    # at every position some part is the largest
    assert summary["largest"].sum() == pytest.approx(1)


def test_the_sentence_names_the_largest_part() -> None:
    summary = run(JOB, None, documents=3).attribute_positions_summary
    summary["effect"], summary["largest"] = 0.0, 0.0
    summary.loc[summary["component"] == "m1", ["effect", "effect_low", "effect_high"]] = [-2.0, -3.0, -1.0]
    summary.loc[summary["component"] == "a2.h1", ["effect", "largest", "largest_low", "largest_high"]] = [0.5, 0.4, 0.3, 0.5]
    (sentence,) = findings("attribute-positions", attribute_positions_summary=summary)
    assert "m1 has the largest mean contribution to the metric (target-logit): −2.00 [−3.00, −1.00] of −1.50 logits in all. " in sentence
    assert sentence.endswith(" a2.h1 is the largest part at 40\u202f% [30.0, 50.0] of the positions (n = 3 texts).")


def test_what_has_no_metric_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    bare = Pairs((replace(PAIRS.pairs[0], target=None, answers=(), wrong_answers=()),), "bare")
    refuses(JOB, tmp_path / "one", DataError, "neither a target span nor answers", pairs=bare)
    refuses(JOB, tmp_path / "two", DataError, "names no right answer", pairs=bare, metric="logit-diff")
    refuses(JOB, tmp_path / "three", SettingsError, "'metric' is 'loss'", metric="loss")
