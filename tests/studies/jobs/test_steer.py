"""`mechscope steer` takes a direction from one half of the pairs, gives what `sweep_strength` gives on the other, and shows what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from mechscope.causal import difference_of_means, steer, sweep_strength
from mechscope.data.pairs import Pairs
from mechscope.data.splits import held_out
from mechscope.data.text_files import read_texts
from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.store.run import RunFolder
from mechscope.studies.jobs.steer import JOB
from tests.causal.pairs import random_pairs
from tests.studies.jobs.running import findings, refuses, run, shown, subject, write

MANY = random_pairs(8)


def texts(path: Path, *lines: str) -> str:
    return write(path, "\n".join(json.dumps({"text": line}) for line in lines))


@pytest.fixture
def neutral(tmp_path: Path) -> str:
    return texts(tmp_path / "neutral.jsonl", "w3 w4 w5 w6", "w7 w8 w9", "w10 w11 w12 w13 w14")


def test_direction_and_measurement_are_of_different_pairs(tmp_path: Path, neutral: str) -> None:
    result = run(JOB, tmp_path / "run", pairs=MANY, layer=1, neutral=neutral, strengths="-1,2")
    read, measured = held_out(MANY, 0.5, 0)
    assert not {pair.clean for pair in read} & {pair.clean for pair in measured}
    direction = difference_of_means(subject(), read, read.swapped(), layer=1)
    others = read_texts(neutral, subject().tokenizer, max_tokens=64)
    expected = sweep_strength(subject(), direction, measured, others, strengths=(-1.0, 2.0), controls=3)
    pd.testing.assert_frame_equal(result.steer, expected)
    page = shown(result, "steer")
    assert "Random directions of equal length are the control" in page
    tensors, meta = RunFolder.read(tmp_path / "run").tensors("direction")
    assert torch.equal(tensors["direction"], direction.vector)
    assert (meta["site"], meta["layer"]) == ("residual", 1)


def test_answers_are_contrasted_where_they_stand(tmp_path: Path, neutral: str) -> None:
    result = run(JOB, tmp_path / "run", pairs=MANY, layer=1, neutral=neutral, strengths="1", contrast="answers", controls=0)
    read, measured = held_out(MANY, 0.5, 0)

    def answered(right: bool) -> Pairs:
        ids = [(*pair.clean, (pair.answers if right else pair.wrong_answers)[0]) for pair in read]
        return Pairs(tuple(replace(pair, clean=own, corrupt=own) for pair, own in zip(read, ids, strict=True)), "texts")

    direction = difference_of_means(subject(), answered(True), answered(False), layer=1)
    others = read_texts(neutral, subject().tokenizer, max_tokens=64)
    expected = sweep_strength(subject(), direction, measured, others, strengths=(1.0,), controls=0)
    pd.testing.assert_frame_equal(result.steer.drop(columns="direction"), expected.drop(columns="direction"))


def test_two_files_of_texts_give_the_direction_and_all_pairs_are_measured(tmp_path: Path, neutral: str) -> None:
    sets = {
        name: texts(tmp_path / f"{name}.jsonl", *lines)
        for name, lines in {"positive": ["w20 w21", "w22 w23"], "negative": ["w30 w31"]}.items()
    }
    result = run(JOB, None, pairs=MANY, layer=0, neutral=neutral, strengths="1", **sets)
    assert (result.steer.loc[result.steer["texts"] == "pairs", "n"] == 8).all()
    assert result.steer["direction"][0] == f"{sets['positive']} − {sets['negative']}"


def test_a_prompt_is_continued_at_every_strength_and_another_one_without_a_new_sweep(tmp_path: Path, neutral: str) -> None:
    given: dict[str, Any] = {"pairs": MANY, "layer": 1, "neutral": neutral, "strengths": "0,50", "new_tokens": 5, "controls": 1}
    result = run(JOB, tmp_path / "run", prompt="w3 w4 w5", **given)
    written = result.steer_texts
    assert [*zip(written["draw"], written["strength"], strict=True)] == [(-1, 0.0), (-1, 50.0), (0, 50.0)]
    read, _ = held_out(MANY, 0.5, 0)
    direction = difference_of_means(subject(), read, read.swapped(), layer=1)
    ids = torch.tensor([[3, 4, 5]])
    with steer(subject(), direction, 50.0):
        by_hand = subject().model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 3:]
    assert written["continuation"][1] == subject().tokenizer.decode(by_hand, skip_special_tokens=True).strip()
    assert written["continuation"][0] != written["continuation"][1]
    assert "w3 w4 w5" in shown(result, "steer")
    run(JOB, tmp_path / "run", prompt="w6 w7", **given)
    done = [event["stage"] for event in RunFolder.read(tmp_path / "run").events() if str(event["message"]).endswith("finished")]
    assert (done.count("steer"), done.count("steer_texts")) == (1, 2)


def test_the_sentence_gives_effect_cost_and_control_at_one_strength(neutral: str) -> None:
    rows = [
        {"direction": name, "draw": draw, "strength": strength, "texts": which, "metric": metric, "n": 6, "value": 0.0, "mean": mean}
        | {"se": 0.1, "low": mean - 0.5, "high": mean + 0.5}
        for name, draw, strength, which, metric, mean in [
            ("a − b", -1, 1.0, "pairs", "logit-diff", 2.0),
            ("a − b", -1, -1.0, "pairs", "logit-diff", -3.0),
            ("random", 0, -1.0, "pairs", "logit-diff", 0.25),
            ("random", 1, -1.0, "pairs", "logit-diff", -0.5),
            ("random", 0, 1.0, "pairs", "logit-diff", 9.0),
            ("a − b", -1, 1.0, "neutral", "loss", 7.0),
            ("a − b", -1, -1.0, "neutral", "loss", 0.75),
        ]
    ]
    steered = pd.DataFrame(rows)
    (sentence,) = findings("steer", steer=steered)
    assert "Added −1.00 times, the direction changes logit-diff by −3.00 [−3.50, −2.50], and " in sentence
    assert "the loss of neutral text by +0.750 [+0.250, +1.25] nats per token" in sentence
    assert "2 random directions of equal length change logit-diff by −0.500 to +0.250: " in sentence
    assert sentence.endswith("the direction's interval lies beyond all of them (n = 6 texts).")
    # one random direction that does as much is enough to doubt it
    steered.loc[3, "mean"] = -2.75
    (sentence,) = findings("steer", steer=steered)
    assert sentence.endswith("the direction's interval does not lie beyond all of them (n = 6 texts).")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layer": 9}, SettingsError, "layer 9 does not exist"),
        ({"site": "head"}, SettingsError, "say which"),
        ({"strengths": "1,two"}, SettingsError, "give numbers joined by commas"),
        ({"strengths": "1,1"}, SettingsError, "each once"),
        ({"strengths": "nan"}, SettingsError, "finite"),
        ({"positive": "a.jsonl"}, SettingsError, "belong together"),
        ({"positive": "a.jsonl", "negative": "b.jsonl"}, DataError, "a.jsonl: no such file"),
        ({"neutral": "nowhere.jsonl"}, DataError, "nowhere.jsonl: no such file"),
        ({"positions": "middle"}, DataError, "positions 'middle' are not known"),
        ({"metric": "loss", "pairs": random_pairs(4, with_target=False)}, DataError, "has no target span"),
        ({"prompt": "w3 w4", "new_tokens": 999}, SettingsError, "ask for fewer"),
        (
            {
                "contrast": "answers",
                "metric": "probability",
                "pairs": Pairs(tuple(replace(pair, wrong_answers=()) for pair in MANY), "none"),
            },
            DataError,
            "no wrong answer",
        ),
    ],
)
def test_what_cannot_be_steered_is_refused_before_the_model_runs(
    settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path, neutral: str
) -> None:
    refuses(JOB, tmp_path / "run", error, message, **{"pairs": MANY, "layer": 1, "neutral": neutral, **settings})


def test_texts_without_text_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "texts.jsonl", '{"text": "w3 w4"}\n{"words": "w5 w6"}\n')
    with pytest.raises(DataError, match="line 2 has no text: it has words"):
        read_texts(file, subject().tokenizer, max_tokens=8)
    with pytest.raises(DataError, match="is 1 token: at least two"):
        read_texts(texts(tmp_path / "short.jsonl", "w3"), subject().tokenizer, max_tokens=8)
