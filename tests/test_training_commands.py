"""The commands that train: `tune` and `bakeoff`, their controls, and circuits as the place where LoRA learns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from mechscope.circuits.graph import Circuit, Graph
from mechscope.circuits.scores import to_json
from mechscope.store.run import RunFolder
from mechscope.studies.jobs import jobs
from mechscope.subject.load import load
from tests.studies.conftest import TINY, _no_pixels, tiny_model
from tests.test_cli import articles, run

__all__ = ["_no_pixels", "articles", "tiny_model"]


def flags() -> list[str]:
    return [
        part
        for name, value in TINY.items()
        if name not in ("data", "replicates", "seeds")
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]


def circuit_file(path: Path, model: Path, edges: Sequence[str]) -> Path:
    """Write a circuit of a model, as `mechscope circuit` does, and return its path."""
    path.write_text(to_json(Circuit.of(Graph.of(load(model)), edges)))
    return path


def test_a_training_that_is_like_another_takes_its_settings_from_there(tmp_path):
    tune = jobs()["tune"]
    first = tune.resolve(
        base="gpt2", data="articles.jsonl", rank=3, targets="layers:1", max_tokens=77, device="cuda", learning_rate_lora=0.5
    )
    (tmp_path / "study.yaml").write_text(json.dumps(dataclasses.asdict(first)))
    alike = tune.resolve(like=str(tmp_path), control="seed")
    assert (alike.base, alike.data, alike.targets, alike.max_tokens) == ("gpt2", "articles.jsonl", "layers:1", 77)
    assert (alike.lora.rank, alike.training.learning_rate_lora, alike.method) == (3, 0.5, "lora")
    # where the other was trained is no property of it
    assert alike.device == "auto"
    # what is given, on the command line or in a file, stands above
    (tmp_path / "own.yaml").write_text("rank: 5\n")
    changed = tune.resolve(tmp_path / "own.yaml", like=str(tmp_path), control="shuffled", data="others.jsonl")
    assert (changed.lora.rank, changed.data, changed.targets) == (5, "others.jsonl", "layers:1")


def test_tune_writes_an_adapter_that_diff_compares_and_verify_confirms(monkeypatch, capsys, tmp_path, tiny_model, articles):
    adapter, folder = tmp_path / "adapter", tmp_path / "run"
    training = ["--max-steps", 2, "--eval-every", 1, "--batch-size", 2, "--learning-rate-lora", 0.01, "--rank", 2, "--max-tokens", 64]
    assert run(monkeypatch, "tune", tiny_model, "--data", articles, "--out", adapter, "--targets", "a1.h2,layers:3", *training) == 0
    assert (adapter / "adapter_model.safetensors").is_file()
    # a control needs to be told nothing that the training tells
    assert run(monkeypatch, "tune", "--control", "seed", "--like", adapter, "--out", tmp_path / "control") == 0
    ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "control", adapter))
    assert {**ours, "base_model_name_or_path": ""} == {**theirs, "base_model_name_or_path": ""}
    assert run(monkeypatch, "tune", "--control", "seed", "--like", adapter, "--out", tmp_path / "other", "--rank", 3) == 2
    assert "was another than this control would be (placement.ranks" in capsys.readouterr().err
    assert run(monkeypatch, "diff", tiny_model, adapter, "--data", articles, "--out", folder, "--max-tokens", 64, "--noise-draws", 0) == 0
    assert str(folder / "report.html") in capsys.readouterr().out.replace("\n", "")
    assert run(monkeypatch, "verify", folder) == 0
    (folder / "tables" / "heads.parquet").write_bytes(b"tampered")
    assert run(monkeypatch, "verify", folder) == 1
    assert "heads.parquet" in capsys.readouterr().out


def test_targets_exclude_full_fine_tuning(monkeypatch, capsys, tmp_path, tiny_model, articles):
    words = ("--data", articles, "--out", tmp_path / "x", "--method", "full", "--targets", "layers:1")
    assert run(monkeypatch, "tune", tiny_model, *words) == 2
    assert "targets 'layers:1' are for LoRA, but the method is full" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_bakeoff_takes_a_circuit_file_and_shows_the_arms_with_their_budgets(monkeypatch, capsys, tmp_path, tiny_model):
    circuit = circuit_file(tmp_path / "circuit.json", tiny_model, ("embed->a1.h2<v>", "a1.h2->m2", "m2->logits"))
    words = ["bakeoff", tiny_model, "--data", "newsroom", "--target-circuit", circuit, "--out", tmp_path / "run", *flags()]
    asked = ("--seeds", 1, "--strategies", "standard,circuit", "--protocols", "equal_rank")
    assert run(monkeypatch, *words, *asked) == 0
    arms = RunFolder.read(tmp_path / "run").table("bakeoff").set_index("strategy")
    assert arms.loc["circuit", "components"] == "a1.h2,m2"
    out, page = capsys.readouterr().out, (tmp_path / "run" / "report.html").read_text()
    assert "Arms and their budgets" in out
    for strategy in ("standard", "circuit"):
        assert f"{int(arms['trainable_parameters'][strategy]):,}" in out.split("Arms and their budgets")[1]
    assert "At equal rank the arms differ in their budgets, from " in " ".join(out.split())
    assert f"<title>Where LoRA learns best in {tiny_model.name}" in page
    assert "Not part of this run" not in page


def test_tune_learns_in_the_parts_of_a_circuit_file(monkeypatch, tmp_path, tiny_model, articles):
    circuit = circuit_file(tmp_path / "circuit.json", tiny_model, ["a1.h2->m2"])
    training = ("--max-steps", 1, "--eval-every", 1, "--batch-size", 2, "--rank", 2, "--max-tokens", 64)
    for name, targets in (("file", circuit), ("names", "a1.h2,m2")):
        assert run(monkeypatch, "tune", tiny_model, "--data", articles, "--out", tmp_path / name, "--targets", targets, *training) == 0
    written, named = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("file", "names"))
    assert written.keys() == named.keys()
    assert all(torch.equal(written[key], named[key]) for key in named)
