"""Results that are there whole or not at all, and work that outlives a kill: the one way in which mechscope is resumable.

`Work` is a folder in which one request is worked on, a request being whatever decides the result. What a killed process left in it is
continued for the same request and for no other. `Artifact` is a result made in such a folder, hidden beside it, by one process: a rename makes
it appear. It keeps its request and the fingerprint of every file (`request.json`), so that it is made again neither when it is there nor,
unnoticed, from something else.

    with Artifact(folder / "arms", request) as arm:
        if not arm.done:
            state = arm.work.resume() or ...
            write_table(curve, arm.result / "curve.parquet")
    curve = read_table(arm.path / "curve.parquet")

With several ranks all enter and leave together; rank 0 does what concerns the disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from filelock import BaseFileLock

from mechscope import ranks
from mechscope.errors import RunError
from mechscope.store.differences import describe, differences
from mechscope.store.files import make_folder, plain, read_json, reading, refusal, write_json
from mechscope.store.hashing import hash_file, hash_if_there, hash_json, short
from mechscope.store.lock import LOCK, hold
from mechscope.store.tables import read_tensors, write_tensors

REQUEST = "request.json"
_RESULT, _REPLACED = "result", "replaced"


class Work:
    """A folder of scratch files and one checkpoint, which belongs to one request; it is there from `begin` to `discard`."""

    def __init__(self, folder: Path, request: Mapping[str, Any]) -> None:
        """Describe the folder; nothing is made before `begin`."""
        self.folder = folder
        self.request: dict[str, Any] = plain(dict(request))

    def begin(self, *, replace: bool = False) -> None:
        """Make the folder, or go on in it.

        Args:
            replace: throw away what was left of another request, instead of refusing the folder.

        Raises:
            RunError: the folder holds another request's work, or cannot be written.
        """
        make_folder(self.folder)
        if self.is_begun():
            return
        if (self.folder / REQUEST).is_file() and not replace:
            changes = describe(differences(read_json(self.folder / REQUEST), self.request))
            raise RunError(
                f"{self.folder} holds unfinished work with other settings or data ({changes}): delete it, or choose another output folder"
            )
        for left in self.folder.iterdir():
            if left.name != LOCK:
                _remove(left)
        write_json(self.request, self.folder / REQUEST)

    def is_begun(self) -> bool:
        """Tell whether the folder holds this very request's work."""
        return (self.folder / REQUEST).is_file() and not differences(read_json(self.folder / REQUEST), self.request)

    def path(self, name: str) -> Path:
        """Return a scratch folder of that name, made if missing; every rank calls this."""
        ranks.by_first(lambda: make_folder(self.folder / name))
        return self.folder / name

    def checkpoint(self, tensors: Mapping[str, torch.Tensor], meta: Any) -> None:
        """Keep partial state, atomically, in place of an earlier one; rank 0's is written.

        Args:
            tensors: named tensors, any dtypes.
            meta: JSON-able; lives in the same file, so that it always belongs to the tensors.

        Raises:
            RunError: the state could not be written; the earlier checkpoint is intact.
        """
        if ranks.is_first():
            write_tensors(tensors, self._checkpoint, meta=meta)

    def resume(self) -> tuple[dict[str, torch.Tensor], Any] | None:
        """Return the tensors and meta of the last checkpoint on every rank, or None where there is none; `RunError` where it is damaged."""
        return ranks.by_first(lambda: read_tensors(self._checkpoint) if self._checkpoint.exists() else None)

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"


class Artifact:
    """A context manager around the making of one result folder.

    Attributes:
        path: the folder, which appears when the body ends well.
        done: whether it is there already, so that the body can be skipped; known once entered.
        work: scratch and checkpoint, gone once the artifact is there.
        result: where the body writes what becomes the artifact; what a killed process wrote there is still there.
    """

    def __init__(self, parent: Path, request: Mapping[str, Any], *, name: str | None = None, replace: bool = False) -> None:
        """Describe the artifact; nothing happens before it is entered.

        Args:
            parent: the folder it is or will be in.
            request: JSON-able: everything that decides the result.
            name: the artifact's name; by default one made of the request's hash.
            replace: put the result in the place of one (or of unfinished work) with another request or with changed files, when it is
                finished; otherwise those are refused.
        """
        self.path = parent / (name or short(hash_json(request)))
        self.done = False
        self.work = Work(parent.absolute() / f".{self.path.name}.work", request)
        self.result = self.work.folder / _RESULT
        self._replace = replace
        self._lock: BaseFileLock | None = None

    def __enter__(self) -> Self:
        self.done = ranks.by_first(self._begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if error is None and not self.done:
                ranks.wait()  # others may still write in the folder that goes now
                ranks.by_first(self._publish)
        finally:
            self._release()

    def _begin(self) -> bool:
        with reading(self.path):
            problem = self._problem() if self.path.exists() else "is not there yet"
        if problem is None:
            # a kill between the renaming and the end leaves work behind
            if self.work.is_begun():
                self.work.discard()
            return True
        if self.path.exists() and not self._replace:
            raise RunError(f"{self.path} {problem}: choose another output folder, or delete it")
        make_folder(self.work.folder)
        self._lock = hold(self.work.folder)
        try:
            self.work.begin(replace=self._replace)
            make_folder(self.result)
        except BaseException:
            self._release()
            raise
        return False

    def _problem(self) -> str | None:
        """Say why what stands at `path` is not this artifact; None if it is, `RunError` where it is no artifact at all and may not be replaced."""
        record = read_json(self.path / REQUEST) if (self.path / REQUEST).is_file() else None
        if not isinstance(record, dict) or set(record) != {"request", "files"}:
            raise RunError(f"{self.path} exists already and is not a result of mechscope: choose another output folder")
        changes = differences(record["request"], self.work.request)
        if changes:
            return f"was made with other settings or data ({describe(changes)})"
        changed = [name for name, digest in record["files"].items() if hash_if_there(self.path / name) != digest]
        return f"was changed after it was finished ({', '.join(changed)})" if changed else None

    def _publish(self) -> None:
        files = {file.relative_to(self.result).as_posix(): hash_file(file) for file in sorted(self.result.rglob("*")) if file.is_file()}
        files.pop(REQUEST, None)
        write_json({"request": self.work.request, "files": files}, self.result / REQUEST)
        try:
            if self.path.exists():
                # set aside and not deleted: a kill while deleting would leave half a folder at `path`
                _remove(self.work.folder / _REPLACED)
                os.rename(self.path, self.work.folder / _REPLACED)
            os.rename(self.result, self.path)
        except OSError as error:
            raise refusal(self.path, error) from error
        # before the folder goes, because some network file systems keep a deleted file that is open
        self._release()
        self.work.discard()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
