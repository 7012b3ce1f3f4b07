"""Dictionaries trained by several ranks are those of one process: every rank has a part of each batch, and all end with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from mechscope.store.run import verify
from tests.ranks import jobs
from tests.ranks.launch import Team, files, together
from tests.studies.conftest import tiny_model

__all__ = ["tiny_model"]  # a fixture of the last test

ROWS = 40


@pytest.fixture(scope="module")
def three() -> Iterator[Team]:
    team = Team(3)
    yield team
    team.end()


@cache
def alone(case: str, rows: int = ROWS) -> dict[str, np.ndarray]:
    return jobs.learned(case, rows)


@pytest.mark.parametrize("case", jobs.LEARNED)
def test_steps_of_several_ranks_are_those_of_one_process(case: str, three: Team) -> None:
    expected, (first, *others) = alone(case), three.run(jobs.learned, case, ROWS)
    if "dead_after" in jobs.LEARNED[case][1]:
        assert expected["steps"][:, 3].max() > 0, "nothing is revived"
    for name, values in expected.items():
        np.testing.assert_allclose(first[name], values, rtol=1e-9, atol=1e-11, err_msg=name)
        for other in others:
            np.testing.assert_array_equal(other[name], first[name], err_msg=name)
    assert not np.array_equal(expected["encoder.0"], jobs.learned(case, ROWS - 1)["encoder.0"]), "every row counts"


def test_a_rank_may_have_no_row_of_a_batch(three: Team) -> None:
    for case in ("topk", "batchtopk"):
        for found in three.run(jobs.learned, case, 2):
            np.testing.assert_allclose(found["encoder.0"], alone(case, 2)["encoder.0"], rtol=1e-9, atol=1e-11)


def test_what_is_no_number_for_one_rank_ends_all(three: Team) -> None:
    said = three.run(jobs.diverged, 1)
    assert len(set(said)) == 1
    assert "not finite at step 1" in said[0]


@pytest.mark.parametrize("live", [False, True])
def test_harvest_training_and_measures_of_several_ranks_are_those_of_one_process(live: bool, tmp_path: Path) -> None:
    one = jobs.dictionaries(tmp_path / "one", live)
    first, second = together(2, jobs.dictionaries, tmp_path / "two", live)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for name, values in one.items():
        np.testing.assert_array_equal(second[name], first[name], err_msg=name)
        # single precision, and Adam divides small gradients by themselves
        np.testing.assert_allclose(first[name], values, rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_command_of_several_ranks_is_that_of_one_process(tmp_path: Path, tiny_model: Path) -> None:
    settings = {"model": str(tiny_model), "pairs": "induction", "documents": 14, "test_share": 0.5, "latents": "40", "k": 4, "steps": 5}
    settings |= {"batch": 20, "transcoders": "1", "learning_rate": 1e-3, "latents_shown": 2, "examples": 2}
    jobs.features_of(settings, tmp_path / "one")
    together(2, jobs.features_of, settings, tmp_path / "two")
    assert set(verify(tmp_path / "two")["status"]) == {"ok"}
    assert files(tmp_path / "one") == files(tmp_path / "two")
    one, two = (pd.read_parquet(tmp_path / name / "tables" / "dictionary_measures.parquet") for name in ("one", "two"))
    assert_frame_equal(one, two, rtol=1e-3, atol=1e-3)
