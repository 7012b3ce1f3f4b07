"""A run folder belongs to its settings, its one writer, and nobody else's files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mechscope.errors import RunError
from mechscope.store.environment import environment
from mechscope.store.run import RunFolder, verify

SETTINGS = {"base": "./models/gpt2", "data": {"source": "d.jsonl", "limit": None}, "seeds": (0, 1), "device": "cpu", "lr": 3e-5}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture
def path(tmp_path):
    """Return the path of a finished run with one stage."""
    with RunFolder.open(tmp_path / "run", SETTINGS, kind="diff") as run, run.stage("difference", {"data": "abc"}) as stage:
        stage.write_table("heads", pd.DataFrame({"layer": [0, 1]}))
        stage.write_text("report.html", "<p>")
    return tmp_path / "run"


def test_settings_are_kept_as_given(path):
    assert yaml.safe_load((path / "study.yaml").read_text()) == SETTINGS | {"seeds": [0, 1]}


def test_equal_settings_continue_and_keep_what_is_finished(path):
    with RunFolder.open(path, dict(reversed(SETTINGS.items())), kind="diff") as run:
        assert list(run.manifest["stages"]) == ["difference"]


def test_other_things_are_refused_field_by_field_and_change_nothing(path):
    before = snapshot(path)
    other = SETTINGS | {"data": {"source": "e.jsonl", "limit": None, "split": "test"}, "lr": 1e-4, "device": "cuda"}
    with pytest.raises(RunError) as refusal:
        RunFolder.open(path, other, kind="diff", identity=("base", "data"))
    message = str(refusal.value)
    assert "what it has -> what is given" in message
    assert 'data.source: "d.jsonl" -> "e.jsonl"; ' in message
    assert 'data.split: absent -> "test"' in message
    assert "--out, or delete this one" in message
    assert not {"device", "base", "limit", "seeds", "lr"} & set(message.replace(".", " ").replace(":", " ").split())
    assert {k: v for k, v in snapshot(path).items() if k != ".mechscope.lock"} == {
        k: v for k, v in before.items() if k != ".mechscope.lock"
    }


def test_another_kind_of_study_is_refused(path):
    with pytest.raises(RunError, match='kind: "diff" -> "summarization"'):
        RunFolder.open(path, SETTINGS, kind="summarization")


def test_a_setting_that_says_nothing_of_what_is_studied_may_change_and_the_change_is_kept(path):
    changed = SETTINGS | {"lr": 1e-4, "device": "cuda"}
    RunFolder.open(path, changed, kind="diff", identity=("base", "data")).close()
    run = RunFolder.read(path)
    assert run.settings == changed | {"seeds": [0, 1]}
    assert list(run.manifest["stages"]) == ["difference"]
    assert run.manifest["continued"][0]["changed"] == ['settings.device: "cpu" -> "cuda"', "settings.lr: 3e-05 -> 0.0001"]
    assert any("settings changed: settings.device" in event["message"] for event in run.events())
    assert set(verify(path)["status"]) == {"ok"}


def test_a_part_of_the_identity_is_refused_and_a_field_whose_name_begins_like_it_is_not(tmp_path):
    settings = {"data": {"limit": 1}, "database": 1}
    RunFolder.open(tmp_path / "run", settings, kind="diff", identity=("data",)).close()
    RunFolder.open(tmp_path / "run", settings | {"database": 2}, kind="diff", identity=("data",)).close()
    with pytest.raises(RunError, match=r"data\.limit: 1 -> 2"):
        RunFolder.open(tmp_path / "run", settings | {"data": {"limit": 2}}, kind="diff", identity=("data",))


def test_only_the_stages_whose_inputs_changed_run_again(tmp_path):
    def ran(lr: float) -> list[str]:
        again = []
        with RunFolder.open(tmp_path / "run", {"lr": lr, "seed": 0}, kind="diff") as run:
            for name, inputs in (("read", {"seed": 0}), ("train", {"lr": lr})):
                with run.stage(name, inputs) as stage:
                    if not stage.done:
                        stage.write_text(f"{name}.txt", name)
                        again.append(name)
        return again

    assert [ran(1e-4), ran(1e-3), ran(1e-3)] == [["read", "train"], ["train"], []]


@pytest.mark.parametrize("goes_on_with", [SETTINGS | {"lr": 1e-4}, SETTINGS, SETTINGS | {"lr": 1e-2}], ids=["new", "old", "third"])
def test_a_kill_while_settings_change_leaves_a_run_that_goes_on(path, monkeypatch, goes_on_with):
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mechscope.store.run.write_text", die)
        with pytest.raises(KeyboardInterrupt):
            RunFolder.open(path, SETTINGS | {"lr": 1e-4}, kind="diff")
    RunFolder.open(path, goes_on_with, kind="diff").close()
    assert RunFolder.read(path).settings["lr"] == goes_on_with["lr"]
    assert set(verify(path)["status"]) == {"ok"}


def test_edited_settings_are_noticed(path):
    study = path / "study.yaml"
    study.write_text(study.read_text().replace("d.jsonl", "e.jsonl"))
    with pytest.raises(RunError, match=r"study\.yaml was edited"):
        RunFolder.open(path, SETTINGS, kind="diff")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


# no deadline: each example waits for the disk
@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text(), values, max_size=4))
def test_any_settings_survive_the_way_through_yaml(tmp_path_factory, given_settings):
    path = tmp_path_factory.mktemp("runs") / "run"
    RunFolder.open(path, given_settings, kind="diff").close()
    RunFolder.open(path, given_settings, kind="diff").close()
    assert RunFolder.read(path).settings == given_settings


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
def test_a_folder_with_other_things_is_refused_and_not_touched(tmp_path, name):
    (tmp_path / name).write_text('{"name": "a web app"}')
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match=r"--out"):
        RunFolder.open(tmp_path, SETTINGS, kind="diff")
    assert snapshot(tmp_path) == before


def test_a_file_is_not_a_run_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file, not a folder"):
        RunFolder.open(tmp_path / "file", SETTINGS, kind="diff")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot write .*file/run: Not a directory"):
        RunFolder.open(tmp_path / "file" / "run", SETTINGS, kind="diff")


def test_a_folder_without_write_permission_is_named(tmp_path, monkeypatch):
    # root may write anywhere, so the refusal is played
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunError, match=r"cannot write .*run: Permission denied\. Make the folder writable"):
        RunFolder.open(tmp_path / "run", SETTINGS, kind="diff")


def test_a_run_killed_while_it_was_made_can_be_made(tmp_path):
    (tmp_path / ".mechscope.lock").write_text("1")
    (tmp_path / "study.yaml").write_text("ba")
    RunFolder.open(tmp_path, SETTINGS, kind="diff").close()
    assert RunFolder.read(tmp_path).settings["base"] == "./models/gpt2"


def test_a_second_writer_is_refused_until_the_first_has_closed(path):
    hold = "import sys; from mechscope.store.run import RunFolder; r = RunFolder.open(sys.argv[1], {}, kind='x'); print(1, flush=True); input()"
    other = path.parent / "other"
    with subprocess.Popen([sys.executable, "-c", hold, str(other)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "1\n"
        with pytest.raises(RunError, match=f"is being written by process {process.pid}: wait"):
            RunFolder.open(other, {}, kind="x")
        process.kill()
        process.wait()
    RunFolder.open(other, {}, kind="x").close()


def test_one_process_cannot_open_a_run_twice(path):
    with RunFolder.open(path, SETTINGS, kind="diff"), pytest.raises(RunError, match="is being written"):
        RunFolder.open(path, SETTINGS, kind="diff")


def test_reading_changes_nothing_and_cannot_write(path):
    before = snapshot(path)
    run = RunFolder.read(path)
    assert run.table("heads")["layer"].tolist() == [0, 1]
    assert run.has_table("heads")
    assert not run.has_table("claims")
    for write in (run.ledger.save, lambda: run.record("seeds", [0]), lambda: run.stage("late", {}).__enter__()):
        with pytest.raises(RunError, match="open for reading only"):
            write()
    assert snapshot(path) == before


def test_only_a_run_can_be_read(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        RunFolder.read(tmp_path)


def test_the_manifest_tells_what_the_result_depends_on_and_not_who_made_it(path):
    with RunFolder.open(path, SETTINGS, kind="diff") as run:
        run.record("models", {"base": "0123"})
    manifest = json.loads((path / "manifest.json").read_text())
    versions = manifest["environment"]["dependencies"]
    assert manifest["models"] == {"base": "0123"}
    assert versions["transformers"].startswith("5.")
    assert "pytest" not in versions
    assert str(Path.home()) not in json.dumps(manifest)
    assert str(path.parent) not in json.dumps(manifest)


def test_the_manifests_own_fields_cannot_be_recorded_over(path):
    with RunFolder.open(path, SETTINGS, kind="diff") as run, pytest.raises(ValueError, match="'stages'"):
        run.record("stages", {})


def test_a_run_continued_by_other_code_says_so(path, monkeypatch, caplog):
    changed = environment() | {"code": "other"}
    monkeypatch.setattr("mechscope.store.run.environment", lambda: changed)
    RunFolder.open(path, SETTINGS, kind="diff").close()
    [note] = RunFolder.read(path).manifest["continued"]
    assert note["changed"][0].startswith("code: ")
    assert [record.levelname for record in caplog.records if "began on something else" in record.message] == ["WARNING"]


def statuses(path: Path) -> dict[str, str]:
    found = verify(path)
    return dict(zip(found["file"], found["status"], strict=True))


def test_an_untouched_run_verifies(path):
    assert statuses(path) == {"study.yaml": "ok", "tables/heads.parquet": "ok", "report.html": "ok"}


def test_tampering_is_found(path):
    study, table = path / "study.yaml", path / "tables" / "heads.parquet"
    study.write_text(study.read_text().replace("3.0e-05", "4.0e-05"))
    content = bytearray(table.read_bytes())
    content[20] ^= 1
    table.write_bytes(bytes(content))
    (path / "report.html").unlink()
    (path / "tables" / "extra.parquet").write_bytes(b"")
    assert statuses(path) == {
        "study.yaml": "changed",
        "tables/heads.parquet": "changed",
        "report.html": "missing",
        "tables/extra.parquet": "unrecorded",
    }


@pytest.mark.parametrize(("edit", "status"), [("{broken: [", "changed"), ("when: 2026-01-01", "changed"), (None, "missing")])
def test_damaged_settings_are_a_finding_not_a_failure(path, edit, status):
    (path / "study.yaml").unlink()
    if edit:
        (path / "study.yaml").write_text(edit)
    assert statuses(path)["study.yaml"] == status


def test_a_comment_in_the_settings_is_no_change(path):
    study = path / "study.yaml"
    study.write_text("# for the seminar\n" + study.read_text())
    assert statuses(path)["study.yaml"] == "ok"


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b'{"kind": 1, "settings": 1, "environment": 1, "stages": []}',
        b'{"kind": 1, "settings": 1, "environment": 1, "stages": {"s": {}}}',
    ],
)
def test_a_damaged_manifest_is_named_in_one_line(path, content):
    (path / "manifest.json").write_bytes(content)
    for read in (verify, RunFolder.read):
        with pytest.raises(RunError, match=r"^[^\n]*manifest\.json[^\n]*$") as error:
            read(path)
        # the tables beside it are whole: nobody is told to throw them away
        assert "delete" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named_in_one_line(path, monkeypatch):
    # root may read anything, so the refusal is played
    def refuse(file: Path) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("mechscope.store.hashing.hash_file", refuse)
    found = verify(path).set_index("file")
    assert found.loc["report.html", "problem"] == "Permission denied"
    assert found["status"].to_dict() == {"study.yaml": "ok", "tables/heads.parquet": "unreadable", "report.html": "unreadable"}


def test_settings_that_cannot_be_read_are_named_in_one_line(path):
    (path / "study.yaml").write_text("base: [\n  broken: {")
    with pytest.raises(RunError, match=r"^cannot read [^\n]*study\.yaml[^\n]*$"):
        RunFolder.read(path)
