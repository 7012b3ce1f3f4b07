"""The ablation job: pairs of which only the clean side is read."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from mechscope.errors import DataError
from mechscope.studies.jobs import ablate
from tests.studies.jobs.running import run, write

TEXTS = ("w3 w4 w5 w6", "w7 w3 w9 w4 w8", "w5 w6 w7 w8", "w9 w8 w3 w5", "w4 w4 w6 w3", "w8 w5 w9 w7")


def rows(*, corrupt: bool, answers: bool = True) -> str:
    """Return pairs as a file has them."""
    return "\n".join(
        json.dumps(
            {"clean": text}
            | ({"corrupt": " ".join(reversed(text.split()))} if corrupt else {})
            | ({"answers": ["w10"], "wrong_answers": ["w11"]} if answers else {})
        )
        for text in TEXTS
    )


def test_a_file_without_corrupt_texts_is_ablated_as_one_with_them(tmp_path: Path) -> None:
    clean, both = (write(tmp_path / f"{corrupt}.jsonl", rows(corrupt=corrupt)) for corrupt in (False, True))
    alone, beside = (run(ablate.JOB, None, pairs=source, sites="mlp", source="zero").effects for source in (clean, both))
    pd.testing.assert_frame_equal(alone, beside)
    with pytest.raises(DataError, match="line 1: no 'corrupt'; the row has 'clean', 'answers', 'wrong_answers'"):
        run(ablate.JOB, None, pairs=clean, sites="mlp", source="corrupt")


def test_texts_alone_are_judged_by_their_loss(tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", rows(corrupt=False, answers=False))
    effects = run(ablate.JOB, None, pairs=texts, sites="mlp", source="zero", metric="loss").effects
    assert set(effects["metric"]) == {"loss"}
    assert set(effects["n"]) == {len(TEXTS)}
    with pytest.raises(DataError, match="names no"):
        run(ablate.JOB, None, pairs=texts, sites="mlp", source="zero")
