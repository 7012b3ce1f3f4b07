"""A series is found where it lies, in the order of its steps; what is none is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from mechscope.errors import ModelError
from mechscope.store.series import Series


def checkpoint(folder: Path, weights: bytes = b"", file: str = "config.json") -> Path:
    folder.mkdir(parents=True)
    (folder / file).write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_steps_stand_in_the_order_of_their_numbers_not_of_their_names(tmp_path: Path) -> None:
    for number in (1000, 200, 0):
        checkpoint(tmp_path / f"checkpoint-{number}", file="adapter_config.json")
    checkpoint(tmp_path / "from-scratch")
    checkpoint(tmp_path / "seed1")  # beside checkpoints, a name of another kind is no step
    (tmp_path / "checkpoint-300").mkdir()  # a folder without a model is no step either
    found = Series.find(tmp_path)
    assert [step.number for step in found.steps] == [0, 200, 1000]
    assert found.steps[1].folder() == tmp_path / "checkpoint-200"
    assert [step.number for step in Series.find(tmp_path, only=[1000, 0]).steps] == [0, 1000]


def test_folders_named_one_by_one_have_their_own_numbers_or_the_order_given(tmp_path: Path) -> None:
    late, early = checkpoint(tmp_path / "a" / "step20"), checkpoint(tmp_path / "b" / "step3")
    assert [(step.number, step.source) for step in Series.find(f"{late},{early}").steps] == [(3, str(early)), (20, str(late))]
    plain = checkpoint(tmp_path / "base")
    assert [(step.number, step.source) for step in Series.find(f"{plain}, {late}").steps] == [(0, str(plain)), (1, str(late))]


def test_a_steps_fingerprint_is_that_of_its_weights_and_configuration(tmp_path: Path) -> None:
    for number, weights in enumerate((b"a", b"a", b"b")):
        checkpoint(tmp_path / f"step{number}", weights)
    (tmp_path / "step1" / "optimizer.pt").write_bytes(b"other")
    first, same, other = (step.fingerprint for step in Series.find(tmp_path).steps)
    assert first == same != other


def test_branches_of_a_hub_model_are_steps_by_their_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    branches = [SimpleNamespace(name=name, target_commit=f"c-{name}") for name in ("main", "step1000", "step512", "step0")]
    monkeypatch.setattr(huggingface_hub, "list_repo_refs", lambda model: SimpleNamespace(branches=branches))
    asked: list[tuple[Any, Any]] = []

    def download(model: str, **options: Any) -> str:
        asked.append((model, options))
        return "/cache/here"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    steps = Series.find("someone/pythia").steps
    assert [(step.number, step.fingerprint) for step in steps] == [(0, "c-step0"), (512, "c-step512"), (1000, "c-step1000")]
    assert steps[1].folder() == Path("/cache/here")
    (model, options), *others = asked
    assert (model, options["revision"], others) == ("someone/pythia", "c-step512", [])
    assert not any("bin" in pattern or "pt" in pattern for pattern in options["allow_patterns"])  # nothing pickled is fetched


def test_what_is_no_series_is_refused_by_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path | str, words: str, **options: Any) -> None:
        with pytest.raises(ModelError, match=words):
            Series.find(source, **options)

    refused(tmp_path / "nowhere", "no such folder")
    (empty := tmp_path / "empty").mkdir()
    refused(empty, "holds no numbered checkpoints such as checkpoint-100.*no folder")
    checkpoint((one := tmp_path / "one") / "checkpoint-5")
    refused(one, r"has one step \(5\)")
    for name in ("run-1", "seed-2"):
        checkpoint((mixed := tmp_path / "mixed") / name)
    refused(mixed, r"checkpoints of 2 names \(run, seed\)")
    for name in ("step1", "step-1"):
        checkpoint((twice := tmp_path / "twice") / name)
    refused(twice, "holds step 1 twice")
    refused(f"{one / 'checkpoint-5'},{tmp_path / 'gone'}", "no such folder")
    refused(mixed / "run-1" / "config.json", "no such file|is a file")
    for number in (1, 2):
        checkpoint((two := tmp_path / "two") / f"checkpoint-{number}")
    refused(two, "has no step 7: it has 1, 2", only=[1, 7])
    monkeypatch.setattr(huggingface_hub, "list_repo_refs", lambda model: SimpleNamespace(branches=[]))
    refused("someone/model", "no branches step0, step1")


def test_a_hub_that_does_not_answer_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="the hub does not list its branches"):
        Series.find("someone/pythia")


def test_steps_of_different_trainings_are_refused_by_what_differs(tmp_path: Path) -> None:
    def series(name: str, *configs: dict[str, Any], words: tuple[str, ...] = ("a", "a")) -> Series:
        for number, (config, word) in enumerate(zip(configs, words, strict=True)):
            folder = checkpoint(tmp_path / name / f"step{number}", file="adapter_config.json" if "r" in config else "config.json")
            (folder / ("adapter_config.json" if "r" in config else "config.json")).write_text(json.dumps(config))
            (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {word: 0}}}))
        return Series.find(tmp_path / name)

    plain = {"model_type": "gpt2", "n_embd": 8}
    series("same", plain, {**plain, "transformers_version": "other"}).check_alike()
    for name, other, words, told in (
        ("width", {**plain, "n_embd": 16}, ("a", "a"), "step 1 has n_embd 16, step 0 has 8"),
        ("kind", {"r": 4, "base_model_name_or_path": "x"}, ("a", "a"), "step 1 has kind adapter, step 0 has whole model"),
        ("words", plain, ("a", "b"), "step 1 has vocabulary 1 words .*, step 0 has 1 words"),
    ):
        with pytest.raises(ModelError, match=f"is not of one training: {told}"):
            series(name, plain, other, words=words).check_alike()
    found = series("damaged", plain, plain)
    (found.steps[1].folder() / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"step '.*step1' cannot be read"):
        found.check_alike()
