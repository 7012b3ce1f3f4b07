"""`mechscope roles`, `lens` and `weights` write what they promise, for one model and for a pair, and continue where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechscope.errors import DataError, MechscopeError, SettingsError
from mechscope.instrument import load
from mechscope.settings import resolve
from mechscope.studies.inputs import read_documents
from mechscope.studies.jobs.lens import JOB as LENS
from mechscope.studies.jobs.lens import LensSettings
from mechscope.studies.jobs.roles import JOB as ROLES
from mechscope.studies.jobs.weights import JOB as WEIGHTS
from tests.studies.running import finished, run

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


def test_roles_of_one_model(tiny_model, tmp_path):
    given = {"model": str(tiny_model), "data": "newsroom", "probes": 4, **SMALL}
    result = run(ROLES, tmp_path / "run", **given)
    roles = result.head_roles
    assert set(roles["model"]) == {"model"}
    assert {"previous-token", "induction", "copying", "retrieval", "summary-to-document"} <= set(roles["role"])
    assert (roles.groupby("role").size() == 16).all()
    definitions = result.role_definitions
    assert set(definitions["role"]) == set(roles["role"])
    assert not np.isinf(definitions[["low", "high"]].to_numpy(float)).any()
    assert definitions.loc[definitions["low"].isna(), "role"].tolist() == ["ioi-direct-effect"]
    assert "head_role_changes" not in result.tables
    assert result.report is not None
    assert "previous-token" in result.report.read_text(encoding="utf-8")
    before = finished(tmp_path / "run")
    again = run(ROLES, tmp_path / "run", **given)
    assert finished(tmp_path / "run") == before
    np.testing.assert_array_equal(again.head_roles["score"], roles["score"])
    # which heads are shown changes no score
    run(ROLES, tmp_path / "run", **given, show="a2.h0")
    assert finished(tmp_path / "run")[len(before) :] == ["attention", "caveats", "report"]


def test_roles_of_a_pair_are_compared_text_by_text_and_shown(tiny_model, tuned_model, tmp_path):
    result = run(ROLES, tmp_path / "run", model=str(tiny_model), tuned=str(tuned_model), probes=4, show="a2.h0,a0.h1", **SMALL)
    changes = result.head_role_changes.set_index(["role", "component"])
    # the first layers are the same in both, the third is not
    assert (changes.loc[("previous-token", ["a0.h0", "a1.h3"]), "change"] == 0).all()
    assert abs(float(changes["change"]["previous-token", "a2.h0"])) > 1e-4
    assert "retrieval" not in changes.index.get_level_values("role")  # no documents were given
    edges = result.attention_edges
    assert set(edges["component"]) == {"a2.h0", "a0.h1"}
    assert set(edges["model"]) == {"base", "tuned"}
    base, tuned = (
        edges[(edges["component"] == "a0.h1") & (edges["model"] == side)].drop(columns="model").reset_index(drop=True)
        for side in ("base", "tuned")
    )
    pd.testing.assert_frame_equal(base, tuned)


def test_a_lens_over_documents_ends_at_the_models_loss(tiny_model, tuned_model, tmp_path):
    given = {"model": str(tiny_model), "tuned": str(tuned_model), "data": "newsroom", "grid_texts": 2, **SMALL}
    settings = resolve(LensSettings, **given)
    result = run(LENS, tmp_path / "run", **given, sites="residual,head_output")
    summary = result.lens_summary.set_index(["model", "component"])
    assert summary.loc[("base", "resid3"), "kl"] == pytest.approx(0, abs=1e-6)
    assert summary.loc[("base", "resid3"), "agreement"] == 1
    # what is read before the changed layer is the same in both models
    said = summary["log_probability"]
    assert float(said["base", "resid1"]) == float(said["tuned", "resid1"])
    change = result.lens_change.set_index("component")
    assert change.loc["resid1", "log_probability_change"] == 0
    assert change.loc["resid3", "log_probability_change"] != 0
    parts = result.logit_attribution
    assert abs(parts.loc[parts["kind"] == "residual", "effect"]).max() < 1e-3
    assert len(result.logit_attribution_change)
    grid = result.lens_grid
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
    result = run(
        LENS,
        tmp_path / "run",
        model=str(tiny_model),
        text="The council of the town voted on the new budget on Monday.",
        lens_data="newsroom",
        lens_documents=12,
        lens_steps=10,
        **SMALL,
    )
    summary = result.lens_summary
    assert set(summary["lens"]) == {"logit", "tuned"}
    assert (tmp_path / "run" / "lenses" / "model.safetensors").is_file()
    kl = summary.set_index(["lens", "component"])["kl"]
    assert kl["tuned", "embed"] < kl["logit", "embed"]
    judged = result.lens_judged
    assert judged["component"].tolist() == ["embed", "resid0", "resid1", "resid2"]
    # the summary leaves out the last position, which has no next token
    np.testing.assert_allclose(judged["kl_tuned"], [kl["tuned", name] for name in judged["component"]], rtol=0.03)
    # of one text nothing is shown, and ten steps have not arrived
    assert set(judged["verdict"]) == {"undecided"}
    assert not judged["converged"].any()


def test_prompts_with_answers_are_attributed_by_their_logit_difference(tiny_model, tmp_path):
    parts = run(LENS, tmp_path / "run", model=str(tiny_model), pairs="newsroom:where", documents=4).logit_attribution
    assert set(parts["n"]) == {4}
    assert {"head", "mlp", "embedding"} <= set(parts["kind"])


@pytest.mark.parametrize("given", [{}, {"text": "a b", "data": "newsroom"}])
def test_one_source_of_texts_is_needed(given):
    with pytest.raises(SettingsError, match="one of text"):
        resolve(LensSettings, model="there/is/none", **given)


@pytest.mark.parametrize(("sites", "message"), [("residual,heads", "'heads': the lens reads residual"), (" , ", "'sites' is empty")])
def test_a_site_that_the_lens_does_not_read_is_refused_before_a_model_is_loaded(sites, message):
    with pytest.raises(SettingsError, match=message):
        resolve(LensSettings, model="there/is/none", text="a b", sites=sites)


def test_the_settings_of_a_tuned_lens_are_read_from_a_file_by_flag_or_by_group(tmp_path):
    file = tmp_path / "lens.yaml"
    for text in ("lens_steps: 7", "training:\n  steps: 7"):
        file.write_text(f"model: gpt2\ntext: a b\n{text}\n")
        assert resolve(LensSettings, file).training.steps == 7
    assert resolve(LensSettings, file, lens_steps=9).training.steps == 9


def test_a_text_of_one_token_is_refused(tiny_model, tmp_path):
    with pytest.raises(DataError, match="at least two"):
        run(LENS, tmp_path / "run", model=str(tiny_model), text="a")


def test_weights_of_a_pair_say_what_changed_and_where(tiny_model, tuned_model, tmp_path):
    result = run(
        WEIGHTS, tmp_path / "run", model=str(tiny_model), tuned=str(tuned_model), data="newsroom", heads=2, top=3, neurons=5, **SMALL
    )
    changes = result.weight_changes.set_index("component")
    assert (changes.drop([f"a2.h{head}" for head in range(4)])[["ov_relative", "qk_relative"]] == 0).all(axis=None)
    assert (changes.loc[[f"a2.h{head}" for head in range(4)], "ov_relative"] > 0.1).all()
    tokens = result.weight_tokens
    assert set(tokens["model"]) == {"base", "tuned", "change"}
    assert set(tokens["component"]) <= {f"a2.h{head}" for head in range(4)}
    assert set(tokens["matrix"]) == {"ov", "qk"}
    assert set(result.weight_singular["model"]) == {"base", "tuned", "change"}
    assert set(result.composition["kind"]) == {"q", "k", "v"}
    neurons = result.neurons
    assert len(neurons) == 2 * 4 * 128
    assert (neurons["promotes"] != "").sum() == 2 * 5
    assert result.neuron_contexts["component"].nunique() == 5


def test_weights_without_documents_leave_neurons_out(tiny_model, tmp_path):
    result = run(WEIGHTS, tmp_path / "run", model=str(tiny_model), components="a1.h2", top=2)
    assert set(result.weight_tokens["component"]) == {"a1.h2"}
    assert "neurons" not in result.tables


@pytest.mark.parametrize(
    ("job", "wrong", "message"),
    [
        (ROLES, {"show": "z9"}, "component 'z9' is not understood"),
        (ROLES, {"show": "a99.h1"}, "component a99.h1 does not exist"),
        (ROLES, {"show": "m1"}, "hold no heads"),
        (WEIGHTS, {"components": "a99.h1"}, "component a99.h1 does not exist"),
        (WEIGHTS, {"offset": 160}, "'offset' is 160: the model has 160 positions"),
    ],
)
def test_heads_that_do_not_exist_are_refused_before_any_stage_and_mended_in_the_same_folder(tiny_model, tmp_path, job, wrong, message):
    given: dict[str, Any] = {"model": str(tiny_model), **({"probes": 2} if job is ROLES else {"heads": 1, "top": 1})}
    with pytest.raises(MechscopeError, match=message):
        run(job, tmp_path / "run", **given, **wrong)
    assert finished(tmp_path / "run") == []
    assert run(job, tmp_path / "run", **given).tables
