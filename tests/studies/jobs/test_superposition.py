"""The study of superposition: tables that a reader knows the answer to, and settings that are checked first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mechscope.errors import SettingsError
from mechscope.studies.jobs import superposition
from mechscope.studies.runner import run_job
from tests.studies.jobs.running import findings, shown


def test_sparse_features_share_dimensions_and_two_of_them_make_a_pair(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"features": 6, "dimensions": 2, "decay": 0.5, "sparsities": "0,0.97", "seeds": 2}
    settings = sizes | {"steps": 1000, "dictionary_steps": 150}
    result = run_job(superposition.JOB, superposition.JOB.resolve(**settings), tmp_path / "run")
    toys, features, phases = result.superposition, result.superposition_features, result.superposition_phases
    held = toys.groupby("sparsity")["held"].max()
    assert held[0.0] == 2
    assert held[0.97] >= 4
    dense = features[(features["sparsity"] == 0) & features["held"]]
    assert list(dense["feature"]) == [0, 1]
    assert (dense["dimensionality"] > 0.95).all()
    state = phases.set_index(["sparsity", "importance"])["state"]
    assert state[0.0, 0.1] == "the first alone"
    assert state[0.0, 10.0] == "the second alone"
    assert state[0.95, 1.0] == "antipodal pair"
    assert "how strongly the second is represented" in shown(result, "superposition")
    (first, *_) = findings("superposition", superposition=toys)
    assert first.startswith("Of 6 features in 2 dimensions 2 are represented where each is zero with probability 0")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsities": "0,1"}, "setting 'sparsities' is '0,1': give numbers of 0 or more and below 1"),
        ({"sparsities": "dense"}, "setting 'sparsities' is 'dense'"),
        ({"decay": 0.0}, "setting 'decay' is 0: it must be above 0 and at most 1"),
        ({"features": 3, "dimensions": 3}, "3 features in 3 dimensions: give more features than dimensions"),
    ],
)
def test_what_is_no_toy_model_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        superposition.JOB.resolve(**settings)
