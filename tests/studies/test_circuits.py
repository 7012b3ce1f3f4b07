"""Circuits in run folders and in the study: what is found, judged and compared, and messages for what cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.adapt.places import read_circuit
from mechscope.circuits import Graph, choose, discover, from_json, jaccard, node_jaccard, tuned_edges
from mechscope.circuits.scores import Cost, Scores
from mechscope.data.newsroom import newsroom_pairs
from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, RunError, SettingsError
from mechscope.instrument import load
from mechscope.store.run import verify
from mechscope.studies import circuit_judging, circuit_stages, circuits
from mechscope.studies.circuit_judging import Asked
from mechscope.studies.circuits import circuit_diff_run, circuit_run
from mechscope.studies.interventions import load_pairs
from mechscope.studies.pair_settings import CircuitDiffSettings, CircuitSettings, DiscoverySettings
from mechscope.studies.settings import StudySettings
from mechscope.studies.summarization import Study, study
from tests.studies.asked import MODEL, QUICK, measure
from tests.studies.conftest import TINY


def settings(**changes: Any) -> CircuitSettings:
    return CircuitSettings(**{"model": MODEL, **QUICK, **changes})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return circuit_run(settings(criteria=True, circuit_fraction=0.02), tmp_path_factory.mktemp("circuit") / "run")


def test_a_circuit_run_holds_edges_criteria_cards_a_file_and_a_picture(found: Study) -> None:
    summary, edges = found.tables["circuit_summary"], found.tables["circuit_edges"]
    chosen = edges[edges["in_circuit"]]
    assert len(chosen) == measure(summary, "edges") > 0
    # the whole model and no edge are the ends of the scale, and all edges are the model
    curve = found.tables["circuit_curve"]
    assert curve["faithfulness"].iloc[-1] == pytest.approx(1.0, abs=1e-4)
    assert curve["value"].iloc[-1] == pytest.approx(measure(summary, "metric of the model"), abs=1e-4)
    components = found.tables["circuit_components"]
    assert set(components["component"]) == {name for name in chosen["sender"] if name != "input"} | {
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
    page = found.report.read_text(encoding="utf-8")
    assert "Not part of this run" not in page
    assert (found.path / "figures" / "circuit-model.svg").exists()
    assert (verify(found.path)["status"] == "ok").all()


def test_the_circuit_file_is_read_back_and_refused_for_other_weights(found: Study) -> None:
    subject = load(MODEL)
    graph = Graph.of(subject)
    file = found.path / "circuits" / "model.json"
    circuit, scores = from_json(file, graph, fingerprint=subject.fingerprint)
    edges = found.tables["circuit_edges"]
    assert circuit.names == tuple(edges.loc[edges["in_circuit"], "edge"])
    np.testing.assert_allclose(scores, edges["score"], rtol=1e-12)
    assert read_circuit(str(file), subject) == circuit.components()
    with pytest.raises(DataError, match="other weights"):
        from_json(file, graph, fingerprint="0" * 64)


def test_the_same_command_again_runs_nothing_and_other_settings_are_refused(tmp_path: Path) -> None:
    asked = settings(method="eap", limit=8, circuit_fraction=0.05)
    first = circuit_run(asked, tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "tables").iterdir()}
    again = circuit_run(asked, tmp_path / "run")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "tables").iterdir()} == before
    pd.testing.assert_frame_equal(first.tables["circuit_edges"], again.tables["circuit_edges"])
    with pytest.raises(RunError, match="method"):
        circuit_run(settings(method="eap-ig", limit=8, circuit_fraction=0.05), tmp_path / "run")


def test_two_runs_give_equal_tables(tiny_model: Path, tmp_path: Path) -> None:
    asked = settings(model=str(tiny_model), criteria=True, circuit_fraction=0.05)
    first, second = (circuit_run(asked, tmp_path / name).tables for name in ("first", "second"))
    assert (first["circuit_components"]["minimality_p"] < 1).any()
    assert first.keys() == second.keys()
    for name, table in first.items():
        pd.testing.assert_frame_equal(table, second[name], obj=name)


def test_edge_pruning_learns_the_edges_that_are_asked_for_and_is_run_with_another_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = partial(discover, pruning_steps=6)
    monkeypatch.setattr(circuit_stages, "discover", quick)
    asked = settings(method="edge-pruning", circuit_edges=300, limit=8, seed=5)
    tables = circuit_run(asked, tmp_path / "run").tables
    summary, edges = tables["circuit_summary"].set_index("measure"), tables["circuit_edges"]
    subject = load(MODEL)
    part = Asked.of(load_pairs(asked, subject), asked, metric="logit-diff", tokens_per_batch=asked.tokens_per_batch, seed=5)
    share = 300 / len(Graph.of(subject))
    own, other = (
        quick(subject, part.found_on, method="edge-pruning", fraction=share, seed=seed, tokens_per_batch=asked.tokens_per_batch)
        for seed in (5, 6)
    )
    assert own.notes["n_edges"] == 300
    np.testing.assert_allclose(edges["score"], own.mean, rtol=1e-6)
    expected = jaccard(choose(own, fraction=share), choose(other, fraction=share))
    row = summary.loc["Jaccard of edges, other seed of the method"]
    assert row["value"] == pytest.approx(expected, abs=1e-9)
    assert 0 < row["random"] < 0.2
    assert row["value"] < 1
    assert "Jaccard of nodes, other seed of the method" in summary.index


def test_checkpoints_are_compared_at_one_size_beside_chance(tmp_path: Path) -> None:
    options = DiscoverySettings()
    graph, random = Graph(3, 4), np.random.default_rng(0)
    scores = [Scores(graph, random.standard_normal(len(graph)), None, "eap", Cost(2, 1)) for _ in range(3)]
    labels = ["base", "half", "tuned"]
    # each model's own circuit has another size
    found = {label: (one, choose(one, fraction=size)) for label, one, size in zip(labels, scores, (0.05, 0.5, 0.2), strict=True)}
    summary = pd.DataFrame([{"model": label, "measure": "faithfulness", "value": 0.9, "low": 0.8, "high": 1.0} for label in labels])
    run: Any = SimpleNamespace(table=lambda name: {"circuit_summary": summary}[name])
    for changed, fraction in (({}, 0.05), ({"circuit_fraction": 0.3}, 0.3), ({"circuit_edges": 131}, 131 / len(graph))):
        asked = Asked.of(newsroom_pairs(8, role="what"), replace(options, **changed), metric="loss", tokens_per_batch=256, seed=0)
        table = circuit_stages.over_time(run, found, labels, asked)
        assert (table["fraction"] == fraction).all()
        assert list(table["edges"]) == [len(found[label][1]) for label in labels]
        same = [choose(one, fraction=fraction) for one in scores]
        np.testing.assert_allclose(table["jaccard_base"], [jaccard(one, same[0]) for one in same])
        np.testing.assert_allclose(table["jaccard_previous"], [1.0, jaccard(same[1], same[0]), jaccard(same[2], same[1])])
        np.testing.assert_allclose(table["nodes_previous"].iloc[2], node_jaccard(same[2], same[1]))
        # scores are noise, so circuits share what chance gives
        assert (table["jaccard_previous"] - table["jaccard_previous_null"]).iloc[1:].abs().max() < 0.12
        assert table["nodes_base_null"].between(0, 1).all()


@pytest.mark.parametrize(
    ("sources", "labels"),
    [
        (["runs/a/step-1", "runs/a/step-2"], ["step-1", "step-2"]),
        (["runs/base", "runs/tuned"], ["runs/base", "runs/tuned"]),
        (["base", "tuned"], ["base (2)", "tuned (2)"]),
        (["a/last", "b/last"], ["a/last", "b/last"]),
        (["a/step 1", "a/step-1", "a/Step_1"], ["step 1", "a/step-1", "a/Step_1 (2)"]),
    ],
)
def test_labels_and_their_files_differ_and_leave_base_and_tuned_alone(sources: list[str], labels: list[str]) -> None:
    found = circuits._labels(sources)
    assert list(found) == labels
    assert list(found.values()) == sources
    assert len({circuit_judging.plain(label).lower() for label in ["base", *labels, "tuned"]}) == len(sources) + 2


def test_models_whose_labels_share_a_file_are_refused(tmp_path: Path) -> None:
    asked = Asked.of(newsroom_pairs(8, role="what"), DiscoverySettings(), metric="loss", tokens_per_batch=256, seed=0)
    nobody: Any = None
    with pytest.raises(SettingsError, match=r"step 1, step-1 .* would share a file"):
        circuit_stages.circuits_stage(nobody, {"step 1": nobody, "step-1": nobody}, asked, progress=None)


def test_two_texts_have_shifts_but_no_overlap_and_the_log_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = CircuitDiffSettings(base=MODEL, tuned=MODEL, **{**QUICK, "limit": 2, "random_circuits": 0}, method="eap", circuit_fraction=0.05)
    with caplog.at_level("WARNING"):
        tables = circuit_diff_run(asked, tmp_path / "run").tables
    assert (tables["circuit_shift"]["shift"] == 0).all()
    assert "circuit_overlap" not in tables
    assert "2 texts, which cannot be halved" in caplog.text
    assert "keeps no scores of single texts" not in caplog.text


def test_edges_that_carry_the_gain_are_ranked_on_the_pairs_that_find_circuits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Pairs, Pairs]] = []

    def watched(pair: Any, texts: Pairs, *, scored_on: Pairs, **options: Any) -> Any:
        calls.append((texts, scored_on))
        return tuned_edges(pair, texts, scored_on=scored_on, **options)

    monkeypatch.setattr(circuit_stages, "tuned_edges", watched)
    circuit_diff_run(
        CircuitDiffSettings(base=MODEL, tuned=MODEL, **{**QUICK, "limit": 8, "random_circuits": 0}, method="eap", circuit_fraction=0.05),
        tmp_path / "run",
    )
    ((judged_on, scored_on),) = calls
    assert not {pair.id for pair in judged_on} & {pair.id for pair in scored_on}


def test_a_model_and_itself_have_one_circuit_at_every_checkpoint(tmp_path: Path) -> None:
    asked = CircuitDiffSettings(base=MODEL, tuned=MODEL, checkpoints=MODEL, **QUICK, method="eap", circuit_fraction=0.05)
    tables = circuit_diff_run(asked, tmp_path / "run").tables
    overlap, shift, time = tables["circuit_overlap"], tables["circuit_shift"], tables["circuit_time"]
    assert (overlap["jaccard"] == 1).all()
    # base with tuned on two halves is base with itself on two halves
    np.testing.assert_allclose(overlap["change"], 0.0, atol=1e-12)
    assert (shift["shift"] == 0).all()
    assert (time["jaccard_base"] == 1).all()
    assert list(time["order"]) == [0, 1, 2]
    assert tables["circuit_gain"]["share"].isna().all()


def test_the_study_finds_the_circuit_of_summarizing_and_places_lora_by_it(tiny_model: Path, tmp_path: Path) -> None:
    changed = {
        "circuit": True,
        "circuit_documents": 8,
        "circuit_size": 0.05,
        "circuit_method": "eap",
        "causal": False,
        "test_documents": 12,
    }
    strategies = {"strategies": "standard,circuit,random_circuit,none", "protocols": "equal_parameters"}
    asked = StudySettings(base=str(tiny_model), **{**TINY, **changed, **strategies})
    tables = study(asked, tmp_path / "run").tables
    assert set(tables["circuit_summary"]["model"]) == {"base", "tuned"}
    claims = tables["claims"].set_index("claim")
    assert {"circuit_changed", "few_edges_carry_gain", "circuit_vs_random.equal_parameters"} <= set(claims.index)
    bakeoff = tables["bakeoff"].set_index("strategy")
    components = tables["circuit_components"]
    tuned = set(components.loc[components["model"] == "tuned", "component"])
    assert set(bakeoff.loc[["circuit"], "components"].iloc[0].split(",")) == tuned
    assert not (bakeoff.loc[["random_circuit"], "components"] == bakeoff.loc[["circuit"], "components"].iloc[0]).any()
    budget = bakeoff.loc[["standard"], "trainable_parameters"].iloc[0]
    assert bakeoff.loc[["circuit"], "trainable_parameters"].iloc[0] == pytest.approx(budget, rel=0.06)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": 1.0}, "held_out"),
        ({"held_out": -0.1}, "held_out"),
        ({"circuit_edges": 0}, "'circuit_edges' is 0: give at least 1"),
        ({"circuit_fraction": 0.0}, "'circuit_fraction' is 0.0"),
        ({"circuit_fraction": float("nan")}, "'circuit_fraction' is nan"),
        ({"faithful": 0.0}, "'faithful' is 0.0: give above 0"),
        ({"faithful": 1.1}, "'faithful' is 1.1"),
        ({"circuit_resamples": 1}, "'circuit_resamples' is 1: give at least 2"),
        ({"random_circuits": -1}, "'random_circuits' is -1"),
        ({"steps": 0}, "steps"),
        ({"rule": "threshold"}, "rule 'threshold' is not known: use one of top, greedy"),
        ({"by": "heads"}, "by 'heads' is not known"),
        ({"sign": "good"}, "sign 'good' is not known"),
        ({"points": "right"}, "points 'right' is not known"),
        ({"source": "noise"}, "source 'noise' is not known"),
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
def test_what_cannot_be_asked_is_refused_by_name_before_a_model_is_loaded(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    wrong = {**QUICK, **change}
    with pytest.raises(SettingsError, match=message):
        circuit_run(CircuitSettings(model="there/is/none", **wrong), tmp_path / "run")
    with pytest.raises(SettingsError, match=message):
        circuit_diff_run(CircuitDiffSettings(base="there/is/none", tuned="nor/here", **wrong), tmp_path / "run")
    # so that the same folder takes the right settings
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "more"), [("eap", 1), ("edge-pruning", 0)])
def test_more_edges_than_the_model_has_are_refused_before_any_is_scored(method: str, more: int, tmp_path: Path) -> None:
    edges = len(Graph.of(load(MODEL))) + more
    with pytest.raises(SettingsError, match="this model has"):
        circuit_run(settings(limit=8, method=method, circuit_edges=edges), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*circuit_scores*"))


def test_pairs_of_unequal_length_are_refused_with_the_pair(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    row = {"clean": "The mayor of Ashford", "corrupt": "The mayor", "answers": [" said"], "wrong_answers": [" and"]}
    file.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match="length"):
        circuit_run(settings(pairs=str(file)), tmp_path / "run")


def test_checkpoints_named_twice_are_refused(tmp_path: Path) -> None:
    asked = CircuitDiffSettings(base="there/is/none", tuned="nor/here", checkpoints="one,two,one", **QUICK)
    with pytest.raises(SettingsError, match="twice"):
        circuit_diff_run(asked, tmp_path / "run")


def test_a_study_with_a_wrong_circuit_setting_stops_before_any_stage(tiny_model, tmp_path):
    with pytest.raises(SettingsError, match="eap-gi"):
        study(StudySettings(base=str(tiny_model), **{**TINY, "circuit_method": "eap-gi"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
