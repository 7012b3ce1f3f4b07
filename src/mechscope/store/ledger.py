"""What a run and its stages both write: the manifest, the log, and the right to write them.

`manifest.json` is the only record of what is finished, and it is replaced by a rename, so that at any moment the folder is a state from which
to go on. Of several ranks only the first writes; the others follow it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from filelock import BaseFileLock

from mechscope.errors import RunError
from mechscope.store.files import make_folder, read_json, reading, refusal, write_json
from mechscope.store.lock import LOCK, hold
from mechscope.store.log import RunLog

MANIFEST, SETTINGS, LOG, WORK = "manifest.json", "study.yaml", "log.jsonl", "work"
# no stage may write these
OWN_FILES = frozenset({MANIFEST, SETTINGS, LOG, LOCK})


class Ledger:
    """The manifest and the log of one run.

    Attributes:
        path: the run folder.
        manifest: the content of `manifest.json`; empty where a run is just being made.
        code: fingerprint of the code that writes; empty for a reader.
        follows: whether this process is a rank that leaves the writing to the first.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], *, code: str = "", follows: bool = False) -> None:
        """Describe what a reader or a following rank has of a run; `claim` is for the process that writes."""
        self.path = path
        self.manifest = manifest
        self.code = code
        self.follows = follows
        self._lock: BaseFileLock | None = None
        self._log: RunLog | None = None

    @classmethod
    def claim(cls, path: Path) -> Self:
        """Take a run folder, made if missing, and read its manifest if it has one.

        Raises:
            RunError: the folder belongs to something else or to a live process, or cannot be written.
        """
        try:
            require_ours_or_empty(path)
        except OSError as error:
            raise refusal(path, error) from error
        make_folder(path)
        ledger = cls(path, {})
        ledger._lock = hold(path)
        try:
            if (path / MANIFEST).exists():
                ledger.manifest = read_manifest(path)
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a run's manifest; `RunError` where `path` is no run folder or the manifest is damaged."""
        return cls(path, read_manifest(path))

    def start_log(self) -> None:
        """Begin to write events; from now on the manifest may be saved."""
        self._log = RunLog(self.path / LOG)
        self._log.attach()

    @property
    def writes(self) -> bool:
        """Whether this process writes the folder: False for a reader, and on every rank but the first."""
        return self._log is not None

    @property
    def stages(self) -> dict[str, Any]:
        """The finished stages' records, by name."""
        return self.manifest["stages"]

    def save(self) -> None:
        """Write the manifest; a rank that follows leaves it to the first."""
        if not self.follows:
            self.require_writable()
            write_json(self.manifest, self.path / MANIFEST)

    def require_writable(self) -> RunLog:
        """Return the open log; `RunError` where the run is open for reading only."""
        if self._log is None:
            raise RunError(f"{self.path} is open for reading only: use RunFolder.open to write")
        return self._log

    def close(self) -> None:
        """End the log and let other writers in; closing twice does nothing."""
        if self._log is not None:
            self._log.close()
        if self._lock is not None:
            self._lock.release()
        self._log = self._lock = None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of the run folder `path`; `RunError` where there is none, it cannot be read, or it is not mechscope's."""
    with reading(path):
        if not (path / MANIFEST).is_file():
            raise RunError(f"{path} is not a run folder (it has no {MANIFEST}): give the folder that a study wrote with --out")
    manifest = read_json(path / MANIFEST)
    if not _is_manifest(manifest):
        raise RunError(f"{path / MANIFEST} is not a mechscope manifest: give the folder that a study wrote with --out")
    return manifest


def now() -> str:
    """Return the time as the manifest writes it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_manifest(value: Any) -> bool:
    if not isinstance(value, dict) or not {"kind", "settings", "environment", "stages"} <= set(value):
        return False
    stages = value["stages"]
    return isinstance(stages, dict) and all(_is_record(record) for record in stages.values())


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and {"inputs", "inputs_hash"} <= set(value) and isinstance(value.get("outputs"), dict)


def require_ours_or_empty(path: Path) -> None:
    """Raise `RunError` where `path` holds anything but a run, so that nobody's folder is written into."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file, not a folder: choose another place with --out")
    if (path / MANIFEST).exists():
        read_manifest(path)
    # with the lock but no manifest it is a run that was killed while it was being made
    elif path.exists() and not (path / LOCK).exists() and any(path.iterdir()):
        raise RunError(f"{path} is not empty and not a run folder: choose another place with --out; nothing was changed")
