"""`mechscope features circuit` does what the functions do, judges on texts it was not found on, and refuses what contradicts itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope import features
from mechscope.data.pairs import Pairs
from mechscope.data.splits import held_out
from mechscope.errors import RunError, SettingsError
from mechscope.studies.jobs.features_circuit import JOB
from tests.causal.pairs import telling_pairs
from tests.features import oracle
from tests.studies.jobs.running import findings, refuses, run, shown, subject

QUICK: dict[str, Any] = {"points": 3, "node_threshold": 0.01, "nodes": 12, "check": 3, "draws": 2, "documents": 16}


def written(folder: Path, *places: str) -> str:
    """Write random dictionaries and return their names as a setting."""
    files = []
    for at, place in enumerate(places):
        given = oracle.dictionary(features.autoencoder(place, subject().anatomy.d_model, 30, features.Rule("relu")), seed=at)
        given.to(torch.float32).save(folder / f"{place}.safetensors")
        files.append(str(folder / f"{place}.safetensors"))
    return ",".join(files)


@pytest.fixture
def dictionary(tmp_path: Path) -> str:
    """Two dictionaries, named against the order of the run."""
    return written(tmp_path, "m1", "resid0")


def test_the_circuit_is_that_of_the_functions(tmp_path: Path, dictionary: str) -> None:
    pairs = telling_pairs(subject(), 16)
    result = run(JOB, tmp_path / "run", pairs=pairs, dictionary=dictionary, **QUICK)
    found_on, judged_on = held_out(pairs, 0.5, 0)
    loaded = [features.Dictionary.load(file) for file in dictionary.split(",")]
    standing = features.in_order([features.Standing.of(each, subject()) for each in loaded])
    effects = features.node_effects(subject(), standing, found_on, points=3)
    nodes = effects.largest(0.01, 12)
    table = result.feature_nodes
    chosen = table[table["in_circuit"]]
    assert chosen["component"].tolist() == [node.name for node in nodes]
    assert len(nodes) == 12
    expected = effects.table.set_index("component").loc[table["component"], "effect"]
    np.testing.assert_allclose(table["effect"], expected)
    exact = features.patch_nodes(subject(), standing, found_on, nodes[:3]).mean(1)
    np.testing.assert_allclose(table["exact"].dropna(), exact)
    edges = features.node_edges(subject(), standing, found_on, nodes, points=3).set_index("edge")["effect"]
    own = result.feature_edges.set_index("edge")["effect"]
    pd.testing.assert_series_equal(own.sort_index(), edges.sort_index())
    assert (result.feature_edges["in_circuit"] == (own.abs() >= 0.01).to_numpy()).all()
    active = {place: np.unique(matrix.indices).tolist() for place, matrix in effects.latents.items()}
    judged = features.faithfulness(subject(), standing, judged_on, nodes, active=active, draws=2)
    pd.testing.assert_frame_equal(result.feature_faithfulness.drop(columns=["filling", "held_out"]), judged)
    assert result.feature_faithfulness["held_out"].all()
    places = result.feature_places
    assert places["place"].tolist() == ["resid0", "m1"]
    np.testing.assert_allclose(places["whole"], places["latents"] + places["error"] + places["missed"])
    page = shown(result, "feature-circuit")
    assert "random latents" in page
    # again, with another number of random circuits: the effects are not done again
    again = run(JOB, tmp_path / "run", pairs=pairs, dictionary=dictionary, **{**QUICK, "draws": 1})
    pd.testing.assert_frame_equal(again.feature_nodes, table)


def test_of_one_text_everything_is_set_to_zero_and_the_page_says_that_it_is_one(dictionary: str) -> None:
    texts = telling_pairs(subject(), 1)
    alone = Pairs((replace(texts.pairs[0], corrupt=texts.pairs[0].clean),), "one")
    found = run(JOB, None, pairs=alone, dictionary=dictionary, **QUICK)
    assert not found.feature_faithfulness["held_out"].any()
    assert set(found.feature_faithfulness["filling"]) == {"zero"}
    assert found.feature_nodes["n"].eq(1).all()
    said = findings("feature-circuit", **found.tables)
    assert any("withheld" in each for each in said)


def test_a_threshold_that_nothing_reaches_leaves_an_empty_circuit(dictionary: str) -> None:
    result = run(JOB, None, pairs=telling_pairs(subject(), 16), dictionary=dictionary, **{**QUICK, "node_threshold": 1e9})
    assert not result.feature_nodes["in_circuit"].any()
    assert "feature_edges" not in result.tables
    assert set(result.feature_faithfulness["nodes"]) == {0, -1}
    assert any(
        "no latent or error has an effect as large as the threshold" in each for each in findings("feature-circuit", **result.tables)
    )
    none = {**result.tables, "feature_nodes": result.feature_nodes.head(0)}
    assert any("no latent or error has any effect on the metric" in each for each in findings("feature-circuit", **none))


def test_means_stand_for_what_is_left_out_where_they_are_asked_for(dictionary: str) -> None:
    pairs = telling_pairs(subject(), 16)
    one, two = (
        run(JOB, None, pairs=pairs, dictionary=dictionary, filling=filling, **QUICK).feature_faithfulness for filling in ("mean", "corrupt")
    )
    assert set(one["filling"]) == {"mean"}
    assert not np.allclose(one["value"], two["value"])


def test_what_contradicts_itself_is_refused_before_anything_runs(tmp_path: Path, dictionary: str) -> None:
    plain = Pairs(tuple(replace(pair, corrupt=pair.clean) for pair in telling_pairs(subject(), 6)), "plain")
    out = tmp_path / "out"
    refuses(JOB, out, SettingsError, "'corrupt' need texts with a corrupt version", pairs=plain, dictionary=dictionary, source="corrupt")
    refuses(JOB, out, SettingsError, "'kl' has no gradient", pairs=plain, dictionary=dictionary, metric="kl")
    refuses(JOB, out, RunError, r"nowhere.safetensors: no such file", pairs=plain, dictionary="nowhere.safetensors")
    transcoder = oracle.dictionary(features.transcoder(1, subject().anatomy.d_model, 30, features.Rule("relu")))
    transcoder.save(tmp_path / "transcoder.safetensors")
    refuses(JOB, out, SettingsError, "has no latents that are components", pairs=plain, dictionary=str(tmp_path / "transcoder.safetensors"))
