"""`mechscope heads`, `lens` and `weights` write what they promise, for one model and for a pair, and continue where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechscope.errors import DataError, SettingsError
from mechscope.instrument import load
from mechscope.studies.heads import heads_run, read_documents
from mechscope.studies.lens import lens_run
from mechscope.studies.reading_settings import HeadsSettings, LensSettings, WeightsSettings
from mechscope.studies.resolving import resolve
from mechscope.studies.weights import weights_run

SMALL: dict[str, Any] = {"max_tokens": 96, "documents": 6}


@pytest.fixture(scope="module")
def tuned_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model with other weights in the attention of its third layer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        torch.manual_seed(1)
        model.transformer.h[2].attn.c_attn.weight.add_(0.3 * torch.randn_like(model.transformer.h[2].attn.c_attn.weight))
    folder = tmp_path_factory.mktemp("tuned")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def started(out: Path) -> int:
    """Count the stages that ran."""
    return (out / "log.jsonl").read_text().count("finished")


def test_roles_of_one_model(tiny_model, tmp_path):
    settings = resolve(HeadsSettings, model=str(tiny_model), data="newsroom", probes=4, **SMALL)
    found = heads_run(settings, tmp_path / "run")
    roles = found.tables["head_roles"]
    assert set(roles["model"]) == {"model"}
    assert {"previous-token", "induction", "copying", "retrieval", "summary-to-document"} <= set(roles["role"])
    assert (roles.groupby("role").size() == 16).all()
    definitions = found.tables["role_definitions"]
    assert set(definitions["role"]) == set(roles["role"])
    assert not np.isinf(definitions[["low", "high"]].to_numpy(float)).any()
    assert definitions.loc[definitions["low"].isna(), "role"].tolist() == ["ioi-direct-effect"]
    assert "head_role_changes" not in found.tables
    assert "previous-token" in found.report.read_text(encoding="utf-8")
    before = started(tmp_path / "run")
    again = heads_run(settings, tmp_path / "run")
    assert started(tmp_path / "run") == before
    np.testing.assert_array_equal(again.tables["head_roles"]["score"], roles["score"])


def test_roles_of_a_pair_are_compared_text_by_text_and_shown(tiny_model, tuned_model, tmp_path):
    settings = resolve(HeadsSettings, model=str(tiny_model), tuned=str(tuned_model), probes=4, show="a2.h0,a0.h1", **SMALL)
    found = heads_run(settings, tmp_path / "run")
    changes = found.tables["head_role_changes"].set_index(["role", "component"])
    # the first layers are the same in both, the third is not
    assert (changes.loc[("previous-token", ["a0.h0", "a1.h3"]), "change"] == 0).all()
    assert abs(float(changes["change"]["previous-token", "a2.h0"])) > 1e-4
    assert "retrieval" not in changes.index.get_level_values("role")  # no documents were given
    edges = pd.read_parquet(tmp_path / "run" / "tables" / "attention_edges.parquet")
    assert set(edges["component"]) == {"a2.h0", "a0.h1"}
    assert set(edges["model"]) == {"base", "tuned"}
    base, tuned = (
        edges[(edges["component"] == "a0.h1") & (edges["model"] == side)].drop(columns="model").reset_index(drop=True)
        for side in ("base", "tuned")
    )
    pd.testing.assert_frame_equal(base, tuned)


def test_a_lens_over_documents_ends_at_the_models_loss(tiny_model, tuned_model, tmp_path):
    settings = resolve(
        LensSettings, model=str(tiny_model), tuned=str(tuned_model), data="newsroom", sites="residual,head_output", grid_texts=2, **SMALL
    )
    found = lens_run(settings, tmp_path / "run")
    summary = found.tables["lens_summary"].set_index(["model", "component"])
    assert summary.loc[("base", "resid3"), "kl"] == pytest.approx(0, abs=1e-6)
    assert summary.loc[("base", "resid3"), "agreement"] == 1
    # what is read before the changed layer is the same in both models
    said = summary["log_probability"]
    assert float(said["base", "resid1"]) == float(said["tuned", "resid1"])
    change = found.tables["lens_change"].set_index("component")
    assert change.loc["resid1", "log_probability_change"] == 0
    assert change.loc["resid3", "log_probability_change"] != 0
    parts = found.tables["logit_attribution"]
    assert abs(parts.loc[parts["kind"] == "residual", "effect"]).max() < 1e-3
    assert len(found.tables["logit_attribution_change"])
    grid = pd.read_parquet(tmp_path / "run" / "tables" / "lens_grid.parquet")
    assert grid["text"].nunique() == 2
    # the likeliest tokens stand in order, and at the end they are the model's
    assert (grid["p_1"] >= grid["p_2"]).all()
    subject, text = load(tiny_model), grid["text"].iloc[0]
    encoded = read_documents(settings, "newsroom", settings.documents, subject).encoded
    ids = next(example.input_ids for example in encoded.examples if example.id == text)
    with torch.no_grad():
        own = subject.plain(torch.tensor([ids])).logits.softmax(-1).max(-1).values[0]
    last = grid[(grid["model"] == "base") & (grid["component"] == "resid3") & (grid["text"] == text)]
    np.testing.assert_allclose(last["p_1"], own, rtol=0, atol=1e-5)


def test_a_text_and_a_tuned_lens(tiny_model, tmp_path):
    settings = resolve(
        LensSettings,
        model=str(tiny_model),
        text="The council of the town voted on the new budget on Monday.",
        lens_data="newsroom",
        lens_documents=12,
        lens_steps=10,
        **SMALL,
    )
    found = lens_run(settings, tmp_path / "run")
    summary = found.tables["lens_summary"]
    assert set(summary["lens"]) == {"logit", "tuned"}
    assert (tmp_path / "run" / "lenses" / "model.safetensors").is_file()
    kl = summary.set_index(["lens", "component"])["kl"]
    assert kl["tuned", "embedding"] < kl["logit", "embedding"]


def test_prompts_with_answers_are_attributed_by_their_logit_difference(tiny_model, tmp_path):
    found = lens_run(resolve(LensSettings, model=str(tiny_model), pairs="newsroom:where", documents=4), tmp_path / "run")
    parts = found.tables["logit_attribution"]
    assert set(parts["n"]) == {4}
    assert {"head", "mlp", "embedding"} <= set(parts["kind"])


@pytest.mark.parametrize("given", [{}, {"text": "a b", "data": "newsroom"}])
def test_one_source_of_texts_is_needed(tiny_model, tmp_path, given):
    with pytest.raises(SettingsError, match="one of text"):
        lens_run(resolve(LensSettings, model=str(tiny_model), **given), tmp_path / "run")


def test_a_text_of_one_token_is_refused(tiny_model, tmp_path):
    with pytest.raises(DataError, match="at least two"):
        lens_run(resolve(LensSettings, model=str(tiny_model), text="a"), tmp_path / "run")


def test_weights_of_a_pair_say_what_changed_and_where(tiny_model, tuned_model, tmp_path):
    settings = resolve(WeightsSettings, model=str(tiny_model), tuned=str(tuned_model), data="newsroom", heads=2, top=3, neurons=5, **SMALL)
    found = weights_run(settings, tmp_path / "run")
    changes = found.tables["weight_changes"].set_index("component")
    assert (changes.drop([f"a2.h{head}" for head in range(4)])[["ov_relative", "qk_relative"]] == 0).all(axis=None)
    assert (changes.loc[[f"a2.h{head}" for head in range(4)], "ov_relative"] > 0.1).all()
    tokens = found.tables["weight_tokens"]
    assert set(tokens["model"]) == {"base", "tuned", "change"}
    assert set(tokens["component"]) <= {f"a2.h{head}" for head in range(4)}
    assert set(tokens["matrix"]) == {"ov", "qk"}
    assert set(found.tables["weight_singular"]["model"]) == {"base", "tuned", "change"}
    assert set(found.tables["composition"]["kind"]) == {"q", "k", "v"}
    neurons = found.tables["neurons"]
    assert len(neurons) == 2 * 4 * 128
    assert (neurons["promotes"] != "").sum() == 2 * 5
    assert found.tables["neuron_contexts"]["component"].nunique() == 5


def test_weights_without_documents_leave_neurons_out(tiny_model, tmp_path):
    found = weights_run(resolve(WeightsSettings, model=str(tiny_model), components="a1.h2", top=2), tmp_path / "run")
    assert set(found.tables["weight_tokens"]["component"]) == {"a1.h2"}
    assert "neurons" not in found.tables
