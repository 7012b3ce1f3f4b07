"""`mechscope backward-lens` gives what `backward_lens` gives, counts wanted tokens that a step raises, shows it, and refuses before the model runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.lens import backward_lens
from mechscope.studies.jobs.backward_lens import JOB
from tests.stats.skewed import mean_test
from tests.studies.jobs.running import PAIRS, findings, refuses, run, shown, subject

MATRICES = "mlp_down,mlp_up"


def test_table_is_that_of_the_function_and_the_page_shows_it(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", documents=3, matrices=MATRICES, layers="1-2", top=4)
    expected = backward_lens(subject(), PAIRS.first(3), matrices=("mlp_up", "mlp_down"), layers=(1, 2), k=4)
    for column in expected:
        assert [list(x) if isinstance(x, np.ndarray) else x for x in result.backward_lens[column]] == [
            list(x) if isinstance(x, tuple) else x for x in expected[column]
        ]
    assert "Katz et al. 2024" in shown(result, "backward-lens")


def test_wanted_tokens_are_the_target_or_the_answer() -> None:
    with_target, with_answers = PAIRS.first(1), Pairs((replace(PAIRS.pairs[0], target=None),), "answers")
    table = run(JOB, None, pairs=with_target, layers="2", top=5).backward_lens
    ids = with_target.pairs[0].clean
    spelled = subject().spelling.tokens(ids)
    # the last three tokens are the target, each wanted at the position before it
    assert dict(zip(table["position"], table["target"], strict=True)) == {
        at: spelled[at + 1] if at + 1 >= len(ids) - 3 and at + 1 < len(ids) else "" for at in table["position"]
    }
    answered = run(JOB, None, pairs=with_answers, layers="2", top=5).backward_lens
    last = answered[answered["target"] != ""]
    assert set(last["position"]) == {len(ids) - 1}
    assert set(last["target"]) == {subject().spelling.token(with_target.pairs[0].answers[0])}


def test_summary_averages_texts_and_knows_chance() -> None:
    result = run(JOB, None, documents=6, layers="2", top=5)
    (row,) = result.backward_lens_summary.to_dict("records")
    wanted = result.backward_lens[result.backward_lens["target"] != ""]
    assert (wanted["promoted"] == [target in list(top) for target, top in zip(wanted["target"], wanted["top_tokens"], strict=True)]).all()
    of_texts = wanted.assign(promoted=wanted["promoted"].astype(float)).groupby("text")["promoted"].mean()
    assert row["promoted"] == pytest.approx(of_texts.mean())
    assert [row["promoted_low"], row["promoted_high"]] == pytest.approx(mean_test(of_texts.to_numpy())[:2], rel=1e-4)
    assert row["n"] == 6
    assert row["chance"] == pytest.approx(5 / 97)


def test_the_sentences_follow_from_the_table() -> None:
    summary = run(JOB, None, documents=3, layers="0-1", top=5).backward_lens_summary
    summary.loc[1, ["promoted", "promoted_low", "promoted_high", "chance"]] = [0.75, 0.6, 0.9, 0.05]
    summary.loc[0, ["promoted", "promoted_low", "promoted_high"]] = [0.25, 0.1, 0.4]
    summary["update_norm"], summary["chance"] = [2.0, 1.0], 0.05
    promoted, largest = findings("backward-lens", backward_lens_summary=summary)
    assert "most often in layer 1: at 75\u202f% [60.0, 90.0]" in promoted
    assert "; in 1 of 2 layers it does at half of them or more" in promoted
    assert promoted.endswith(" A list of as many tokens drawn by chance has it at 5.00\u202f% (n = 3 texts).")
    assert largest == "The gradient is largest in mlp down of layer 0: 2.00 per token (n = 3 texts)."


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"matrices": "mlp"}, SettingsError, "names 'mlp': there are query_key_value"),
        ({"matrices": " , "}, SettingsError, "'matrices' is empty"),
        ({"layers": "3"}, SettingsError, "layers:3 does not exist"),
        ({"top": 98}, SettingsError, "'top' is 98: the vocabulary has 97 tokens"),
        ({"pairs": Pairs((replace(PAIRS.pairs[0], target=None, answers=()),), "bare")}, DataError, "neither a target span nor answers"),
        ({"text": "w3 w4"}, SettingsError, "give one of text"),
    ],
)
def test_what_cannot_be_read_is_refused_before_the_model_runs(
    settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    refuses(JOB, tmp_path / "run", error, message, **settings)
