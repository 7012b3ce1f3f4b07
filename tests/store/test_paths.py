"""What a name that a user gives can be, and what is said of one at which nothing stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechscope.errors import ModelError
from mechscope.store.paths import absent, check_model_path, data_file_like, is_path, located, nearest


@pytest.mark.parametrize("name", ["/nope", "./nope", "../nope", "~/nope", ".hidden", "articles.jsonl", "data/ARTICLES.CSV"])
def test_a_name_that_can_only_be_a_path_is_known(name: str) -> None:
    assert is_path(name)


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "cnn_dailymail:3.0.0", "Qwen/Qwen2.5-0.5B"])
def test_an_id_on_the_hub_may_be_one(name: str) -> None:
    assert not is_path(name)
    assert absent(name) is None


def test_what_is_absent_is_said_with_what_stands_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tuned").mkdir(parents=True)
    (tmp_path / "articles.jsonl").write_text("{}")
    assert absent("runs/tuned") is None
    assert absent("/nope/model") == "no such folder"
    assert absent("nope.jsonl") == "no such file"
    assert absent("./runs/tuend") == "no such folder; did you mean runs/tuned?"
    # not only a path by its form, but nearly that of something that is here
    assert absent("runs/tuend") == "nothing there; did you mean runs/tuned?"
    assert absent("articles.jsnl") == "nothing there; did you mean articles.jsonl?"
    assert absent("tuend") is None
    assert data_file_like("article") == "articles.jsonl"
    assert data_file_like("xsum") is None


def test_only_a_slip_is_a_slip() -> None:
    assert nearest("newsrom", ["newsroom"]) == "newsroom"
    assert nearest("xsum", ["newsroom"]) is None


def test_the_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert located("~/model") == str(tmp_path / "model")
    assert located("gpt2") == "gpt2"


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may read anything, so the refusal is played
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ModelError, match=rf"model '{tmp_path}' cannot be read: Permission denied: make the folder readable"):
        check_model_path(str(tmp_path))
