"""`mechscope spectrum` gives what `logit_spectrum` gives, shows it, and refuses bands and sites that there are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.errors import SettingsError
from mechscope.lens import bands, logit_spectrum
from mechscope.studies.jobs.spectrum import JOB
from tests.studies.jobs.running import PAIRS, findings, refuses, run, shown, subject


def test_table_is_that_of_the_function_and_the_page_shows_it(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", bands=5, sites="head_output,residual", documents=4)
    expected = logit_spectrum(subject(), PAIRS.first(4), using=bands(subject(), n=5), sites=("residual", "head_output"))
    pd.testing.assert_frame_equal(result.spectrum, expected)
    assert "Cancedda 2024" in shown(result, "spectrum")


def test_layers_can_be_named() -> None:
    assert set(run(JOB, None, bands=4, layers="0,2").spectrum["component"]) == {"resid0", "resid2"}


def test_the_sentence_compares_with_a_random_direction() -> None:
    table = run(JOB, None, bands=4).spectrum
    dark = table["band"] == 3
    table.loc[dark, ["share_of_norm", "share_of_norm_low", "share_of_norm_high", "share_of_directions"]] = [0.2, 0.1, 0.3, 0.25]
    (below,) = findings("spectrum", spectrum=table)
    assert "20\u202f% [10.0, 30.0] of the squared norm, not above the 25\u202f% of a random direction (n = 6 texts)." in below
    table.loc[dark & (table["component"] == "resid1"), ["share_of_norm", "share_of_norm_low", "share_of_norm_high"]] = [0.5, 0.4, 0.6]
    (above,) = findings("spectrum", spectrum=table)
    assert "The darkest of 4 bands of the residual stream holds most at resid1: 50\u202f% [40.0, 60.0]" in above
    assert ", above the 25" in above


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bands": 33}, "'bands' is 33: the residual stream has 32 directions"),
        ({"sites": "heads"}, "names 'heads'"),
        ({"sites": ""}, "'sites' is empty"),
        ({"layers": "4"}, "layers:4 does not exist"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused_before_the_model_runs(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    refuses(JOB, tmp_path / "run", SettingsError, message, **settings)
