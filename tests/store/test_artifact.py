"""An artifact is there whole or not at all, belongs to its request, and its making outlives a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mechscope.errors import RunError
from mechscope.store.artifact import Artifact, Work

REQUEST = {"seed": 0, "data": {"source": "d.jsonl"}, "modules": ("q", "v")}


class Killed(BaseException):
    """Stands for kill -9 inside one process: nothing catches it."""


def made(parent: Path, request: dict = REQUEST, text: str = "x", **options: Any) -> bool:
    """Make an artifact of one file and tell whether its body ran."""
    with Artifact(parent, request, **options) as artifact:
        if not artifact.done:
            (artifact.result / "deep").mkdir(exist_ok=True)
            (artifact.result / "deep" / "text").write_text(text)
    return not artifact.done


def begun(parent: Path, request: dict = REQUEST, **options: Any) -> None:
    """Kill the making of an artifact after a checkpoint and one file."""
    with pytest.raises(Killed), Artifact(parent, request, **options) as artifact:  # noqa: PT012 (what is killed is the body)
        artifact.work.checkpoint({"x": torch.arange(3)}, {"step": 1})
        (artifact.result / "half").write_text("x")
        raise Killed


def test_an_artifact_is_made_once(tmp_path):
    assert [made(tmp_path), made(tmp_path)] == [True, False]


def test_only_the_result_is_left(tmp_path):
    made(tmp_path, name="out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["deep", "request.json"]


def test_its_name_is_that_of_its_request_whatever_the_order_of_keys(tmp_path):
    names = {Artifact(tmp_path, request).path.name for request in (REQUEST, dict(reversed(REQUEST.items())))}
    assert len(names) == 1
    assert names != {Artifact(tmp_path, REQUEST | {"seed": 1}).path.name}


def test_before_it_is_finished_nothing_is_there_and_a_kill_is_continued(tmp_path):
    begun(tmp_path, name="out")
    assert not (tmp_path / "out").exists()
    with Artifact(tmp_path, REQUEST, name="out") as artifact:
        state = artifact.work.resume()
        assert state is not None
        assert state[0]["x"].tolist() == [0, 1, 2]
        assert state[1] == {"step": 1}
        assert (artifact.result / "half").read_text() == "x"
    assert (tmp_path / "out" / "half").exists()


def test_a_request_with_nan_is_continued(tmp_path):
    begun(tmp_path, {"x": float("nan")}, name="out")
    with Artifact(tmp_path, {"x": float("nan")}, name="out") as artifact:
        assert artifact.work.resume() is not None


def test_another_requests_result_is_refused_naming_what_differs(tmp_path):
    made(tmp_path, name="out")
    with pytest.raises(RunError, match=r"out was made with other settings or data \(seed: 0 -> 1\)"):
        made(tmp_path, REQUEST | {"seed": 1}, name="out")


def test_another_requests_unfinished_work_is_refused_and_stays(tmp_path):
    begun(tmp_path, name="out")
    with pytest.raises(RunError, match=r"unfinished work with other settings or data \(seed: 0 -> 1\)"):
        made(tmp_path, REQUEST | {"seed": 1}, name="out")
    with Artifact(tmp_path, REQUEST, name="out") as artifact:
        assert artifact.work.resume() is not None


def test_another_requests_result_is_replaced_only_when_the_new_one_is_finished(tmp_path):
    made(tmp_path, name="out", text="old")
    other = REQUEST | {"seed": 1}
    begun(tmp_path, other, name="out", replace=True)
    assert not made(tmp_path, name="out")
    assert made(tmp_path, other, name="out", text="new", replace=True)
    assert (tmp_path / "out" / "deep" / "text").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_requests_unfinished_work_is_thrown_away_where_it_may_be_replaced(tmp_path):
    begun(tmp_path, name="out")
    with Artifact(tmp_path, REQUEST | {"seed": 1}, name="out", replace=True) as artifact:
        assert artifact.work.resume() is None
        assert list(artifact.result.iterdir()) == []


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("edited")], ids=["missing", "edited"])
def test_a_changed_result_is_refused_or_made_again_but_never_taken_for_the_artifact(tmp_path, spoil):
    made(tmp_path)
    spoil(next(tmp_path.glob("*/deep/text")))
    with pytest.raises(RunError, match=r"was changed after it was finished \(deep/text\)"):
        made(tmp_path)
    assert made(tmp_path, replace=True)
    assert next(tmp_path.glob("*/deep/text")).read_text() == "x"


@pytest.mark.parametrize("file", ["notes.txt", "request.json"])
@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_of_something_else_is_never_replaced(tmp_path, file, replace):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text('{"mine": 1}')
    with pytest.raises(RunError, match="is not a result of mechscope"):
        made(tmp_path, name="out", replace=replace)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [file]


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("moment", ["first rename", "last rename", "removal"])
def test_a_kill_while_it_is_published_loses_nothing(tmp_path, monkeypatch, moment, replaces):
    if replaces:
        made(tmp_path, REQUEST | {"seed": 1}, name="out")
    renamed: list[object] = []

    def rename(old: Path, new: Path, rename=os.rename) -> None:
        if moment == "first rename" or (moment == "last rename" and new == tmp_path / "out"):
            raise Killed
        renamed.append(new)
        rename(old, new)

    def remove(path: Path, *_: object, **options: Any) -> None:
        if tmp_path / "out" in renamed:
            raise Killed
        kept(path, **options)

    kept = shutil.rmtree
    with monkeypatch.context() as patched:
        patched.setattr("os.rename", rename)
        if moment == "removal":
            patched.setattr("shutil.rmtree", remove)
        with pytest.raises(Killed):
            made(tmp_path, name="out", replace=True)
    assert made(tmp_path, name="out", replace=True) == (moment != "removal")
    assert (tmp_path / "out" / "deep" / "text").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


HOLD = """
import sys
from pathlib import Path
from typing import Any
from mechscope.store.artifact import Artifact
with Artifact(Path(sys.argv[1]), {}, name="out") as artifact:
    artifact.work.checkpoint({}, "kept")
    print(1, flush=True)
    input()
"""


def test_a_live_process_keeps_others_out_and_a_killed_one_leaves_its_work(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "1\n"
        with pytest.raises(RunError, match=f"is being written by process {process.pid}: wait"):
            made(tmp_path, {}, name="out")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with Artifact(tmp_path, {}, name="out") as artifact:
        assert artifact.work.resume() == ({}, "kept")


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot (write|read) .*file"):
        made(tmp_path / "file", name="out")


def test_work_of_another_request_is_refused(tmp_path):
    Work(tmp_path / "work", {"seed": 0}).begin()
    Work(tmp_path / "work", {"seed": 0}).begin()
    with pytest.raises(RunError, match="seed: 0 -> 1"):
        Work(tmp_path / "work", {"seed": 1}).begin()
