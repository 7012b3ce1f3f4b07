"""Effects that no test can say are zero: a divergence from the unchanged run."""

from __future__ import annotations

import numpy as np

from mechscope.causal.effects import effects

RANDOM = np.random.default_rng(0)
ROWS = [{"component": "m0"}, {"component": "m1"}]


def test_a_divergence_from_the_unchanged_run_is_not_tested_against_zero_and_one_between_runs_is() -> None:
    values, nothing = RANDOM.exponential(size=(2, 8)), np.zeros(8)
    table = effects(ROWS, values, nothing, metric="kl").table
    assert table[["p", "q"]].isna().all().all()
    assert table[["low", "high"]].notna().all().all()
    # from a run that already diverges the effect may have either sign
    assert effects(ROWS, values, RANDOM.exponential(size=8), metric="kl").table[["p", "q"]].notna().all().all()
    assert effects(ROWS, values, nothing, metric="loss").table[["p", "q"]].notna().all().all()
