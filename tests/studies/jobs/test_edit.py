"""`mechscope edit`: what edits did is said beside controls, their files undo and stack, and what cannot be edited is refused before the model runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from mechscope.edit import Delta, applied
from mechscope.errors import DataError, MechscopeError, ModelError, SettingsError
from mechscope.instrument import load
from mechscope.studies.jobs.edit import JOB
from mechscope.studies.runner import run_job
from tests import families
from tests.studies.jobs.running import findings, refuses, run, shown, subject

FACTS: tuple[dict[str, Any], ...] = (
    {
        "case_id": 7,
        "requested_rewrite": {"subject": "w9 w30", "prompt": "w5 {} w12", "target_new": {"str": "w44 w45"}, "target_true": {"str": "w20"}},
        "paraphrase_prompts": ["w7 w9 w30 w13"],
        "neighborhood_prompts": ["w5 w6 w12", "w4 w6 w60"],
    },
    {"id": "b", "subject": "w8 w31", "prompt": "w6 {} w12", "target_new": "w50", "target_true": "w21", "neighborhood_prompts": ["w5 w77"]},
    {"id": "c", "subject": "w70", "prompt": "w6 w3 {} w14", "target_new": "w33", "target_true": "w60"},
)
SMALL: dict[str, Any] = {"texts": 12, "held_out": 3, "beginnings": 1, "steps": 5}


def edit_files(folder: Path, *facts: dict[str, Any]) -> dict[str, str]:
    """Write facts and ordinary texts, and return the settings that name them."""
    random = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(f"w{word}" for word in random.integers(3, 97, size=16))}) for _ in range(20)]
    (folder / "edit-texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, facts or FACTS)), encoding="utf-8")
    return {"edits": str(folder / "edits.jsonl"), "data": str(folder / "edit-texts.jsonl")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("edit")
    return run(JOB, folder / "run", **edit_files(folder), **SMALL, layers="1", sequence="1,3", merge=True)


def test_what_edits_did_is_said_beside_controls(done: Any) -> None:
    assert list(dict.fromkeys(done.edits["arm"])) == ["the edit", "C = identity", "random layer", "other subject"]
    assert done.edits["id"].tolist()[:3] == ["7", "b", "c"]
    page = shown(done, "edit")
    first, last = findings("edit", **done.tables)
    for part in ("rome in layer 1", "of the prompts about others are as before", "controls on 3 of the edits: C = identity", "n = 3 edits"):
        assert part in first
    assert "After 3 edits one upon the other the first" in last
    assert "Edited facts" in page


def test_its_files_are_edits_that_stack_and_the_merged_model_is_theirs(done: Any) -> None:
    ids = torch.tensor([[5, 9, 30, 12]])
    alone, stacked = ([Delta.load(path) for path in sorted((done.path / name).glob("*.safetensors"))] for name in ("edits", "sequence"))
    assert (len(alone), len(stacked)) == (3, 3)
    assert alone[0].about["facts"][0]["target_new"] == "w44 w45"
    with applied(subject(), *stacked) as edited, torch.no_grad():
        expected = edited.plain(ids).logits
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(done.path / "edited")(ids).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=0)
    other = load(families.build("gpt2", seed=1))
    with pytest.raises(ModelError, match="the edit fits a model whose"), applied(other, alone[0]):
        pass


def test_the_layer_is_found_by_tracing_where_none_is_named(tmp_path: Path) -> None:
    result = run(JOB, tmp_path / "run", **edit_files(tmp_path), **SMALL, limit=2, controls=0, sequence="", method="finetune")
    rows = result.trace[result.trace["positions"] == "last subject token"]
    assert set(result.edits["layers"]) == {str(int(rows["layer"].to_numpy()[rows["effect"].to_numpy().argmax()]))}
    assert "without a control" in findings("edit", **result.tables)[0]
    assert "edit_sequence" not in result.tables


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_several_layers_are_edited_by_methods_that_share_out(method: str, tmp_path: Path) -> None:
    settings = {**SMALL, "layers": "0-1", "method": method, "limit": 1, "sequence": "", "controls": 1, "free": 0.5}
    result = run(JOB, tmp_path / "run", **edit_files(tmp_path), **settings)
    assert set(result.edits["layers"]) == {"0,1", "2"}
    assert len(Delta.load(tmp_path / "run" / "edits" / "0001.safetensors").changes) == 2


def test_that_nothing_took_is_said_plainly(done: Any) -> None:
    rows = done.edit_measures.assign(value=np.where(done.edit_measures["measure"] == "efficacy", 0.1, done.edit_measures["value"]))
    said = findings("edit", edit_measures=pd.DataFrame(rows))[0]
    assert said.startswith("The model is mostly not edited: rome in layer 1")


@pytest.mark.parametrize(
    ("fact", "settings", "error", "message"),
    [
        ({"prompt": "w5 w9 w12"}, {}, DataError, r"the prompt 'w5 w9 w12' has \{\} 0 times"),
        ({"target_new": "w20"}, {}, DataError, "target_new and target_true are both 'w20'"),
        ({"target_new": ""}, {}, DataError, "line 1 has no text 'target_new'"),
        ({"paraphrase_prompts": 3}, {}, DataError, "'paraphrase_prompts' is a int: write a list"),
        ({}, {"layers": "7"}, SettingsError, "layer"),
        ({}, {"layers": "0-1"}, SettingsError, "rome edits one layer, '0-1' names 2"),
        ({"target_true": None}, {}, DataError, "has no target_true, which tracing measures: give it, or name the layer"),
        ({}, {"sequence": "one"}, SettingsError, "write numbers of edits joined by commas"),
        ({}, {"held_out": 40}, DataError, "has 20 texts, of which 40 are held out"),
        ({"prompt": " ".join(["w5"] * 70) + " {}"}, {}, DataError, "the model reads 64"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_the_model_runs(
    fact: dict[str, Any], settings: dict[str, Any], error: type[MechscopeError], message: str, tmp_path: Path
) -> None:
    row = {"subject": "w9 w30", "prompt": "w5 {} w12", "target_new": "w44", "target_true": "w20", **fact}
    refuses(JOB, tmp_path / "run", error, message, **{**edit_files(tmp_path, row), **SMALL, **settings})


def test_a_mixture_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    mixture = load(families.build("gpt_oss"), tokenizer=families.tokenizer())
    settings = JOB.resolve(model="given in memory", layers="1", **edit_files(tmp_path), **SMALL)
    with pytest.raises(ModelError, match="the MLP of layer 1 is a mixture of 4 experts"):
        run_job(JOB, settings, None, given={"model": mixture})
