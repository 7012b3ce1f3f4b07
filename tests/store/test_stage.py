"""A stage is done once for its inputs, survives a kill, and keeps to its own files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from mechscope.errors import RunError
from mechscope.store.run import RunFolder, verify

# counts 20 batches into a running sum; in a run told to wait, stops for its killer after the checkpoint of batch 7
SUM_BATCHES = """
import sys, time
import pandas as pd, torch
from mechscope.store.run import RunFolder
path, wait = sys.argv[1], sys.argv[2] == "wait"
with RunFolder.open(path, {"batches": 20}, kind="test") as run, run.stage("sum", {"data": "abc"}) as stage:
    tensors, position = stage.resume() or ({"sum": torch.zeros(3, dtype=torch.float64)}, 0)
    torch.save(position, stage.path("trainer") / f"from-{position}")
    for batch in range(position, 20):
        print(batch, flush=True)
        torch.manual_seed(batch)
        tensors["sum"] += torch.randn(3, dtype=torch.float64)
        stage.checkpoint(tensors, batch + 1)
        if wait and batch == 7:
            (run.path / "tables" / ".half.parquet.mechscope-tmp").write_text("ha")
            print("ready", flush=True)
            time.sleep(600)
    stage.write_table("sums", pd.DataFrame({"sum": tensors["sum"].numpy()}))
"""


def sum_batches(path: Path) -> list[str]:
    answer = subprocess.run([sys.executable, "-c", SUM_BATCHES, path, "run"], capture_output=True, text=True, check=True)
    return answer.stdout.split()


def test_a_killed_stage_continues_at_its_batch_and_ends_with_the_same_bytes(tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    with subprocess.Popen([sys.executable, "-c", SUM_BATCHES, killed, "wait"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert sum_batches(killed) == [str(batch) for batch in range(8, 20)]
    assert len(sum_batches(undisturbed)) == 20
    assert (killed / "tables" / "sums.parquet").read_bytes() == (undisturbed / "tables" / "sums.parquet").read_bytes()
    assert set(verify(killed)["status"]) == {"ok"}


@pytest.fixture
def run(tmp_path):
    with RunFolder.open(tmp_path / "run", {}, kind="test") as run:
        yield run


def fail(run: RunFolder, inputs: dict, tensors: dict[str, torch.Tensor], meta: object) -> None:
    """Stop the stage `s` by an exception after it kept a checkpoint, scratch and one output."""
    with pytest.raises(ZeroDivisionError), run.stage("s", inputs) as stage:  # noqa: PT012 (the stage is what is left by the exception)
        stage.checkpoint(tensors, meta)
        (stage.path("trainer") / "state").write_text("x")
        stage.write_text("a.txt", "x")
        raise ZeroDivisionError


def write(run: RunFolder, inputs: dict, value: int = 1, table: str = "t") -> bool:
    """Run the stage `s` and tell whether its body ran."""
    with run.stage("s", inputs) as stage:
        if not stage.done:
            stage.write_table(table, pd.DataFrame({"value": [value]}))
    return not stage.done


def test_a_finished_stage_is_not_run_again_even_by_the_next_process(tmp_path):
    for expected in (True, False):
        with RunFolder.open(tmp_path / "run", {}, kind="test") as run:
            assert write(run, {"data": "abc"}) is expected


def test_a_done_stage_tells_the_same_outputs_as_when_it_ran(run):
    with run.stage("s", {}) as first:
        first.write_text("a.txt", "x")
    with run.stage("s", {}) as again:
        pass
    assert first.outputs == again.outputs == {"a.txt": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}


def test_other_inputs_run_it_again_and_the_log_says_which(run):
    write(run, {"data": "abc", "model": "m"}, 1)
    assert write(run, {"data": "abd", "model": "m"}, 2)
    assert run.table("t")["value"].tolist() == [2]
    assert any('its inputs changed (data: "abc" -> "abd")' in event["message"] for event in run.events())


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"edited")], ids=["missing", "edited"])
def test_a_spoilt_output_runs_it_again(run, spoil):
    write(run, {})
    spoil(run.path / "tables" / "t.parquet")
    assert write(run, {})
    assert run.table("t")["value"].tolist() == [1]


def test_a_failed_stage_is_not_recorded_and_keeps_its_checkpoint(run):
    fail(run, {}, {"x": torch.arange(3)}, {"step": 1})
    assert run.manifest["stages"] == {}
    with run.stage("s", {}) as stage:
        resumed = stage.resume()
    assert resumed
    assert resumed[0]["x"].tolist() == [0, 1, 2]
    assert resumed[1] == {"step": 1}
    assert not (run.path / "work" / "s").exists()


def test_a_checkpoint_of_other_inputs_is_never_continued(run):
    fail(run, {"data": 1}, {}, "of 1")
    with run.stage("s", {"data": 2}) as stage:
        assert stage.resume() is None
        assert list(stage.path("trainer").iterdir()) == []


def test_a_table_that_other_inputs_no_longer_make_is_removed(run):
    write(run, {"data": 1}, table="old")
    write(run, {"data": 2}, table="new")
    assert [path.name for path in (run.path / "tables").iterdir()] == ["new.parquet"]


def test_scratch_goes_when_the_stage_ends_and_so_cannot_be_an_output(run):
    with run.stage("s", {}) as stage:
        (stage.path("trainer") / "deep").mkdir()
        (stage.path("trainer") / "deep" / "weights").write_text("x")
        with pytest.raises(RunError, match=r"trainer/deep/weights is scratch, which goes when its stage ends"):
            stage.add(stage.path("trainer"))
        stage.write_text("a.txt", "x")
    assert list((run.path / "work").iterdir()) == []
    assert set(verify(run.path)["status"]) == {"ok"}


def test_scratch_is_inside_the_run(run):
    with run.stage("s", {}) as stage, pytest.raises(RunError, match="outside the run"):
        stage.path("../../../../elsewhere")


def test_a_models_folder_written_by_another_library_becomes_an_output(run):
    folder = run.path / "models" / "tuned"
    with run.stage("s", {}) as stage:
        folder.mkdir(parents=True)
        (folder / "adapter.safetensors").write_bytes(b"weights")
        stage.add(folder)
    assert list(stage.outputs) == ["models/tuned/adapter.safetensors"]
    (folder / "adapter.safetensors").write_bytes(b"Weights")
    with run.stage("s", {}) as stage:
        assert not stage.done


@pytest.mark.parametrize("name", ["../escaped.txt", "figures/../../escaped.txt", "/tmp/mechscope-escaped.txt", "..", "link/escaped.txt"])
def test_nothing_is_written_outside_the_run(run, tmp_path, name):
    (run.path / "link").symlink_to(tmp_path, target_is_directory=True)
    with run.stage("s", {}) as stage, pytest.raises(RunError, match="outside the run"):
        stage.write_text(name, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_work_folder_linked_out_of_the_run_is_not_tidied(run, tmp_path):
    (tmp_path / "elsewhere" / "s" / "precious").mkdir(parents=True)
    (run.path / "work").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(RunError, match="outside the run"):
        write(run, {})
    assert (tmp_path / "elsewhere" / "s" / "precious").exists()


def test_a_manifest_made_by_somebody_else_cannot_delete_files_outside(run, tmp_path):
    (tmp_path / "precious").write_text("x")
    write(run, {"data": 1})
    run.manifest["stages"]["s"]["outputs"]["../precious"] = "0"
    with pytest.raises(RunError, match="outside the run"):
        write(run, {"data": 2})
    assert (tmp_path / "precious").exists()


def test_the_runs_own_files_and_other_stages_outputs_are_not_written_over(run):
    write(run, {})
    with run.stage("other", {}) as stage:
        with pytest.raises(RunError, match=r"manifest\.json is kept by the run itself"):
            stage.write_json("manifest.json", {})
        with pytest.raises(RunError, match=r"tables/t\.parquet is an output of stage s"):
            stage.write_table("t", pd.DataFrame({"value": [9]}))
    assert run.table("t")["value"].tolist() == [1]


def test_a_done_stage_cannot_be_written(run):
    write(run, {})
    with run.stage("s", {}) as stage, pytest.raises(RuntimeError, match=r"only if not stage\.done"):
        stage.write_table("t", pd.DataFrame({"value": [9]}))


def test_a_stage_name_is_not_a_path(run):
    with pytest.raises(ValueError, match="letters, digits"):
        run.stage("../s", {})


def test_seconds_of_a_continued_stage_are_summed(run, monkeypatch):
    clock = iter([0.0, 100.0, 200.0, 200.0, 207.0])
    monkeypatch.setattr("mechscope.store.stage.time.monotonic", lambda: next(clock))
    fail(run, {}, {}, None)
    with run.stage("s", {}) as stage:
        stage.resume()
    assert run.manifest["stages"]["s"]["seconds"] == 107.0


def test_events_carry_the_stage_they_happened_in(run):
    write(run, {})
    assert [(event["stage"], event["message"]) for event in run.events()] == [
        (None, "run begins"),
        ("s", "stage s starts: not finished before"),
        ("s", "stage s finished"),
    ]
