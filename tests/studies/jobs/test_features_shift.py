"""`mechscope features shift` does what the function does on labelled texts, takes latents judged by hand, and refuses what it cannot use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope import features
from mechscope.data.newsroom import newsroom_tokenizer
from mechscope.data.two_labels import biased_split, newsroom_two_labels, read_two_labels
from mechscope.errors import DataError, SettingsError
from mechscope.studies.jobs.features_shift import JOB
from tests.features.test_shift import labelled, labelled_rows
from tests.studies.jobs.running import findings, refuses, run, shown, subject

QUICK: dict[str, Any] = {"texts": 160, "latents": 8, "draws": 2}


@pytest.fixture
def dictionary(tmp_path: Path) -> str:
    layout = features.autoencoder("resid1", subject().anatomy.d_model, 40, features.Rule("relu"))
    features.Dictionary.plain(layout, layout.tensors(seed=1)).save(tmp_path / "resid1.safetensors")
    return str(tmp_path / "resid1.safetensors")


@pytest.fixture
def data(tmp_path: Path) -> str:
    """TwoLabels texts as a file."""
    (tmp_path / "labelled.jsonl").write_text("\n".join(json.dumps(row) for row in labelled_rows(160)), encoding="utf-8")
    return str(tmp_path / "labelled.jsonl")


def test_the_tables_are_those_of_the_function(tmp_path: Path, dictionary: str, data: str) -> None:
    result = run(JOB, tmp_path / "run", data=data, dictionary=dictionary, **QUICK)
    texts = read_two_labels(data, subject().tokenizer, limit=160, max_tokens=64)
    np.testing.assert_array_equal(texts.intended, labelled().intended[:160])
    np.testing.assert_array_equal(texts.unintended, labelled().unintended[:160])
    standing = [features.Standing.of(features.Dictionary.load(dictionary), subject())]
    expected = features.shift(subject(), standing, biased_split(texts), features.Place.parse("resid1"), most=8, draws=2)
    pd.testing.assert_frame_equal(result.shift_methods.drop(columns="probe"), expected.methods)
    pd.testing.assert_frame_equal(result.shift_groups, expected.groups)
    pd.testing.assert_frame_equal(result.shift_latents.drop(columns="by"), expected.latents)
    assert set(result.shift_latents["by"]) == {"labels"}
    assert "LEACE" in shown(result, "shift")


def test_latents_judged_by_hand_are_read_from_a_file(tmp_path: Path, dictionary: str, data: str) -> None:
    (tmp_path / "judged.txt").write_text("resid1.f5\nresid1.f7\n", encoding="utf-8")
    result = run(JOB, None, data=data, dictionary=dictionary, unintended=str(tmp_path / "judged.txt"), **QUICK)
    latents = result.shift_latents
    assert latents.loc[latents["judged"], "component"].tolist() == ["resid1.f5", "resid1.f7"]
    assert set(latents["by"]) == {"hand"}
    (said,) = findings("shift", **result.tables)
    assert "With the 2 latents judged unintended ablated" in said


def test_the_newsroom_is_labelled_by_what_is_known_of_it() -> None:
    found = newsroom_two_labels(30, newsroom_tokenizer(), max_tokens=128)
    assert len(found) == 30
    assert 0 < found.intended.sum() < 30
    assert 0 < found.unintended.sum() < 30
    again = newsroom_two_labels(30, newsroom_tokenizer(), max_tokens=128)
    assert again.texts.hash == found.texts.hash


def test_what_cannot_be_used_is_refused_before_the_model_runs(tmp_path: Path, dictionary: str, data: str) -> None:
    out = tmp_path / "out"
    refuses(JOB, out, SettingsError, "behind the probe at resid0", data=data, dictionary=dictionary, probe="resid0")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "w3 w4", "intended": 1}\n', encoding="utf-8")
    refuses(JOB, tmp_path / "bad", DataError, "line 1 has no 'unintended', .*it has text, intended;", data=str(bad), dictionary=dictionary)
    bad.write_text('{"text": "w3 w4", "intended": 1, "unintended": 2}\n', encoding="utf-8")
    refuses(JOB, tmp_path / "one", DataError, "label 'intended' has 1 values", data=str(bad), dictionary=dictionary)
    hand = tmp_path / "hand.txt"
    wrong = {"resid1.f40": "resid1.f40 does not exist", "resid0.f1": "belongs to no dictionary", "resid1.error": "are no latents"}
    for text, message in wrong.items():
        hand.write_text(text, encoding="utf-8")
        refuses(JOB, out, SettingsError, message, data=data, dictionary=dictionary, unintended=str(hand))
    hand.write_text("resid1.f4", encoding="utf-16")
    for file in (hand, tmp_path / "absent.txt"):
        refuses(JOB, out, SettingsError, "'unintended' is .*cannot be read", data=data, dictionary=dictionary, unintended=str(file))
    (tmp_path / "none.txt").write_text("\n", encoding="utf-8")
    refuses(JOB, out, SettingsError, "names no latent", data=data, dictionary=dictionary, unintended=str(tmp_path / "none.txt"))
