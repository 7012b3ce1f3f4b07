"""`mechscope attention-lens` trains and judges what the functions do, on different texts, keeps the maps, shows them, and refuses bad settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechscope.data.splits import held_out
from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.instrument import Execution
from mechscope.lens import Translators, TunedLensSettings, evaluate_lens, train_attention_lens, with_training
from mechscope.studies.jobs.attention_lens import JOB
from tests.studies.jobs.running import PAIRS, findings, refuses, run, shown, subject

QUICK: dict[str, Any] = {"layers": "1-2", "steps": 3, "tokens_per_step": 30}


def test_tables_are_those_of_the_functions_and_the_page_shows_them(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", test_share=0.4, seed=2, **QUICK)
    learned, judged = held_out(PAIRS, 0.4, 2)
    assert not {pair.clean for pair in learned} & {pair.clean for pair in judged}
    trained = train_attention_lens(
        subject(), learned, layers=(1, 2), settings=TunedLensSettings(steps=3, tokens_per_step=30), execution=Execution(seed=2)
    )
    pd.testing.assert_frame_equal(result.attention_lens_training, trained.curve)
    expected = with_training(evaluate_lens(subject(), judged, trained.translators), trained.curve)
    pd.testing.assert_frame_equal(result.attention_lens, expected)
    assert "Sakarvadia et al. 2023" in shown(result, "attention-lens")
    kept = Translators.load(result.path / "lenses" / "attention.safetensors", subject())
    assert {place.component for place in kept.maps} == set(result.attention_lens["component"])


def test_the_sentence_counts_the_heads_that_came_nearer() -> None:
    table = run(JOB, None, **QUICK).attention_lens
    table["kl_change"], table["kl_change_q"] = -0.1, 0.5
    table.loc[:2, "kl_change_q"] = 0.01
    table.loc[2, "kl_change"] = 0.3  # surely, but farther
    table["verdict"] = "undecided"
    table.loc[:1, "verdict"], table.loc[2, "verdict"] = "nearer", "farther"
    table["converged"], table["unconverged"] = True, ""
    table["kl_tuned"] = 1.0
    table.loc[5, ["kl_tuned", "kl_tuned_low", "kl_tuned_high", "kl_logit_lens"]] = [0.5, 0.4, 0.6, 0.9]
    (sentence,) = findings("attention-lens", attention_lens=table)
    assert "what a2.h1 writes comes nearest to the model's prediction, of 8 heads: KL 0.500 [0.400, 0.600] nats" in sentence
    assert "0.900 without. The maps bring 2 of 8 heads nearer" in sentence
    assert sentence.endswith(" (q < 0.05); 1 is worse than none (n = 1 text).")


def test_three_steps_have_not_converged_and_nothing_is_said_of_their_maps() -> None:
    table = run(JOB, None, **QUICK).attention_lens
    assert not table["converged"].any()
    (sentence,) = findings("attention-lens", attention_lens=table)
    assert sentence.startswith("What the maps of 8 of 8 heads say: withheld, as their training had not converged (the first: ")
    assert sentence.endswith("too few to tell whether it arrived); give it more steps (n = 1 text).")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers": "5"}, SettingsError, "layers:5 does not exist"),
        ({"steps": 0}, SettingsError, "'steps' is 0"),
        ({"test_share": 1.0}, SettingsError, "'test_share' is 1"),
        ({"pairs": PAIRS.first(1)}, DataError, "give at least two"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_model_runs(
    settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    refuses(JOB, tmp_path / "run", error, message, **settings)
