"""`mechscope counterfactual` reads runs from a file, gives what `run_counterfactuals` gives, shows it, and refuses what is no run."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from mechscope.causal import CounterfactualRun, Text, Vector, mean_of, run_counterfactuals
from mechscope.errors import SettingsError
from mechscope.settings import resolve
from mechscope.store.run import RunFolder
from mechscope.studies.jobs.counterfactual import JOB
from mechscope.studies.runner import run_job
from mechscope.subject.load import load
from tests import families
from tests.studies.jobs.running import PAIRS, findings, refuses, run, shown, subject, write


def test_table_is_that_of_the_function_and_the_page_shows_it(tmp_path: Path) -> None:
    file = write(tmp_path / "runs.yaml", "mixed:\n  a1.h2,m1: corrupt\n  layers:0: mean\nhalf: {a2.h0: 0.5}\nnothing: {}\n")
    result = run(JOB, tmp_path / "run", runs=file)
    mean = mean_of(subject(), PAIRS, ("z", "mlp_output"))
    worlds: dict[str, CounterfactualRun] = {
        "mixed": {"a1.h2,m1": "corrupt", "layers:0": mean},
        "half": {"a2.h0": Vector(0.5)},
        "nothing": {},
    }
    expected = run_counterfactuals(subject(), PAIRS, worlds).table
    pd.testing.assert_frame_equal(result.counterfactual.drop(columns="changed"), expected)
    assert list(result.counterfactual["changed"]) == ["a1.h2,m1: corrupt; layers:0: mean", "a2.h0: 0.5", "nothing"]
    assert "a1.h2,m1: corrupt; layers:0: mean" in shown(result, "counterfactual")


def test_a_tuned_model_gives_values_by_name(tmp_path: Path) -> None:
    tuned = load(families.build("gpt2", seed=1), tokenizer=families.tokenizer())
    file = write(tmp_path / "runs.json", json.dumps({"tuned heads": {"layers:1": "tuned:clean"}}))
    settings = resolve(JOB.settings, model="m", tuned="t", pairs="p", runs=file)
    table = run_job(JOB, settings, None, given={"model": subject(), "tuned": tuned, "pairs": PAIRS}).counterfactual
    expected = run_counterfactuals(subject(), PAIRS, {"tuned heads": {"layers:1": Text("clean", model=tuned)}}).table
    pd.testing.assert_frame_equal(table.drop(columns="changed"), expected)


def test_another_file_of_runs_is_run_in_the_same_folder(tmp_path: Path) -> None:
    first = write(tmp_path / "runs.json", json.dumps({"one": {"m1": "zero"}}))
    run(JOB, tmp_path / "run", runs=first)
    again = run(JOB, tmp_path / "run", runs=write(tmp_path / "runs.json", json.dumps({"two": {"m2": "zero"}})))
    assert list(again.counterfactual["component"]) == ["two"]
    done = [event["stage"] for event in RunFolder.read(tmp_path / "run").events() if str(event["message"]).endswith("finished")]
    assert done.count("counterfactual") == 2


def test_every_run_has_a_sentence_of_its_own_numbers() -> None:
    table = run_counterfactuals(subject(), PAIRS, {"one": {"m1": "zero"}, "two": {"m2": "zero"}}).table.assign(changed="x")
    changed = {"effect": -2.0, "low": -3.0, "high": -1.0, "value": 0.5, "normalised": 0.25, "normalised_low": 0.1, "normalised_high": 0.4}
    table.loc[1, list(changed)] = list(changed.values())
    table["withheld"] = ["", ""]
    first, second = findings("counterfactual", counterfactual=table)
    assert first.startswith("Run “one” changes logit-diff by ")
    assert second == (
        "Run “two” changes logit-diff by −2.00 [−3.00, −1.00] to 0.500, 25\u202f% [10.0, 40.0] of the way from the corrupt run to the clean one "
        "(n = 6 texts)."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- one\n- two\n", "holds a list: write names"),
        ("", "holds nothing"),
        ("one: zero\n", "run 'one' of .* is 'zero': write components and their sources"),
        ("one: {m1: noise}\n", "takes m1 from 'noise': use clean, corrupt"),
        ("one: {m1: true}\n", "takes m1 from True"),
        ("one: {m1: 'tuned:clean'}\n", "name it by --tuned"),
        ("one: {q1: zero}\n", "component 'q1' is not understood"),
        ("one: {m9: zero}\n", "component m9 does not exist"),
        ("one: {m1: zero, 'layers:1': clean}\n", "two sources"),
        ("one: {m1: [\n", "is not valid YAML"),
    ],
)
def test_a_file_that_declares_no_run_is_refused_before_the_model_runs(text: str, message: str, tmp_path: Path) -> None:
    refuses(JOB, tmp_path / "run", SettingsError, message, runs=write(tmp_path / "runs.yaml", text))


@pytest.mark.parametrize(("name", "message"), [("nowhere.json", "cannot be read"), ("runs.toml", "neither .json nor .yaml")])
def test_a_file_that_cannot_be_read_is_named(name: str, message: str, tmp_path: Path) -> None:
    refuses(JOB, tmp_path / "run", SettingsError, f"{name}.* {message}", runs=str(tmp_path / name))
