"""Circuits in run folders: what is found, judged and compared, and messages for what cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.adapt.places import read_circuit
from mechscope.circuits import Graph, choose, discover, from_json, jaccard, node_jaccard, tuned_edges
from mechscope.circuits.scores import Cost, EdgeScores
from mechscope.data.newsroom_pairs import newsroom_pairs
from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, RunError, SettingsError
from mechscope.instrument import Execution, load
from mechscope.report.sections.circuit import SECTION
from mechscope.settings import resolve
from mechscope.settings.discovery import DiscoverySettings
from mechscope.store.run import RunFolder, verify
from mechscope.studies import circuit_change
from mechscope.studies import circuits as shared
from mechscope.studies.circuit_request import CircuitRequest
from mechscope.studies.inputs import read_prompt_pairs
from mechscope.studies.job import Job, Result, Stage
from mechscope.studies.jobs.circuit import JOB as CIRCUIT
from mechscope.studies.jobs.circuit import CircuitSettings
from mechscope.studies.jobs.circuit_diff import JOB as CIRCUIT_DIFF
from mechscope.studies.jobs.circuit_diff import CircuitDiffSettings, labels
from mechscope.studies.run import Input, JobRun
from mechscope.studies.runner import _do, plain
from tests.studies.running import MODEL, QUICK, finished, measure, run


def circuit(out: Path, **changes: Any) -> Result:
    return run(CIRCUIT, out, **{"model": MODEL, **QUICK, **changes})


def circuit_diff(out: Path, **changes: Any) -> Result:
    return run(CIRCUIT_DIFF, out, **{"base": MODEL, "tuned": MODEL, **QUICK, "method": "eap", "circuit_fraction": 0.05, **changes})


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    # criteria run the model twice for each component of the circuit: a small one will do
    return circuit(tmp_path_factory.mktemp("circuit") / "run", criteria=True, limit=12, circuit_fraction=0.004)


def test_a_circuit_run_holds_edges_criteria_cards_a_file_and_a_picture(result: Result) -> None:
    summary, edges = result.circuit_summary, result.circuit_edges
    chosen = edges[edges["in_circuit"]]
    assert len(chosen) == measure(summary, "edges") > 0
    # the whole model and no edge are the ends of the scale, and all edges are the model
    curve = result.circuit_curve
    assert curve["faithfulness"].iloc[-1] == pytest.approx(1.0, abs=1e-4)
    assert curve["value"].iloc[-1] == pytest.approx(measure(summary, "metric of the model"), abs=1e-4)
    components = result.circuit_components
    assert set(components["component"]) == {name for name in chosen["sender"] if name != "embed"} | {
        name.partition("<")[0] for name in chosen["receiver"] if name != "logits"
    }
    assert components["minimality_p"].between(0, 1).all()
    assert {"incompleteness, worst knockout", "Jaccard of edges, half with half", "CPR"} <= set(summary["measure"])
    needed = summary[summary["measure"] == "components that are needed (p < 0.05)"].iloc[0]
    assert needed["value"] == (components["minimality_p"] < 0.05).sum()
    # of 51 ranks among 50 superfluous parts two are below 0.05
    assert needed["random"] == pytest.approx(len(components) * 2 / 51)
    # a method that draws nothing has no other seed
    assert not summary["measure"].str.contains("other seed").any()
    assert result.report is not None
    assert "The circuit of newsroom/model" in result.report.read_text(encoding="utf-8")
    assert (result.path / "figures" / "circuit-model.svg").exists()
    assert (verify(result.path)["status"] == "ok").all()


def test_the_circuit_file_is_read_back_and_refused_for_other_weights(result: Result) -> None:
    subject = load(MODEL)
    graph = Graph.of(subject)
    file = result.path / "circuits" / "model.json"
    read, scores = from_json(file, graph, fingerprint=subject.fingerprint)
    edges = result.circuit_edges
    assert read.names == tuple(edges.loc[edges["in_circuit"], "edge"])
    np.testing.assert_allclose(scores, edges["score"], rtol=1e-12)
    assert read_circuit(str(file), subject) == read.components()
    with pytest.raises(DataError, match="other weights"):
        from_json(file, graph, fingerprint="0" * 64)


def test_the_same_command_again_runs_nothing_and_another_judgement_scores_no_edge_again(tiny_model: Path, tmp_path: Path) -> None:
    given = {"model": str(tiny_model), "method": "eap", "limit": 8, "circuit_fraction": 0.05}
    first = circuit(tmp_path / "run", **given)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "tables").iterdir()}
    again = circuit(tmp_path / "run", **given)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "tables").iterdir()} == before
    pd.testing.assert_frame_equal(first.circuit_edges, again.circuit_edges)
    scores = tmp_path / "run" / "tensors" / "circuit_scores_model.safetensors"
    kept = scores.stat().st_mtime_ns
    other = circuit(tmp_path / "run", **{**given, "circuit_fraction": 0.1})
    assert scores.stat().st_mtime_ns == kept
    assert measure(other.circuit_summary, "edges") > measure(first.circuit_summary, "edges")
    circuit(tmp_path / "run", **{**given, "method": "eap-ig"})
    assert scores.stat().st_mtime_ns != kept
    with pytest.raises(RunError, match="pairs"):
        circuit(tmp_path / "run", **{**given, "pairs": "newsroom:who"})


def test_two_runs_give_equal_tables(tiny_model: Path, tmp_path: Path) -> None:
    first, second = (
        circuit(tmp_path / name, model=str(tiny_model), criteria=True, limit=8, circuit_fraction=0.05).tables
        for name in ("first", "second")
    )
    assert (first["circuit_components"]["minimality_p"] < 1).any()
    assert first.keys() == second.keys()
    for name, table in first.items():
        pd.testing.assert_frame_equal(table, second[name], obj=name)


@pytest.mark.slow
def test_edge_pruning_learns_as_many_edges_as_the_circuit_has_and_is_run_with_another_seed(tmp_path: Path) -> None:
    quick = partial(discover, pruning_steps=6)
    tables = circuit(tmp_path / "run", method="edge-pruning", circuit_edges=300, pruning_steps=6, limit=8, seed=5).tables
    summary, edges = tables["circuit_summary"].set_index("measure"), tables["circuit_edges"]
    subject = load(MODEL)
    pairs = read_prompt_pairs(QUICK["pairs"], subject, limit=8, max_tokens=512, on_problem="error", seed=5)
    scored_on = CircuitRequest.of(pairs, DiscoverySettings(), seed=5).scored_on
    share = 300 / len(Graph.of(subject))
    own, other = (
        quick(subject, scored_on, method="edge-pruning", fraction=share, execution=Execution(tokens_per_batch=256, seed=seed))
        for seed in (5, 6)
    )
    assert own.notes["n_edges"] == 300
    # the size asked for is the size of the circuit, dead ends removed
    assert summary.loc["edges", "value"] == edges["in_circuit"].sum() == 300
    # six steps have not arrived, and the page says nothing of their circuit
    assert summary.loc[shared.CONVERGED, "value"] == 0
    said = [finding for finding in SECTION.findings(tables) if finding.table != "circuit_curve"]
    assert [finding.withheld.startswith("the search had not converged") for finding in said] == [True]
    assert not any(finding.card for finding in said)
    np.testing.assert_allclose(edges["score"], own.mean, rtol=1e-6)
    expected = jaccard(choose(own, fraction=share), choose(other, fraction=share))
    row = summary.loc["Jaccard of edges, other seed of the method"]
    assert row["value"] == pytest.approx(expected, abs=1e-9)
    assert 0 < row["random"] < 0.25  # of circuits that lost no edge to dead ends
    assert row["value"] < 1
    assert "Jaccard of nodes, other seed of the method" in summary.index


def test_checkpoints_are_compared_at_one_size_beside_chance() -> None:
    options = DiscoverySettings(metric="loss")
    graph, random = Graph(3, 4), np.random.default_rng(0)
    scores = [EdgeScores(graph, random.standard_normal(len(graph)), None, "eap", Cost(2, 1)) for _ in range(3)]
    order = ["base", "half", "tuned"]
    # each model's own circuit has another size
    circuits = {label: (one, choose(one, fraction=size)) for label, one, size in zip(order, scores, (0.05, 0.5, 0.2), strict=True)}
    summary = pd.DataFrame([{"model": label, "measure": "faithfulness", "value": 0.9, "low": 0.8, "high": 1.0} for label in order])
    for changed, fraction in (({}, 0.05), ({"circuit_fraction": 0.3}, 0.3), ({"circuit_edges": 131}, 131 / len(graph))):
        request = CircuitRequest.of(newsroom_pairs(8, role="what"), replace(options, **changed), seed=0)
        table = circuit_change.circuits_over_time(circuits, summary, request, order=order, seed=0)
        assert (table["fraction"] == fraction).all()
        assert list(table["edges"]) == [len(circuits[label][1]) for label in order]
        same = [choose(one, fraction=fraction) for one in scores]
        np.testing.assert_allclose(table["jaccard_base"], [jaccard(one, same[0]) for one in same])
        np.testing.assert_allclose(table["jaccard_previous"], [1.0, jaccard(same[1], same[0]), jaccard(same[2], same[1])])
        np.testing.assert_allclose(table["nodes_previous"].iloc[2], node_jaccard(same[2], same[1]))
        # scores are noise, so circuits share what chance gives
        assert (table["jaccard_previous"] - table["jaccard_previous_null"]).iloc[1:].abs().max() < 0.12
        assert table["nodes_base_null"].between(0, 1).all()


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["runs/a/step-1", "runs/a/step-2"], ["step-1", "step-2"]),
        (["runs/base", "runs/tuned"], ["runs/base", "runs/tuned"]),
        (["base", "tuned"], ["base (2)", "tuned (2)"]),
        (["a/last", "b/last"], ["a/last", "b/last"]),
        (["a/step 1", "a/step-1", "a/Step_1"], ["step 1", "a/step-1", "a/Step_1 (2)"]),
    ],
)
def test_labels_and_their_files_differ_and_leave_base_and_tuned_alone(sources: list[str], expected: list[str]) -> None:
    named = labels(sources)
    assert list(named) == expected
    assert list(named.values()) == sources
    assert len({plain(label).lower() for label in ["base", *expected, "tuned"]}) == len(sources) + 2


def test_models_whose_labels_share_a_file_are_refused(tmp_path: Path) -> None:
    models: Input[dict[str, None]] = Input("models", lambda run: {"step 1": None, "step-1": None}, list)
    stage = Stage(name="scores", work=lambda run: None, each=models)
    job = Job(name="none", help="", panel="", example="", settings=CircuitSettings)
    settings = resolve(CircuitSettings, model=MODEL, **QUICK)
    with (
        RunFolder.open(tmp_path / "run", {}, kind="none") as folder,
        pytest.raises(SettingsError, match=r"step 1, step-1 .* would share a file"),
    ):
        _do(JobRun(settings, folder, first=job.first), stage)


def test_two_texts_have_shifts_but_no_overlap_and_the_log_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        tables = circuit_diff(tmp_path / "run", limit=2, random_circuits=0).tables
    assert (tables["circuit_shift"]["shift"] == 0).all()
    assert "circuit_overlap" not in tables
    assert "2 texts, too few to exchange models in" in caplog.text
    assert "keeps no scores of single texts" not in caplog.text


def test_edges_that_carry_the_gain_are_ranked_on_the_pairs_that_find_circuits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Pairs, Pairs]] = []

    def watched(pair: Any, texts: Pairs, *, scored_on: Pairs, **options: Any) -> Any:
        calls.append((texts, scored_on))
        return tuned_edges(pair, texts, scored_on=scored_on, **options)

    monkeypatch.setattr(circuit_change, "tuned_edges", watched)
    circuit_diff(tmp_path / "run", limit=8, random_circuits=0)
    ((judged_on, scored_on),) = calls
    assert not {pair.id for pair in judged_on} & {pair.id for pair in scored_on}


def test_a_model_and_itself_have_one_circuit_at_every_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    model = str(tiny_model)
    result = circuit_diff(tmp_path / "run", base=model, tuned=model, checkpoints=model)
    overlap, shift, time = result.circuit_overlap, result.circuit_shift, result.circuit_time
    assert (overlap["jaccard"] == 1).all()
    # base with tuned on two halves is base with itself on two halves
    np.testing.assert_allclose(overlap["change"], 0.0, atol=1e-12)
    assert (shift["shift"] == 0).all()
    assert (time["jaccard_base"] == 1).all()
    assert list(time["order"]) == [0, 1, 2]
    assert result.circuit_gain["share"].isna().all()
    # scores are a stage of each model: none is done again where a checkpoint is left out
    done = finished(tmp_path / "run")
    circuit_diff(tmp_path / "run", base=model, tuned=model)
    assert finished(tmp_path / "run")[len(done) :] == ["circuit", "circuit-change", "caveats", "report"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": 1.0}, "held_out"),
        ({"held_out": -0.1}, "held_out"),
        ({"circuit_edges": 0}, "'circuit_edges' is 0: should be greater than or equal to 1"),
        ({"circuit_fraction": 0.0}, "'circuit_fraction' is 0.0"),
        ({"circuit_fraction": float("nan")}, "'circuit_fraction' is nan"),
        ({"faithful": 0.0}, "'faithful' is 0.0: should be greater than 0"),
        ({"faithful": 1.1}, "'faithful' is 1.1"),
        ({"circuit_resamples": 1}, "'circuit_resamples' is 1: should be greater than or equal to 2"),
        ({"random_circuits": -1}, "'random_circuits' is -1"),
        ({"steps": 0}, "steps"),
        ({"rule": "threshold"}, "'rule' is 'threshold': should be 'top' or 'greedy'"),
        ({"by": "heads"}, "'by' is 'heads'"),
        ({"sign": "good"}, "'sign' is 'good'"),
        ({"points": "right"}, "'points' is 'right'"),
        ({"source": "noise"}, "'source' is 'noise'"),
        ({"rule": "greedy", "by": "nodes"}, "grows edge by edge"),
        ({"by": "nodes", "circuit_edges": 10}, "circuit_edges counts edges"),
        ({"sign": "helpful", "method": "flow-routes"}, "'flow-routes' only say how important"),
        ({"sign": "helpful", "method": "acdc"}, "'acdc' only say how important"),
        ({"sign": "helpful", "method": "edge-pruning"}, "'edge-pruning' only say how important"),
        ({"source": "mean"}, "eap-ig.*corrupt"),
        ({"method": "edge-pruning", "circuit_fraction": 1.0}, "must be below 1"),
        ({"method": "magic"}, "magic.*eap-ig"),
        ({"metric": "accuracy"}, "accuracy.*logit-diff"),
        ({"metric": "kl", "method": "eap"}, "flat"),
        ({"source": "zero"}, "eap-ig.*corrupt"),
        ({"circuit_edges": 10, "circuit_fraction": 0.1}, "not both"),
        ({"circuit_fraction": 1.5}, "fraction"),
    ],
)
def test_what_cannot_be_is_refused_by_name_before_a_model_is_loaded(change: dict[str, Any], message: str) -> None:
    wrong = {**QUICK, **change}
    with pytest.raises(SettingsError, match=message):
        resolve(CircuitSettings, model="there/is/none", **wrong)
    with pytest.raises(SettingsError, match=message):
        resolve(CircuitDiffSettings, base="there/is/none", tuned="nor/here", **wrong)


@pytest.mark.parametrize(("method", "more"), [("eap", 1), ("edge-pruning", 0)])
def test_more_edges_than_the_model_has_are_refused_before_any_is_scored(method: str, more: int, tmp_path: Path) -> None:
    edges = len(Graph.of(load(MODEL))) + more
    with pytest.raises(SettingsError, match="this model has"):
        circuit(tmp_path / "run", limit=8, method=method, circuit_edges=edges)
    assert not list((tmp_path / "run").rglob("*circuit_scores*"))


def test_a_metric_that_the_pairs_have_nothing_for_is_refused_before_any_edge_is_scored(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no target span"):
        circuit(tmp_path / "run", limit=8, metric="loss")
    assert not list((tmp_path / "run").rglob("*circuit_scores*"))


def test_pairs_of_unequal_length_are_refused_with_the_pair(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    row = {"clean": "The mayor of Ashford", "corrupt": "The mayor", "answers": [" said"], "wrong_answers": [" and"]}
    file.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match="length"):
        circuit(tmp_path / "run", pairs=str(file))


def test_checkpoints_named_twice_are_refused() -> None:
    with pytest.raises(SettingsError, match="twice"):
        resolve(CircuitDiffSettings, base="there/is/none", tuned="nor/here", checkpoints="one,two,one", **QUICK)
