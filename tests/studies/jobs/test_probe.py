"""`mechscope probe`: what a word tells is said beside its controls, what nothing tells is said not to be told, and wrong labels are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.instrument import load
from mechscope.studies.job import Result
from mechscope.studies.jobs.probe import JOB
from mechscope.studies.runner import run_job
from tests import families
from tests.features.labelled_files import labelled_file
from tests.studies.jobs.running import findings, refuses, run, shown, subject


def of(result: Result, component: str, **values: str) -> dict[str, float]:
    """Return a component's row of the accuracies."""
    rows = result.probe_accuracy
    for name, value in {"labels": "labels", "probe": "its own", "component": component, **values}.items():
        rows = rows[rows[name] == value]
    assert len(rows) == 1
    return dict(rows.iloc[0])


def test_what_a_word_tells_is_said_beside_its_controls(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", data=str(labelled_file(tmp_path, 150)), labels="topic")
    best = of(result, "embed", model="model")
    assert best["balanced"] > 0.8
    assert best["n"] == best["rows"] == 150
    (said,) = [each for each in findings("probe", **result.tables) if "A linear probe at" in each]
    for part in ("tells topic of held-out texts", "shuffled labels", "random weights", "a guess 33", "n = 150 texts"):
        assert part in said
    assert "control task" not in said, "texts are of no kind of token"
    assert "probe_directions" not in result.tables
    shown(result, "probe")


def test_what_nothing_tells_is_said_not_to_be_told(tmp_path: Path) -> None:
    file, random = labelled_file(tmp_path, 120), np.random.default_rng(1)
    rows = [{**json.loads(line), "coin": "ht"[int(random.integers(2))]} for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = run(JOB, tmp_path / "run", data=str(file), labels="coin", untrained=False)
    (said,) = [each for each in findings("probe", **result.tables) if "coin" in each and "n = 120" in each]
    assert "No component is shown to tell coin of held-out texts better than shuffled labels" in said
    assert set(result.probe_accuracy["model"]) == {"model"}


@pytest.mark.parametrize(("method", "named"), [("logistic", "A logistic probe at embed"), ("mlp", "A probe with a hidden layer at embed")])
def test_probes_that_are_learned_step_by_step_are_named(method: str, named: str, tmp_path: Path) -> None:
    data = str(labelled_file(tmp_path, 150))
    result = run(JOB, tmp_path / "run", data=data, labels="topic", method=method, shuffles=5, folds=3, untrained=False)
    assert of(result, "embed", model="model")["balanced"] > 0.7
    assert set(result.probe_accuracy["method"]) == {method}
    (said,) = [each for each in findings("probe", **result.tables) if named in each]
    assert "tells topic of held-out texts" in said


def test_what_a_model_does_without_labels_is_said_beside_as_many_random_directions(tmp_path: Path) -> None:
    data = str(labelled_file(tmp_path, 60))
    result = run(JOB, tmp_path / "run", data=data, labels="topic", shuffles=5, folds=3, untrained=False, erase="resid0")
    (said,) = [each for each in findings("probe", **result.tables) if "Erasing topic at resid0" in each]
    for part in ("nats (KL)", "as many directions of shuffled labels", "random ones", "n = 60 texts"):
        assert part in said
    shown(result, "probe")


def test_heads_are_read_by_name(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", data=str(labelled_file(tmp_path, 40)), labels="topic", reading="last", site="head", shuffles=5)
    assert result.probe_accuracy["component"].nunique() == 12
    assert set(result.probe_contrasts["contrast"]) == {"over shuffled labels", "over random weights"}


def test_before_and_after_fine_tuning_are_told_on_the_same_texts(tmp_path: Path) -> None:
    tuned = load(families.build("gpt2", seed=1), tokenizer=families.tokenizer())
    names = dict.fromkeys(("model", "tuned"), "given in memory")
    settings = JOB.resolve(**names, data=str(labelled_file(tmp_path, 90)), labels="topic", shuffles=5)
    result = run_job(JOB, settings, tmp_path / "run", given={"model": subject(), "tuned": tuned})
    assert set(result.probe_accuracy["model"]) == {"base", "tuned", "random weights"}
    own, bases = (of(result, "embed", model="tuned", probe=whose)["balanced"] for whose in ("its own", "the base's"))
    # other random embeddings: the base's probe reads nothing of them
    assert own > bases + 0.2
    (said,) = [each for each in findings("probe", **result.tables) if "fine-tuning changed the balanced accuracy (a share) by" in each]
    assert "degrees apart" in said
    shown(result, "probe")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"labels": "size"}, DataError, "has no 'size', by which texts are told apart"),
        ({"labels": "text"}, DataError, "class 'w"),
        ({"labels": "topic", "folds": 40}, DataError, "class 'a' of 'topic' stands in 30 different texts of .*, 40 folds need at least 40"),
        ({"labels": "topic", "folds": 2}, SettingsError, "setting 'folds' is 2"),
        ({"labels": "topic", "erase": "resid9"}, SettingsError, "the model has no 'resid9' among what is read: it has embed to resid2"),
        ({"labels": "first letter a"}, DataError, "known are topic, day of texts and nothing of tokens"),
    ],
)
def test_labels_that_cannot_be_told_are_refused_before_the_model_runs(
    settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    refuses(JOB, tmp_path / "run", error, message, data=str(labelled_file(tmp_path)), **settings)
