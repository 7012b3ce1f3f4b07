"""`mechscope scrub` reads a hypothesis from a file, gives what `scrub` gives, shows it, and refuses what is no hypothesis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.causal import scrub
from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.report.sections import sections
from mechscope.studies.jobs.scrub import JOB
from tests.causal.pairs import random_pairs
from tests.studies.jobs.running import findings, refuses, run, shown, subject, write

EQUAL = random_pairs(6, lengths=(9,))
LABELS = ["x", "y", "x", "y", "x", "z"]


def test_table_is_that_of_the_function_and_the_page_shows_it(tmp_path: Path) -> None:
    file = write(tmp_path / "h.yaml", f"m2: null\na1.h1,a1.h2: {json.dumps(LABELS)}\n")
    result = run(JOB, tmp_path / "run", pairs=EQUAL, hypothesis=file, samples=3)
    expected = scrub(subject(), EQUAL, {"m2": None, "a1.h1,a1.h2": LABELS}, samples=3)
    pd.testing.assert_frame_equal(result.scrub, expected.summary)
    pd.testing.assert_frame_equal(result.scrub_samples, expected.table)
    parts = result.scrub_hypothesis.set_index("component")
    assert parts["labels"].to_dict() == {"m2": 1, "a1.h1,a1.h2": 3}
    # the one text labelled z has nobody to exchange with
    assert parts["alone"].to_dict() == {"m2": 0, "a1.h1,a1.h2": 1}
    page = shown(result, "scrub")
    assert "1 of 6 texts are the only ones with their label at a1.h1,a1.h2 and keep their own value" in page


def test_labels_by_name_are_answers_or_the_tokens_of_a_segment(tmp_path: Path) -> None:
    file = write(tmp_path / "h.json", json.dumps({"m1": "answers", "m0": "beginning"}))
    result = run(JOB, None, pairs=EQUAL, hypothesis=file, samples=1)
    # every pair has answers and a beginning of its own, so nothing is exchanged
    assert (result.scrub_hypothesis["alone"] == 6).all()
    assert result.scrub.set_index("run").loc["scrubbed", "effect"] == pytest.approx(0, abs=1e-5)


def test_the_commonest_length_is_kept_with_its_labels(tmp_path: Path) -> None:
    mixed = random_pairs(6, lengths=(9, 12, 9))
    file = write(tmp_path / "h.json", json.dumps({"m1": LABELS}))
    result = run(JOB, tmp_path / "run", pairs=mixed, hypothesis=file, samples=1, commonest_length=True)
    assert (result.scrub["n"] == 4).all()
    # texts 0, 2, 3, 5 are left, labelled x, x, y, z
    assert result.scrub_hypothesis["alone"].item() == 2
    notes = json.loads((result.path / "manifest.json").read_text())["notes"]
    assert notes == {"pairs": 4, "left out by length": 2}


def test_the_sentence_gives_the_share_between_both_controls() -> None:
    table = scrub(subject(), EQUAL, {"m2": None}, samples=1).summary.set_index("run")
    table.loc["full", "value"], table.loc["everything", "value"] = 3.0, 1.0
    table.loc["scrubbed", ["value", "recovered", "recovered_low", "recovered_high"]] = [2.5, 0.75, 0.6, 0.9]
    table["withheld"] = ""
    (sentence,) = findings("scrub", scrub=table.reset_index())
    assert "Under the hypothesis 75\u202f% [60.0, 90.0] of logit-diff is left: 2.50, between 1.00 with everything exchanged" in sentence
    assert sentence.endswith("and 3.00 of the model itself (n = 6 texts).")
    (sentence,) = findings("scrub", scrub=table.assign(withheld="nothing is lost").reset_index())
    assert sentence == "The share of logit-diff that is left under the hypothesis: withheld, as nothing is lost (n = 6 texts)."


def test_a_hypothesis_that_was_tested_has_no_caveat_about_labels() -> None:
    parts = pd.DataFrame([{"component": "m1", "depends_on": "nothing", "labels": 1, "alone": 0, "n": 6}])
    said = sections()["scrub"].caveats({"scrub_hypothesis": parts})
    assert not [caveat for caveat in said if "only ones" in caveat.text]


@pytest.mark.parametrize(
    ("hypothesis", "settings", "error", "message"),
    [
        ({"m1": "middle"}, {}, SettingsError, "names 'middle', which pair 'pair 0' does not have: use answers"),
        ({"m1": ["x"]}, {}, SettingsError, "has 1 labels for m1, there are 6 pairs"),
        ({"m1": 3}, {}, SettingsError, "says of m1 3: write null"),
        ({"m9": None}, {}, SettingsError, "component m9 does not exist"),
        ({"m1": None, "layers:1": None}, {}, SettingsError, "twice"),
        ({}, {}, SettingsError, "holds nothing"),
        ({"m1": None}, {"samples": 0}, SettingsError, "'samples' is 0"),
        ({"m1": None}, {"pairs": random_pairs(6)}, DataError, "lengthen the shorter one"),
    ],
)
def test_what_is_no_hypothesis_is_refused_before_the_model_runs(
    hypothesis: dict[str, Any], settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "h.json", json.dumps(hypothesis))
    refuses(JOB, tmp_path / "run", error, message, **{"pairs": EQUAL, "hypothesis": file, **settings})
