"""Of every curve it is said between which steps it changed most, and whether that is a change point."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.report.course import COLUMNS, curves, meaning
from mechscope.studies.course import changes

STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


def roles(step: int, scores: dict[tuple[str, str], float], half: float = 0.01) -> pd.DataFrame:
    """Return a table of roles as the job gives it, with some of its columns."""
    rows = [
        {
            "model": "model", "role": role, "layer": int(head[1]), "head": int(head[-1]), "component": head, "n": 9,
            "score": score, "low": score - half, "high": score + half, "null": 0.1, "excess": score - 0.1, "excess_low": score - 0.1 - half,
            "excess_high": score - 0.1 + half, "threshold": np.nan, "q": 0.01, "has_role": score > 0.5, "step": step,
        }
        for (role, head), score in scores.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def of(found: pd.DataFrame, quantity: str, curve: str) -> dict[Any, Any]:
    """Return the one row of a curve."""
    (row,) = found[(found["quantity"] == quantity) & (found["curve"] == curve)].to_dict("records")
    return row


def test_numbers_of_a_table_are_curves_named_by_what_tells_its_rows_apart() -> None:
    table = pd.concat(
        [
            roles(step, {("induction", "a0.h1"): step / 10, ("induction", "a1.h0"): 0.3, ("copying", "a0.h1"): 0.5 - step})
            for step in (0, 1, 2)
        ]
    )
    found = curves({"head_roles": table.reset_index(drop=True), "unknown": table})
    assert tuple(found.columns) == COLUMNS
    moving = {("score", "induction, a0.h1"), ("score", "copying, a0.h1"), ("excess", "induction, a0.h1"), ("excess", "copying, a0.h1")}
    assert set(zip(found["quantity"], found["curve"], strict=True)) == moving  # what never moves, and q, are no curves
    own = found[(found["quantity"] == "excess") & (found["curve"] == "induction, a0.h1")]
    assert own["value"].tolist() == pytest.approx([-0.1, 0, 0.1])
    assert (own["high"] - own["low"]).tolist() == pytest.approx([0.02] * 3)
    assert own[["component", "unit", "n"]].drop_duplicates().values.tolist() == [["a0.h1", "of the role", 9]]
    assert meaning("head_roles", "excess") == "score − null"


def test_a_table_of_one_row_a_step_is_one_curve_and_rows_that_nothing_tells_apart_are_none() -> None:
    table = pd.DataFrame(
        {"step": [0, 1], "rows": ["all", "all"], "n": [4, 4], "kl_base_tuned": [0.0, 0.5], "kl_base_tuned_low": [0.0, 0.4]}
    )
    found = curves({"outputs": table})
    assert found[["curve", "component"]].drop_duplicates().values.tolist() == [["", ""]]
    assert found["low"].tolist() == [0.0, 0.4]
    assert found["high"].isna().all()
    twice = pd.concat([table, table], ignore_index=True)
    assert curves({"outputs": twice}).empty


def test_a_planted_jump_and_the_largest_change_are_found_at_their_steps() -> None:
    random = np.random.default_rng(1)
    jumping = np.where(np.array(STEPS) >= 16, 0.9, 0.2) + 0.01 * random.standard_normal(len(STEPS))
    drifting = 0.05 * np.arange(len(STEPS)) + 0.02 * random.standard_normal(len(STEPS))
    table = pd.concat(
        [roles(step, {("induction", "a0.h1"): jumping[i], ("copying", "a1.h0"): drifting[i]}) for i, step in enumerate(STEPS)],
        ignore_index=True,
    )
    found = changes(curves({"head_roles": table}))
    row = of(found, "score", "induction, a0.h1")
    assert bool(row["found"])
    assert (row["jump_step"], row["jump_step_low"], row["jump_step_high"]) == (16, 16, 16)
    assert row["jump"] == pytest.approx(0.7, abs=0.05)
    assert (row["from_step"], row["to_step"], bool(row["apart"]), row["steps"], row["n"]) == (8, 16, True, 10, 9)
    assert (row["before"], row["after"], row["first"], row["last"]) == tuple(jumping[[4, 5, 0, -1]])
    assert (row["after_low"], row["last_high"]) == pytest.approx((jumping[5] - 0.01, jumping[-1] + 0.01))
    assert row["largest"] == pytest.approx(jumping[5] - jumping[4])
    other = of(found, "score", "copying, a1.h0")
    assert not other["found"]
    assert other["jump_q"] >= other["jump_p"] > 0.05


def test_curves_of_other_steps_keep_their_own_and_few_steps_are_not_tested() -> None:
    table = pd.concat([roles(step, {("induction", "a0.h1"): step}) for step in (0, 3, 7)], ignore_index=True)
    late = roles(3, {("copying", "a1.h0"): 1.0}), roles(7, {("copying", "a1.h0"): 4.0})
    found = changes(curves({"head_roles": pd.concat([table, *late], ignore_index=True)}))
    assert [of(found, "score", "copying, a1.h0")[name] for name in ["steps", "from_step", "to_step", "change"]] == [2, 3, 7, 3]
    assert [of(found, "score", "induction, a0.h1")[name] for name in ["steps", "from_step", "to_step", "largest"]] == [3, 3, 7, 4]
    assert found[["jump", "jump_step", "jump_p", "jump_q", "bic"]].isna().all().all()
    assert not found["found"].any()
