"""`mechscope attribute-sources` gives what `attribute_sources` gives, averages it over texts, shows it, and refuses heads that there are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.data.pairs import Pairs
from mechscope.errors import MechscopeError, SettingsError
from mechscope.lens import attribute_logits, attribute_sources
from mechscope.studies.jobs.attribute_sources import JOB
from tests.studies.jobs.running import PAIRS, findings, refuses, run, shown, subject

HEADS = "a1.h0,a2.h3"


def test_table_is_that_of_the_function_and_the_page_shows_it(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", components=HEADS, documents=3)
    pd.testing.assert_frame_equal(result.attribute_sources, attribute_sources(subject(), PAIRS.first(3), HEADS))
    assert set(result.attribute_sources_summary["metric"]) == {"logit-diff"}
    assert "Elhage et al. 2021" in shown(result, "attribute-sources")


def test_metric_is_the_logit_of_what_comes_next_without_wrong_answers() -> None:
    targets = Pairs(tuple(replace(pair, wrong_answers=()) for pair in PAIRS.first(2)), "targets")
    result = run(JOB, None, pairs=targets, components=HEADS)
    pd.testing.assert_frame_equal(result.attribute_sources, attribute_sources(subject(), targets, HEADS, metric="target-logit"))


def test_means_over_texts_are_those_of_logit_attribution() -> None:
    result = run(JOB, None, components=HEADS, documents=6)
    expected = attribute_logits(subject(), PAIRS).table().set_index("component")
    for row in result.attribute_sources_summary.to_dict("records"):
        other = expected.loc[row["component"]]
        assert [row["effect"], row["effect_low"], row["effect_high"]] == pytest.approx(
            [other["effect"], other["low"], other["high"]], rel=1e-4
        )
        # one query per text: the token attended to most, by hand
        own = result.attribute_sources[result.attribute_sources["component"] == row["component"]]
        most = [part.sort_values("attention").iloc[-1] for _, part in own.groupby("text")]
        assert row["attended_effect"] == pytest.approx(sum(one["effect"] for one in most) / 6)
        assert row["attended"] == pytest.approx(sum(one["attention"] for one in most) / 6)


def test_the_sentence_compares_with_the_token_attended_to_most() -> None:
    summary = run(JOB, None, components=HEADS, documents=3).attribute_sources_summary
    columns = ["effect", "effect_low", "effect_high", "attended_effect", "attended_effect_low", "attended_effect_high", "attended"]
    summary.loc[summary["component"] == "a2.h3", columns] = [2.0, 1.0, 3.0, 1.5, 0.5, 2.5, 0.6]
    summary.loc[summary["component"] == "a1.h0", "effect"] = -0.1
    (sentence,) = findings("attribute-sources", attribute_sources_summary=summary)
    assert "a2.h3 adds +2.00 [+1.00, +3.00] logits to the metric (logit-diff, the largest of 2 heads), of which +1.50" in sentence
    assert sentence.endswith("+1.50 [+0.500, +2.50] from the token that it attends to most, with 60\u202f% of its attention (n = 3 texts).")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"components": "m1"}, SettingsError, "hold no heads"),
        ({"components": "a9.h1"}, MechscopeError, "a9"),
        (
            {"components": HEADS, "pairs": Pairs((replace(PAIRS.pairs[0], answers=()),), "none"), "metric": "logit-diff"},
            MechscopeError,
            "no right answer",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_before_the_model_runs(
    settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    refuses(JOB, tmp_path / "run", error, message, **settings)
