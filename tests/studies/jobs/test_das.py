"""`mechscope das` gives what `das` gives on pairs held out, shows it beside its controls, and refuses what cannot be aligned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.causal import das
from mechscope.data.pairs import Pairs
from mechscope.data.splits import held_out
from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.studies.jobs.das import JOB
from tests.causal.pairs import random_pairs
from tests.studies.jobs.running import findings, refuses, run, shown, subject

# two texts of a pair have little in common, so that it matters which of them is read
MANY = Pairs(
    tuple(replace(pair, corrupt=other.clean) for pair, other in zip(random_pairs(16), random_pairs(16, seed=9), strict=True)), "unlike"
)
QUICK: dict[str, Any] = {"epochs": 2, "dimensions": 3, "controls": 2, "position": "changed", "among": "answers", "test_share": 0.5}


@pytest.mark.parametrize("reads", ["corrupt", "clean"])
def test_table_is_that_of_the_function_on_held_out_pairs(reads: str, tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", pairs=MANY, layers="0,2", reads=reads, **QUICK)
    turned = tuple(replace(pair, clean=pair.corrupt, corrupt=pair.clean) for pair in MANY) if reads == "corrupt" else MANY.pairs
    train, test = held_out(replace(MANY, pairs=turned), 0.5, 0)
    assert (len(train), len(test)) == (8, 8)
    options: dict[str, Any] = {"layers": (0, 2), "epochs": 2, "dimensions": 3, "controls": 2, "position": "changed", "among": "answers"}
    expected = das(subject(), train, test, **options)
    pd.testing.assert_frame_equal(result.das, expected)
    assert 0 < result.das["correct"].sum() < result.das["n"].sum()
    page = shown(result, "das")
    assert "Geiger et al. 2024" in page
    assert "random subspace" in page


def exchanges(learned: float, random: float, *, width: float = float("nan"), unconverged: str = "") -> pd.DataFrame:
    """Return a table of one layer in which a learned and two random subspaces reach so much of 100 pairs."""
    rows = [("das", -1, learned), ("random", 0, 0.05), ("random", 1, random), ("full", -1, 0.9), ("none", -1, 0.02)]
    return pd.DataFrame(
        [
            {"component": "resid1", "site": "residual", "layer": 1, "head": -1, "position": "last", "among": "answers", "method": method}
            | {
                "draw": draw,
                "dimensions": 3,
                "n": 100,
                "correct": round(100 * share),
                "accuracy": share,
                "low": share - 0.1,
                "high": share + 0.1,
                "width": width if method == "das" else float("nan"),
                "converged": not unconverged,
                "late_share": 0.02,
                "unconverged": unconverged,
            }
            for method, draw, share in rows
        ]
    )


@pytest.mark.parametrize(
    ("random", "verdict"), [(0.3, "its interval lies above all of them"), (0.65, "its interval does not lie above all of them")]
)
def test_the_sentence_judges_by_the_best_random_subspace(random: float, verdict: str) -> None:
    (sentence,) = findings("das", das=exchanges(0.7, random))
    assert "a learned subspace of 3 dimensions of resid1 makes 70\u202f% [60.0, 80.0] of held-out pairs right; " in sentence
    assert "the whole vector 90\u202f%, nothing 2\u202f%" in sentence
    assert sentence.endswith(
        f" 2 random subspaces of equal size reach {100 * random:.0f}\u202f% at most: {verdict} (n = 100 held-out pairs)."
    )


def test_a_width_is_said_where_it_was_sought_and_its_training_converged() -> None:
    _, sentence = findings("das", das=exchanges(0.7, 0.1, width=1.0))
    assert "1 dimension is the fewest of resid1 that do as well as the best" in sentence
    _, sentence = findings(
        "das", das=exchanges(0.7, 0.1, unconverged="its last quarter still lowered the loss by 30\u202f% of the whole change")
    )
    assert sentence.startswith(
        "What the subspace says of the variable, its number of dimensions and how much a better one would move: withheld"
    )
    assert (
        ", as its training had not converged (its last quarter still lowered the loss by 30\u202f% of the whole change); give it more"
        in sentence
    )


def test_two_epochs_have_not_converged_and_the_width_is_withheld(tmp_path: Path) -> None:
    table = run(JOB, tmp_path / "run", pairs=MANY, layers="1", boundless=True, **QUICK).das
    assert not table.loc[table["method"] == "das", "converged"].any()
    assert table["width"].isna().all()
    exchanged, withheld = findings("das", das=table)
    assert exchanged.startswith("Exchanging a learned subspace of 1 dimension of resid1 makes ")
    assert ": withheld, as its training had not converged" in withheld


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers": "1,7"}, SettingsError, "layers:7 does not exist"),
        ({"layers": "one"}, SettingsError, "not understood"),
        ({"dimensions": 99}, SettingsError, "99 dimensions do not fit resid0, which has 32"),
        ({"site": "head"}, SettingsError, "say which"),
        ({"site": "head", "head": 9}, SettingsError, "a0.h9 does not exist"),
        ({"position": "middle"}, DataError, "positions 'middle' are not known"),
        ({"test_share": 1.0}, SettingsError, "'test_share' is 1.0"),
        ({"pairs": Pairs(tuple(replace(pair, answers=()) for pair in MANY), "none")}, DataError, "names no right answer"),
        (
            {"pairs": Pairs(tuple(replace(pair, wrong_answers=()) for pair in MANY), "none"), "among": "answers"},
            DataError,
            "names no wrong answer",
        ),
    ],
)
def test_what_cannot_be_aligned_is_refused_before_the_model_runs(
    settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    refuses(JOB, tmp_path / "run", error, message, **{"pairs": MANY, **settings})
