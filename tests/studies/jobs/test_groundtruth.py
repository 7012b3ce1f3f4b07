"""Models with a written circuit: what is in the folder can be read by other jobs, and methods are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mechscope
from mechscope.circuits import from_json
from mechscope.errors import MechscopeError, SettingsError
from mechscope.groundtruth import PROGRAMS, ground_truth
from mechscope.studies.jobs import benchmark_circuits, groundtruth
from mechscope.studies.runner import run_job


def test_the_folder_holds_the_model_its_circuit_and_pairs_for_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run_job(groundtruth.JOB, groundtruth.JOB.resolve(name="names", pairs=40), out)
    truth = ground_truth("names")
    told = result.ground_truth
    assert tuple(told["edge"][told["told"]]) == truth.program.circuit.names == tuple((out / "circuit.txt").read_text().split())
    circuit, _ = from_json(out / "circuit.json", truth.program.graph)
    assert circuit == truth.program.circuit
    # another job reads model and pairs as they stand there
    found = mechscope.circuit(
        str(out / "model"),
        pairs=str(out / "pairs.jsonl"),
        circuit_edges=9,
        random_circuits=2,
        circuit_resamples=2,
        criteria=False,
        method="exact",
    )
    edges = found.circuit_edges
    assert {*edges["edge"][edges["in_circuit"]]} == {*truth.program.circuit.names}
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [pair.id for pair in truth.pairs(40)]


def test_names_of_programs_are_known_before_torch_is() -> None:
    assert tuple(PROGRAMS) == groundtruth.NAMES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ravens"}, "ground truth 'ravens' is not known: choose induction, names, brackets, counting"),
        ({"name": "names", "sharpness": 0.0}, "sharpness is 0: it must be above 0"),
    ],
)
def test_what_cannot_be_written_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        groundtruth.JOB.resolve(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"programs": "induction,ravens"}, "setting 'programs' names ravens: known are induction"),
        ({"methods": "guess"}, "setting 'methods' names guess: known are eap"),
        ({"methods": ","}, "setting 'methods' names none"),
        ({"sharpness": "8,soft"}, "setting 'sharpness' is '8,soft': give numbers above 0"),
        ({"sharpness": "-1"}, "setting 'sharpness' is '-1'"),
    ],
)
def test_what_cannot_be_judged_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MechscopeError, match=message):
        benchmark_circuits.JOB.resolve(**settings)


def test_methods_are_judged_and_a_sentence_says_how_often_they_are_right(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"programs": "induction,counting", "methods": "eap,exact", "sharpness": "60,8", "pairs": 8, "draws": 100}
    result = run_job(benchmark_circuits.JOB, benchmark_circuits.JOB.resolve(**settings), tmp_path / "run")
    table = result.circuit_benchmark
    # nothing of the counting model hangs on how sharply heads attend
    assert list(dict.fromkeys(table["program"])) == ["induction, sharpness 60", "induction, sharpness 8", "counting"]
    assert result.report is not None
    page = result.report.read_text(encoding="utf-8")
    assert "Method exact finds exactly the circuit in 3 of 3 models" in page
    assert "Method eap finds exactly the circuit in 2 of 3 models; its lowest AUROC is" in page
