"""`mechscope patchscope` gives what `patchscope` gives, judges it beside random vectors, shows it, and refuses before the models run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope.errors import MechscopeError, ModelError, SettingsError
from mechscope.lens import patchscope
from mechscope.settings import resolve
from mechscope.studies.jobs.patchscope import JOB
from mechscope.studies.runner import run_job
from mechscope.subject.load import load
from tests import families
from tests.studies.jobs.running import PAIRS, findings, refuses, run, shown, subject

PROMPT = "w3 w4 w5 w6"


def test_table_is_that_of_the_function_and_the_page_shows_it(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", documents=2, prompt=PROMPT, position=-2, target_layer=1, new_tokens=2, top=3)
    prompt = subject().tokenizer(PROMPT)["input_ids"]
    options: dict[str, Any] = {"inspection_ids": prompt, "position": -2, "target_layer": 1, "generate": 2, "k": 3}
    expected = pd.concat([patchscope(subject(), pair.clean, **options) for pair in PAIRS.first(2)], ignore_index=True)
    scoped = result.patchscope[result.patchscope["state"] == "text"].reset_index(drop=True)
    for column in expected:
        assert [list(x) if isinstance(x, np.ndarray) else x for x in scoped[column]] == [
            list(x) if isinstance(x, tuple) else x for x in expected[column]
        ]
    assert "Ghandeharioun et al. 2024" in shown(result, "patchscope")


def test_own_prediction_is_that_of_the_source_model_and_the_last_block_always_gives_it(tmp_path: Path) -> None:
    result = run(JOB, None, documents=3, prompt=PROMPT, new_tokens=0)
    for pair in PAIRS.first(3):
        with torch.no_grad():
            likeliest = int(subject().model(torch.tensor([pair.clean])).logits[0, -1].argmax())
        assert set(result.patchscope.loc[result.patchscope["text"] == pair.id, "predicted"]) == {subject().spelling.token(likeliest)}
    # nothing is computed after a patch behind the last block at the last token: it is the logit lens
    summary = result.patchscope_summary
    last = summary[(summary["state"] == "text") & (summary["layer"] == 2)].iloc[0]
    assert (last["predicts"], last["n"]) == (1.0, 3)


def test_control_is_a_random_vector_and_can_be_left_out() -> None:
    with_control = run(JOB, None, documents=2, prompt=PROMPT, new_tokens=0).patchscope
    assert set(with_control["state"]) == {"text", "random"}
    own, random = (with_control[with_control["state"] == state].reset_index(drop=True) for state in ("text", "random"))
    assert not all((one == two).all() for one, two in zip(own["probabilities"], random["probabilities"], strict=True))
    without = run(JOB, None, documents=2, prompt=PROMPT, new_tokens=0, control=False)
    pd.testing.assert_frame_equal(without.patchscope, own)
    assert "random" not in " ".join(findings("patchscope", **without.tables))


def test_what_follows_is_compared_with_other_texts_predictions() -> None:
    result = run(JOB, None, documents=4, prompt=PROMPT, new_tokens=0, layers="1")
    own = result.patchscope[result.patchscope["state"] == "text"].to_dict("records")
    others = [one["top_tokens"][0] == other["predicted"] for one in own for other in own if one["text"] != other["text"]]
    row = result.patchscope_summary[result.patchscope_summary["state"] == "text"].iloc[0]
    assert row["predicts_other"] == sum(others) / 12
    # with one text there is no other
    assert run(JOB, None, documents=1, prompt=PROMPT, new_tokens=0).patchscope_summary["predicts_other"].isna().all()


def test_another_model_may_read_the_states() -> None:
    other = load(families.build("gpt2", seed=1), tokenizer=families.tokenizer())
    settings = resolve(JOB.settings, model="a", inspection="b", pairs="c", documents=1, prompt=PROMPT, new_tokens=0, control=False)
    table = run_job(JOB, settings, None, given={"model": subject(), "inspection": other, "pairs": PAIRS}).patchscope
    expected = patchscope(subject(), PAIRS.pairs[0].clean, other, other.tokenizer(PROMPT)["input_ids"])
    np.testing.assert_array_equal(np.stack(list(table["probabilities"])), np.stack(list(expected["probabilities"])))


def test_the_sentence_names_the_first_layer_and_its_control() -> None:
    rows = [
        {
            "state": state,
            "layer": layer,
            "target_layer": layer,
            "n": 20,
            "predicts": share,
            "predicts_low": share - 0.1,
            "predicts_high": share + 0.1,
        }
        for state, shares in (("text", (0.2, 0.6, 1.0)), ("random", (0.1, 0.15, 0.1)))
        for layer, share in enumerate(shares)
    ]
    summary = pd.DataFrame(rows).assign(predicts_other=0.3, repeats=0.0, repeats_low=0.0, repeats_high=0.1)
    (sentence,) = findings("patchscope", patchscope_summary=summary)
    assert "behind block 1 is the first" in sentence
    assert "60\u202f% [50.0, 70.0]; after a random vector of equal length in 15\u202f% [5.00, 25.0]; " in sentence
    assert "; another text's next token follows it in 30\u202f%" in sentence
    assert sentence.endswith(" repeated from none (n = 20 texts).")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"position": 8}, SettingsError, "position 8 lies outside the source text, which has 7 tokens"),
        ({"target_position": 4}, SettingsError, "position 4 lies outside the inspection prompt"),
        ({"target_layer": 3}, SettingsError, "layer 3 does not exist"),
        ({"layers": "1-9"}, SettingsError, "layers:3 does not exist"),
        ({"top": 98}, SettingsError, "k is 98"),
        ({"new_tokens": 61}, SettingsError, "generate is 61"),
    ],
)
def test_what_cannot_be_inspected_is_refused_before_the_model_runs(
    settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    refuses(JOB, tmp_path / "run", error, message, **{"prompt": PROMPT, **settings})


def test_models_of_different_width_are_refused() -> None:
    wide = load(families.build("gpt2", n_embd=64), tokenizer=families.tokenizer())
    settings = resolve(JOB.settings, model="a", inspection="b", pairs="c", prompt=PROMPT)
    with pytest.raises(ModelError, match="inspect with a model of the same width"):
        run_job(JOB, settings, None, given={"model": subject(), "inspection": wide, "pairs": PAIRS})
