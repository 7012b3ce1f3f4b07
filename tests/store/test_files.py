"""A file is old or new, never half."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mechscope.errors import RunError
from mechscope.store.files import atomic, write_text


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic(path, size=3) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def fail_half_way(path: Path, error: BaseException) -> None:
    with atomic(path, size=3) as temporary:
        temporary.write_text("ne")
        raise error


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt()])
def test_an_exception_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)):
        fail_half_way(path, error)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_a_disk_that_fills_only_at_the_sync_keeps_the_old_file(tmp_path, monkeypatch):
    # network file systems answer ENOSPC as late as that
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RunError, match=rf"{path}: No space left on device \(about 0.0 MiB needed, [\d,.]+ MiB free\); the old file is intact"
    ):
        write_text("new", path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_a_refused_write_says_what_was_refused_and_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*file/below: .*file is a file, not a folder\. .* --out"):
        write_text("x", tmp_path / "file" / "below")


def test_a_new_file_has_the_permissions_of_any_other_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_text("x", tmp_path / "atomic")
    assert (tmp_path / "atomic").stat().st_mode == Path(tmp_path / "plain").stat().st_mode
