"""Files that are either old or new, never half.

`atomic` is the one way mechscope writes a file: the bytes go to a temporary file in the same folder, are forced to the disk, and take the
place of the old file by a rename, which POSIX makes indivisible. A kill, a full disk or an exception while writing leaves the old file as
it was. What the machine refuses becomes a `RunError` that names the file, the space needed and the space there is.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mechscope.errors import RunError

# a suffix of our own, so that cleaning up after a killed process never removes somebody else's .tmp
TEMPORARY = ".mechscope-tmp"

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic(path: Path, *, size: int) -> Iterator[Path]:
    """Give a temporary path to write to, which becomes `path` when the body ends well.

    Args:
        path: the file to make or to replace; missing parent folders are made.
        size: about how many bytes will be written, for the message when the disk is full.

    Yields:
        The temporary path, in the folder of `path`.

    Raises:
        RunError: the file could not be written; the old one, if any, is intact and the temporary one gone.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _force_to_disk(temporary)
        os.replace(temporary, path)
        # the rename itself lives in the folder: without this a power cut may undo it
        _force_to_disk(path.parent)
    except OSError as error:
        _discard(temporary)
        raise refusal(path, error, size=size) from error
    except BaseException:
        _discard(temporary)
        raise


def write_bytes(data: bytes, path: Path) -> None:
    """Write `data` to `path` atomically; see `atomic` for what is raised."""
    with atomic(path, size=len(data)) as temporary:
        temporary.write_bytes(data)


def write_text(text: str, path: Path) -> None:
    """Write `text` to `path` in UTF-8, atomically; see `atomic` for what is raised."""
    write_bytes(text.encode(), path)


def write_json(value: Any, path: Path) -> None:
    """Write a JSON-able value to `path`, indented and in the order given, atomically; see `atomic` for what is raised."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def plain(value: Any) -> Any:
    """Return a JSON-able value as it will be when read back (tuples as lists, keys as text), so that old and new compare equal."""
    return json.loads(json.dumps(value))


def make_folder(path: Path) -> None:
    """Make a folder and its parents if missing; `RunError` where that is refused."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(path, error) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses while the body reads `path`, or files below it, into a `RunError` that names the file."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise RunError(f"cannot read {error.filename or path}: {reason}. Make it readable, or give another folder.") from error


def read_json(path: Path) -> Any:
    """Read the JSON value in `path`; `RunError` where the file is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {path}: {error}. Restore the file from a copy; what stands beside it is as it was.") from error


def refusal(path: Path, error: OSError, *, size: int = 0) -> RunError:
    """Say in a `RunError` why `path` could not be written and what to do about it; `size` is the room in bytes that was needed."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    # making a folder where a file stands is answered with the puzzling "File exists"
    if isinstance(error, FileExistsError):
        reason = f"{error.filename} is a file, not a folder"
    if error.errno not in _OUT_OF_SPACE:
        return RunError(f"cannot write {path}: {reason}. Make the folder writable or choose another one with --out.")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    room = f"about {_mebibytes(size)} needed, {_mebibytes(shutil.disk_usage(there).free)} free"
    state = "the old file is intact" if path.exists() else "nothing half-written was left"
    return RunError(f"cannot write {path}: {reason} ({room}); {state}. Free some space and run the same command again: it continues.")


def _discard(temporary: Path) -> None:
    # the folder itself may be what could not be made
    if temporary.parent.is_dir():
        temporary.unlink(missing_ok=True)


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
