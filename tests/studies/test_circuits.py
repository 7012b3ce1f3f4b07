"""Circuits in run folders and in the study: what is found, judged and compared, and messages for what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope.adapt.places import read_circuit
from mechscope.circuits import Graph, from_json
from mechscope.data.newsroom import newsroom_model_path, newsroom_pairs
from mechscope.data.pairs import Pairs
from mechscope.errors import DataError, MechscopeError, RunError, SettingsError
from mechscope.instrument import load
from mechscope.store.run import verify
from mechscope.studies.circuit_claims import circuit_claims
from mechscope.studies.circuit_judging import Asked
from mechscope.studies.circuits import circuit_diff_run, circuit_run
from mechscope.studies.settings import CircuitDiffSettings, CircuitSettings, DiscoverySettings, StudySettings
from mechscope.studies.summarization import Study, study
from tests.studies.conftest import TINY

MODEL = str(newsroom_model_path())
QUICK: dict[str, Any] = {"pairs": "newsroom:what", "limit": 12, "random_circuits": 2, "circuit_resamples": 4, "criteria": False}


def settings(**changes: Any) -> CircuitSettings:
    return CircuitSettings(**{"model": MODEL, **QUICK, **changes})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return circuit_run(settings(criteria=True, circuit_fraction=0.02), tmp_path_factory.mktemp("circuit") / "run")


def measure(table: pd.DataFrame, name: str) -> float:
    return float(table.loc[table["measure"] == name, "value"].iloc[0])


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


def test_two_runs_give_equal_tables(found: Study, tmp_path: Path) -> None:
    again = circuit_run(settings(criteria=True, circuit_fraction=0.02), tmp_path / "again")
    for name in ("circuit_edges", "circuit_curve", "circuit_summary", "circuit_components"):
        pd.testing.assert_frame_equal(found.tables[name], again.tables[name])


def test_one_half_of_the_pairs_finds_the_circuit_and_the_other_judges_it() -> None:
    pairs = newsroom_pairs(13, role="where")
    asked = Asked.of(pairs, DiscoverySettings(), metric="logit-diff", tokens_per_batch=512, seed=0)
    ids = [{pair.id for pair in part} for part in (asked.found_on, asked.judged_on)]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {pair.id for pair in pairs}
    assert len(asked.judged_on) == 6
    everything = Asked.of(pairs, DiscoverySettings(held_out=0.0), metric="logit-diff", tokens_per_batch=512, seed=0)
    assert everything.found_on is everything.judged_on is pairs
    few = Asked.of(Pairs(pairs.pairs[:5], "few"), DiscoverySettings(), metric="logit-diff", tokens_per_batch=512, seed=0)
    assert few.found_on is few.judged_on


def test_without_a_size_the_circuit_is_the_smallest_that_is_faithful_enough(tmp_path: Path) -> None:
    tables = circuit_run(settings(faithful=0.5), tmp_path / "run").tables
    curve, edges = tables["circuit_curve"], measure(tables["circuit_summary"], "edges")
    enough = curve[curve["faithfulness"] >= 0.5]
    assert edges == enough["edges"].iloc[0]


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
        ({"method": "magic"}, "magic.*eap-ig"),
        ({"metric": "accuracy"}, "accuracy.*logit-diff"),
        ({"metric": "kl", "method": "eap"}, "flat"),
        ({"source": "zero"}, "eap-ig.*corrupt"),
        ({"circuit_edges": 10, "circuit_fraction": 0.1}, "not both"),
        ({"circuit_edges": 10**9}, "this model has"),
        ({"circuit_fraction": 1.5}, "fraction"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MechscopeError, match=message):
        circuit_run(settings(limit=8, **change), tmp_path / "run")


def test_pairs_of_unequal_length_are_refused_with_the_pair(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    row = {"clean": "The mayor of Ashford", "corrupt": "The mayor", "answers": [" said"], "wrong_answers": [" and"]}
    file.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match="length"):
        circuit_run(settings(pairs=str(file)), tmp_path / "run")


def test_checkpoints_named_twice_are_refused(tmp_path: Path) -> None:
    asked = CircuitDiffSettings(base=MODEL, tuned=MODEL, checkpoints=f"{MODEL},{MODEL}", **QUICK)
    with pytest.raises(SettingsError, match="twice"):
        circuit_diff_run(asked, tmp_path / "run")


def overlap_row(what: str, change: tuple[float, float, float]) -> dict[str, Any]:
    numbers = {"jaccard": 0.4, "null": 0.1, "across": 0.3, "self_base": 0.5, "self_tuned": 0.5}
    return {"what": what, "fraction": 0.05, **numbers, "change": change[0], "change_low": change[1], "change_high": change[2]}


@pytest.mark.parametrize(
    ("change", "verdict"), [((0.2, 0.1, 0.3), "supported"), ((0.0, -0.1, 0.1), "undecided"), ((-0.2, -0.3, -0.1), "contradicted")]
)
def test_the_circuit_changed_only_if_two_models_share_less_than_one_model_with_itself(
    change: tuple[float, float, float], verdict: str
) -> None:
    table = pd.DataFrame([overlap_row("edges", change), overlap_row("nodes", (0.0, -1.0, 1.0))])
    (claim,) = circuit_claims(table, None, None)
    assert claim.verdict == verdict
    assert "0.50" in claim.measured


@pytest.mark.parametrize(
    ("tuned", "verdict"), [((0.6, 0.5, 0.7), "supported"), ((0.15, 0.0, 0.3), "undecided"), ((-0.5, -0.6, -0.4), "contradicted")]
)
def test_few_edges_carry_the_gain_only_if_they_carry_more_than_random_ones(tuned: tuple[float, float, float], verdict: str) -> None:
    rows = [
        {"fraction": 0.05, "kind": kind, "share": v, "low": a, "high": b}
        for kind, (v, a, b) in {"tuned": tuned, "random": (0.1, 0.05, 0.2)}.items()
    ]
    (claim,) = circuit_claims(None, pd.DataFrame(rows), None)
    assert claim.verdict == verdict


def test_no_gain_gives_no_verdict() -> None:
    rows = [{"fraction": 0.05, "kind": kind, "share": np.nan, "low": np.nan, "high": np.nan} for kind in ("tuned", "random")]
    (claim,) = circuit_claims(None, pd.DataFrame(rows), None)
    assert claim.verdict == "undecided"
    assert "too little" in claim.note
