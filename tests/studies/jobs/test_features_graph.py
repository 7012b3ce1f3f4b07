"""`mechscope features graph` does what the functions do, tests the graph in the model beside random latents, and refuses what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechscope import features
from mechscope.errors import SettingsError
from mechscope.features.graphs import pruned, scores, shuffled
from mechscope.settings.graph import GraphSettings
from mechscope.store.run import verify
from mechscope.store.tables import read_tensors
from mechscope.studies.jobs.features_graph import JOB
from tests import families
from tests.features.oracle import dictionary
from tests.studies.jobs.running import refuses, run, shown, subject, write

PROMPT = "w5 w9 w30 w7 w9 w12 w41 w8"
QUICK: dict[str, Any] = {"prompt": PROMPT, "logits": 3, "probability": 1.0, "node_share": 0.97, "interventions": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a transcoder of every layer."""
    made = tmp_path_factory.mktemp("dictionaries")
    for layer, rule in enumerate((features.Rule("topk", 5), features.Rule("relu"), features.Rule("topk", 5))):
        given = dictionary(features.transcoder(layer, families.WIDTH, 30, rule, skip=layer == 1), seed=layer)
        given.save(made / f"t{layer}.safetensors")
    return made


def graph_of(folder: Path) -> features.AttributionGraph:
    given = {f"t{layer}": features.Dictionary.load(folder / f"t{layer}.safetensors") for layer in range(3)}
    ids = [int(word[1:]) for word in PROMPT.split()]
    return features.attribution_graph(subject(), given, ids, settings=GraphSettings(logits=3, probability=1.0))


def test_tables_are_those_of_the_functions_and_the_page_draws_the_graph(tmp_path: Path, folder: Path) -> None:
    result = run(JOB, tmp_path / "run", dictionary=str(folder), **QUICK)
    graph = graph_of(folder)
    left = pruned(graph.edges, graph.weights, graph.nodes, node_share=0.97)
    assert result.graph_nodes["node"].tolist() == graph.nodes["node"].tolist()
    np.testing.assert_allclose(result.graph_nodes["influence"], left.influence, rtol=1e-6, atol=1e-9)
    assert result.graph_nodes["kept"].tolist() == left.nodes.tolist()
    # of a token what it is, of a logit what it would be
    assert result.graph_nodes["token"].iloc[graph.where("token")].tolist() == PROMPT.split()
    edges = {(row["source"], row["target"]): row["weight"] for row in result.graph_edges.to_dict("records")}
    coo, names = left.edges.tocoo(), graph.nodes["node"].to_numpy()
    assert edges == pytest.approx({(names[s], names[t]): w for t, s, w in zip(coo.row, coo.col, coo.data, strict=True)}, rel=1e-5)
    logits = result.graph_logits
    parts = logits[["of_latents", "of_errors", "of_tokens", "of_constants", "of_others"]].sum(axis=1)
    np.testing.assert_allclose(parts, logits["value"], rtol=1e-4, atol=1e-4)
    found = scores(graph.edges, graph.weights, graph.nodes)
    row = result.graph_scores.iloc[0]
    assert (row["replacement"], row["completeness"]) == pytest.approx((found.replacement, found.completeness), rel=1e-4)
    assert result.graph_scores["control"].tolist() == ["", "shuffled decoders"]
    held, meta = read_tensors(tmp_path / "run" / "tensors" / "graph.safetensors")
    assert meta["nodes"] == names.tolist()
    assert (held["starts"].numpy() == graph.edges.indptr).all()
    np.testing.assert_allclose(held["weights"].numpy(), graph.edges.data, rtol=1e-4, atol=1e-6)
    page = shown(result, "graph")
    assert (tmp_path / "run" / "figures" / "attribution-graph.svg").stat().st_size > 500
    assert page.count('class="node ') == left.nodes.sum()
    assert "why a head looks where it looks is not explained" in page
    content = json.loads((tmp_path / "run" / "circuit_tracer" / "graph.json").read_text(encoding="utf-8"))
    assert len(content["nodes"]) == left.nodes.sum()
    assert set(verify(result.path)["status"]) == {"ok"}
    again = run(JOB, None, dictionary=str(folder), **QUICK)
    for name, table in result.tables.items():
        if name != "caveats":
            pd.testing.assert_frame_equal(table, again.tables[name])


def test_interventions_stand_beside_random_ones(folder: Path) -> None:
    result = run(JOB, None, dictionary=str(folder), **QUICK)
    table = result.graph_interventions
    assert table.groupby("chosen")["change"].nunique().to_dict() == {"influence": 7, "random": 7}
    kept = set(result.graph_nodes["node"][result.graph_nodes["kept"]])
    assert set(table["change"][table["chosen"] == "influence"]) <= kept
    assert not set(table["change"][table["chosen"] == "random"]) & kept
    assert (table["factor"] == 0).all()
    assert set(result.graph_agreement["chosen"]) == {"influence", "random"}


def test_saved_groups_are_drawn_and_changed_in_the_model(tmp_path: Path, folder: Path) -> None:
    first = run(JOB, None, dictionary=str(folder), **{**QUICK, "interventions": 2})
    nodes = first.graph_nodes
    own = nodes["node"][nodes["kept"] & (nodes["kind"] == "latent")].tolist()[:3]
    file = write(tmp_path / "groups.json", json.dumps({"prompt": PROMPT, "groups": [{"name": "mine", "nodes": [*own, "embed@2"]}]}))
    quick = {**QUICK, "interventions": 0, "factor": 2.0}
    result = run(JOB, tmp_path / "run", dictionary=str(folder), groups=file, **quick)
    table = result.graph_interventions
    assert set(table["change"]) == {"mine"}
    assert set(table["latents"]) == {3}
    assert result.graph_groups["node"].tolist() == [*own, "embed@2"]
    assert shown(result, "graph").count('class="ring"') == 4
    # twice as much adds what ablation takes away, as far as edges tell
    ablated = run(JOB, None, dictionary=str(folder), groups=file, **{**quick, "factor": 0.0}).graph_interventions
    both = table.set_index("target")["direct"].add(ablated.set_index("target")["direct"])
    assert np.abs(both).max() < 1e-6


def test_latents_are_looked_up_in_texts(tmp_path: Path, folder: Path) -> None:
    documents = [{"document": f"w5 w9 w30 w6 w{n} w12 w13 w14 w15", "summary": f"w7 w{n} w9"} for n in range(20, 28)]
    texts = write(tmp_path / "texts.jsonl", "\n".join(map(json.dumps, documents)))
    result = run(JOB, None, dictionary=str(folder), data=texts, template="w3 {document} w4 {summary}", examples=2, **QUICK)
    nodes = result.graph_nodes
    own = set(nodes["component"][nodes["kept"] & (nodes["kind"] == "latent")])
    assert set(result.graph_latents["component"]) == own
    assert set(result.graph_examples["component"]) <= own
    assert result.graph_examples.groupby("component").size().max() == 2
    component = result.graph_examples["component"].iloc[0]
    given = features.Dictionary.load(folder / f"t{component[1]}.safetensors")
    expected = features.promoted_tokens(subject(), given, [int(component.split(".f")[1])], k=8)
    row = result.graph_latents.set_index("component").loc[component]
    assert [list(row["promotes"]), list(row["suppresses"])] == [subject().spelling.tokens(ids) for ids in expected[0]]


def test_latents_of_a_cross_layer_transcoder_promote_by_all_that_they_write(tmp_path: Path) -> None:
    given = dictionary(features.cross_layer(range(families.LAYERS), families.WIDTH, 12, features.Rule("topk", 6)), seed=4)
    given.save(tmp_path / "clt.safetensors")
    result = run(JOB, None, dictionary=str(tmp_path / "clt.safetensors"), **{**QUICK, "interventions": 1, "control": False})
    nodes = result.graph_nodes
    assert set(result.graph_latents["component"]) == set(nodes["component"][nodes["kept"] & (nodes["kind"] == "latent")])
    norm, unembedding = subject().plain.transformer.ln_f, subject().plain.lm_head.weight.double()
    for component, promotes in zip(result.graph_latents["component"], result.graph_latents["promotes"], strict=True):
        layer, latent = (int(part) for part in component[1:].split(".f"))
        rows = given.tensors[f"decoder.{layer}"][latent].view(-1, families.WIDTH)
        written = sum(row / each.scale for row, each in zip(rows, given.output_maps[layer:], strict=True))
        logits = ((written - written.mean()) * norm.weight.double()) @ unembedding.T
        assert list(promotes) == subject().spelling.tokens(logits.topk(8).indices.tolist())


def test_what_does_not_fit_is_refused_before_the_model_runs(tmp_path: Path, folder: Path) -> None:
    dictionary(features.autoencoder("resid1", families.WIDTH, 30, features.Rule("relu"))).save(tmp_path / "sae.safetensors")
    (tmp_path / "empty").mkdir()
    everything = {"dictionary": str(folder), **QUICK}
    refuses(
        JOB,
        tmp_path / "a",
        SettingsError,
        "dictionary 'sae' reads resid1",
        **{**everything, "dictionary": str(tmp_path / "sae.safetensors")},
    )
    refuses(
        JOB,
        tmp_path / "b",
        SettingsError,
        "which holds no dictionary",
        **{**everything, "dictionary": str(tmp_path / "empty")},
    )
    refuses(JOB, tmp_path / "c", SettingsError, "the prompt has 1 tokens", **{**everything, "prompt": "w5"})
    broken = write(tmp_path / "g.json", '{"groups": [{"name": 3}]}')
    refuses(JOB, tmp_path / "d", SettingsError, "holds no groups: expected", **everything, groups=broken)
    of_none = write(tmp_path / "k.json", json.dumps({"groups": []}))
    refuses(JOB, tmp_path / "h", SettingsError, "does not say of which prompt", **everything, groups=of_none)
    other = write(tmp_path / "h.json", json.dumps({"prompt": "w1", "groups": []}))
    refuses(JOB, tmp_path / "e", SettingsError, "was saved for the prompt 'w1'", **everything, groups=other)
    for nodes, message in ((["m0.f1@2", "m0f1@2"], "'m0f1@2' in group 'x', which is no node"), (["m0.error@2"], "without a latent")):
        wrong = write(tmp_path / "j.json", json.dumps({"prompt": PROMPT, "groups": [{"name": "x", "nodes": nodes}]}))
        refuses(JOB, tmp_path / "g", SettingsError, message, **everything, groups=wrong)
    twice = write(tmp_path / "i.json", json.dumps({"prompt": PROMPT, "groups": [{"name": "x", "nodes": []}] * 2}))
    refuses(JOB, tmp_path / "f", SettingsError, "has two groups 'x'", **everything, groups=twice)


def test_shuffled_decoders_write_the_same_rows_for_other_latents(folder: Path) -> None:
    given = features.Dictionary.load(folder / "t1.safetensors")
    other = shuffled(given, seed=2)
    rows, moved = given.tensors["decoder.0"], other.tensors["decoder.0"]
    assert not (rows == moved).all(dim=1).all()
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, moved.tolist()))
    assert all((other.tensors[name] == given.tensors[name]).all() for name in given.tensors if name != "decoder.0")
