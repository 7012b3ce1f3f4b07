"""`mechscope suppress` gives what `suppress_bands` gives beside as many random directions, shows it, and refuses bands that there are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.lens import bands, suppress_bands
from mechscope.studies.jobs.suppress import JOB
from tests.studies.jobs.running import PAIRS, findings, refuses, run, shown, subject


def test_table_is_that_of_the_function_and_the_page_shows_it(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", bands=8, suppressed="6-7,0", rows="target", documents=4, controls=1)
    own = result.suppress[result.suppress["directions"] == "bands"].reset_index(drop=True)
    expected = suppress_bands(subject(), PAIRS.first(4), (0, 6, 7), using=bands(subject(), n=8), rows="target")
    pd.testing.assert_frame_equal(own[list(expected.columns)], expected)
    assert (own["count"] == 12).all()
    assert (own["width"] == 32).all()
    assert "Cancedda 2024" in shown(result, "suppress")


def test_controls_are_random_sets_of_as_many_directions() -> None:
    table = run(JOB, None, bands=4, suppressed="0", layers="1", controls=2).suppress
    assert list(zip(table["directions"], table["draw"], strict=True)) == [("bands", -1), ("random", 0), ("random", 1)]
    assert table["loss_change"].nunique() == 3
    again = run(JOB, None, bands=4, suppressed="0", layers="1", controls=2).suppress
    pd.testing.assert_frame_equal(table, again)
    # all directions are all directions, whatever the basis
    everything = run(JOB, None, bands=4, suppressed="0-3", layers="1", controls=1).suppress
    np.testing.assert_allclose(everything["loss_suppressed"], everything["loss_suppressed"].iloc[0], rtol=1e-4)


def test_the_sentence_says_whether_it_is_more_than_random_directions() -> None:
    table = run(JOB, None, bands=4, suppressed="0", layers="1,2", controls=2).suppress
    own, control = table["directions"] == "bands", table["directions"] == "random"
    table.loc[own, ["loss", "loss_change", "loss_change_low", "loss_change_high", "loss_change_q"]] = [3.0, 0.5, 0.4, 0.6, 0.01]
    table.loc[own & (table["layer"] == 2), "loss_change"] = 0.1
    table.loc[control, "loss_change"] = 0.2
    (above,) = findings("suppress", suppress=table)
    assert (
        "Taking bands 0 (8 of 32 directions) out of the residual stream raises the loss most at resid1: from 3.00 by +0.500 [+0.400, +0.600]"
        in above
    )
    assert "; 2 random sets of as many directions change it by +0.200 at most, and the interval lies above all of them. " in above
    assert above.endswith(" It changes at 2 of 2 layers at q < 0.05 (n = 6 texts).")
    table.loc[control, "loss_change"] = 0.45
    (not_above,) = findings("suppress", suppress=table)
    assert "does not lie above all of them" in not_above


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"suppressed": "20"}, SettingsError, "name some of the bands 0-19"),
        ({"suppressed": "dark"}, SettingsError, "give numbers of bands"),
        ({"suppressed": ""}, SettingsError, "name some of the bands"),
        ({"suppressed": "0", "bands": 40}, SettingsError, "the residual stream has 32 directions"),
        ({"suppressed": "0", "layers": "3"}, SettingsError, "layers:3 does not exist"),
        (
            {"suppressed": "0", "rows": "target", "pairs": Pairs((replace(PAIRS.pairs[0], target=None),), "bare")},
            DataError,
            "no text has a target",
        ),
    ],
)
def test_what_cannot_be_taken_out_is_refused_before_the_model_runs(
    settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    refuses(JOB, tmp_path / "run", error, message, **settings)
