"""A public fine-tuning that dissolves an induction head, read end to end: which head, when, and how far."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechscope.studies.jobs.dynamics import JOB
from mechscope.studies.runner import run_job


def test_the_induction_head_dissolves_before_step_100_and_it_is_the_head_of_the_last_layer(shared: Path) -> None:
    if not (shared / "models" / "induction-2L").is_dir():
        pytest.skip("../shared/models/induction-2L is not beside this checkout")
    series = {"series": str(shared / "models" / "induction-2L"), "at_steps": "0,100,400"}
    result = run_job(JOB, JOB.resolve(**series, job="roles", options="--probes 16 --show-texts 1"), None)
    steps = result.series_steps
    assert steps["step"].tolist() == [0, 100, 400]
    assert steps["repeats"].isna().all()
    assert not steps["jumps"].any()
    changes = result.series_changes[result.series_changes["quantity"] == "excess"].set_index("curve")
    head = changes.loc["induction, a1.h0"].to_dict()
    # answers fall from .98 to .28 by step 100 and to .03 at the end: so does the head's role, beyond its intervals
    assert (head["from_step"], head["to_step"], head["apart"]) == (0, 100, True)
    assert head["first"] > 0.5
    assert abs(head["last"]) < 0.02
    assert head["largest"] < 0.8 * head["change"] < 0
    induction = changes[changes.index.str.startswith("induction, ")]
    assert induction["change"].abs().idxmax() == "induction, a1.h0"
    # the previous-token head outlives it: it falls later
    assert changes.loc["previous-token, a0.h0"].to_dict()["from_step"] == 100
