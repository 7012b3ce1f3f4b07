"""The run folder: everything a study was asked, found and wrote, in one place that can be continued and checked (idea 10).

    study.yaml      the resolved settings             tables/*.parquet        tidy tables
    manifest.json   what the result depends on        tensors/*.safetensors
    log.jsonl       what happened when                figures/, report.html
    work/           partial state of unfinished stages

The same command on the same folder continues it; other settings are refused, field by field. `manifest.json` is the only record of what is
finished, and every file is replaced by a rename (see `files`), so that at any moment the folder is a state from which to go on. A reader
(`RunFolder.read`, `verify`) never writes. Of several ranks only the first writes; the others follow it (on several machines the folder must be on
a file system that all of them see).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import pandas as pd
import torch
import yaml

from mechscope import ranks
from mechscope.errors import RunError
from mechscope.store.differences import describe, differences
from mechscope.store.environment import environment
from mechscope.store.files import TEMPORARY, make_folder, plain, read_json, refusal, write_json, write_text
from mechscope.store.hashing import hash_file, hash_json
from mechscope.store.lock import LOCK, hold
from mechscope.store.log import RunLog, read_log
from mechscope.store.stage import WORK, Stage, found_hash, now
from mechscope.store.tables import read_table, read_tensors

logger = logging.getLogger(__name__)

FOLDERS = ("tables", "tensors", "figures")
MANIFEST, SETTINGS, LOG = "manifest.json", "study.yaml", "log.jsonl"
MANIFEST_FIELDS = frozenset({"kind", "created", "settings", "environment", "continued", "stages"})


class RunFolder:
    """A run folder, open for writing (`open`, a context manager) or only for reading (`read`).

    Attributes:
        path: the folder, as given.
        settings: the resolved settings, as they were when the run began.
        manifest: the content of `manifest.json`.
        writes: whether this process writes the folder; False for a reader, and on every rank but the first.
    """

    OWN_FILES: ClassVar = frozenset({MANIFEST, SETTINGS, LOG, LOCK})

    def __init__(self, path: Path, settings: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Describe a run that is read; use `open` or `read`."""
        self.path = path
        self.settings = settings
        self.manifest = manifest
        self.code = ""
        self.writes = False
        self._lock: FileIO | None = None
        self._log: RunLog | None = None
        self._follows = False

    @classmethod
    def open(cls, path: str | Path, settings: Mapping[str, Any], *, kind: str, volatile: Sequence[str] = ("device",)) -> Self:
        """Begin a run, or continue the one that is there.

        Args:
            path: the run folder; made if missing.
            settings: resolved and JSON-able; written to `study.yaml`.
            kind: which study this is (`summarization`, `diff`).
            volatile: dotted names of settings that may differ when continuing, because the result does not hang on them.

        Returns:
            The run, locked against other writers until `close` or the end of `with`.

        Raises:
            RunError: the folder belongs to something else, to a run with other settings or to a live process, or cannot be written.
        """
        path = Path(path)
        resolved: dict[str, Any] = plain(dict(settings))
        opened: list[Self] = []

        def begin() -> tuple[dict[str, Any], dict[str, Any], str]:
            run = cls._opened(path, resolved, kind, volatile)
            opened.append(run)
            return run.settings, run.manifest, run.code

        kept, manifest, code = ranks.by_first(begin)
        if opened:
            return opened[0]
        run = cls(path, kept, manifest)
        run.code, run._follows = code, True
        return run

    @classmethod
    def _opened(cls, path: Path, resolved: dict[str, Any], kind: str, volatile: Sequence[str]) -> Self:
        try:
            _require_ours_or_empty(path)
        except OSError as error:
            raise refusal(path, error) from error
        make_folder(path)
        run = cls(path, resolved, _new_manifest(resolved, kind))
        run._lock = hold(path)
        try:
            if (path / MANIFEST).exists():
                run.settings, run.manifest = _read_settings(path), _read_manifest(path)
                run._require_same(resolved, kind, volatile)
            run._begin()
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a run without locking or changing it.

        Raises:
            RunError: `path` is not a run folder, or its manifest or settings are damaged.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        return cls(path, _read_settings(path), manifest)

    @property
    def kind(self) -> str:
        """Which study this is."""
        return self.manifest["kind"]

    @property
    def log(self) -> RunLog:
        """The open diary; `RunError` where the run is open for reading only."""
        return self._require_writable()

    def stage(self, name: str, inputs: Mapping[str, Any], *, alone: bool = False) -> Stage:
        """Return the stage `name`, to be entered with `with`; see `Stage`.

        Args:
            name: letters, digits and `_.=+-`.
            inputs: JSON-able: fingerprints and values that decide the stage's result; other inputs run it again.
            alone: of several ranks, only the first works on it.
        """
        return Stage(self, name, plain(inputs), alone=alone)

    def record(self, key: str, value: Any) -> None:
        """Note in the manifest what the result depends on: seeds, fingerprints of models and data.

        Args:
            key: a name of its own at the manifest's top level (`models`, `data`, `seeds`).
            value: JSON-able.
        """
        if not self._follows:
            self._require_writable()
        if key in MANIFEST_FIELDS:
            raise ValueError(f"{key!r} is a field of the manifest itself: record under another name")
        value = plain(value)
        changed = differences({key: self.manifest.get(key, value)}, {key: value})
        if changed:
            logger.warning("changed since the run began: %s", describe(changed))
        self.manifest[key] = value
        self.save()

    def table(self, name: str) -> pd.DataFrame:
        """Read `tables/<name>.parquet`; `RunError` where it is missing or damaged."""
        return read_table(self.path / "tables" / f"{name}.parquet")

    def tensors(self, name: str) -> tuple[dict[str, torch.Tensor], Any]:
        """Read `tensors/<name>.safetensors` and its meta; `RunError` where it is missing or damaged."""
        return read_tensors(self.path / "tensors" / f"{name}.safetensors")

    def has_table(self, name: str) -> bool:
        """Tell whether a finished stage wrote the table `name`."""
        return any(f"tables/{name}.parquet" in stage["outputs"] for stage in self.manifest["stages"].values())

    def events(self) -> list[dict[str, Any]]:
        """Return what happened, from `log.jsonl`."""
        return read_log(self.path / LOG)

    def save(self) -> None:
        """Write the manifest; called by the run's and its stages' own methods."""
        if self._follows:
            return
        self._require_writable()
        write_json(self.manifest, self.path / MANIFEST)

    def close(self) -> None:
        """End the diary and let other writers in; closing twice does nothing."""
        for held in (self._log, self._lock):
            if held is not None:
                held.close()
        self._log = self._lock = None
        self.writes = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _require_writable(self) -> RunLog:
        if self._log is None:
            raise RunError(f"{self.path} is open for reading only: use RunFolder.open to write")
        return self._log

    def _require_same(self, settings: Mapping[str, Any], kind: str, volatile: Sequence[str]) -> None:
        """Raise `RunError` unless the run was begun with this kind and these settings."""
        if hash_json(self.settings) != self.manifest["settings"]:
            raise RunError(f"{self.path / SETTINGS} was edited after the run began: undo the edit, or choose another folder with --out")
        found = differences({"kind": self.kind}, {"kind": kind}) + differences(self.settings, settings)
        refused = [each for each in found if not any(f"{each.name}.".startswith(f"{name}.") for name in volatile)]
        if refused:
            advice = "choose another folder with --out, or delete this one to start again"
            raise RunError(f"{self.path} is a run with other settings: {describe(refused)}. To go on, {advice}.")

    def _begin(self) -> None:
        """Make the locked run writable, tidy up after a killed process, and note what is different today."""
        # a kill can leave a temporary file beside any file
        for leftover in self.path.rglob(f".*{TEMPORARY}"):
            leftover.unlink()
        for folder in FOLDERS:
            make_folder(self.path / folder)
        self._log = RunLog(self.path / LOG)
        self._log.attach()
        self.writes = True
        today = environment()
        self.code = today["code"]
        if "environment" not in self.manifest:
            self.manifest["environment"] = today
            # non-ASCII text stays escaped: PyYAML reads an unescaped U+0085 back as something else
            write_text(yaml.safe_dump(self.settings, sort_keys=False), self.path / SETTINGS)
            # the manifest last: where it is, the settings are
            self.save()
            logger.info("run begins", extra={"data": {"kind": self.kind}})
            return
        logger.info("run continues")
        changed = differences(self.manifest["environment"], today)
        if changed:
            only_machine = all(each.name.startswith("machine.") for each in changed)
            logger.log(logging.INFO if only_machine else logging.WARNING, "%s began on something else: %s", self.path, describe(changed))
            self.manifest.setdefault("continued", []).append({"time": now(), "changed": [str(each) for each in changed]})
            self.save()


def verify(path: str | Path) -> pd.DataFrame:
    """Hash a run's files again and compare with what its manifest recorded; nothing is written.

    Returns:
        One row per file: `file` (relative to the run), `stage`, `status` ("ok", "changed", "missing", or "unrecorded": there, but no
        finished stage's output), `expected` and `found` (sha256, None where there is none). Of `study.yaml` the settings are hashed, not
        the spelling.

    Raises:
        RunError: `path` is not a run folder.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    recorded = [(name, stage, digest) for stage, record in manifest["stages"].items() for name, digest in record["outputs"].items()]
    rows = [(SETTINGS, "", manifest["settings"], _settings_hash(path))]
    rows += [(name, stage, digest, found_hash(path / name)) for name, stage, digest in recorded]
    known = {name for name, _, _ in recorded} | RunFolder.OWN_FILES
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and name.as_posix() not in known:
            rows.append((name.as_posix(), name.parts[1] if name.parts[0] == WORK else "", None, hash_file(file)))
    table = pd.DataFrame(rows, columns=["file", "stage", "expected", "found"])
    table.insert(2, "status", [_status(expected, found) for expected, found in zip(table["expected"], table["found"], strict=True)])
    return table


def _status(expected: str | None, found: str | None) -> str:
    if pd.isna(expected):
        return "unrecorded"
    if pd.isna(found):
        return "missing"
    return "ok" if expected == found else "changed"


def _settings_hash(path: Path) -> str | None:
    try:
        return hash_json(_read_settings(path))
    except RunError:
        return found_hash(path / SETTINGS)


def _new_manifest(settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {"kind": kind, "created": now(), "settings": hash_json(settings), "stages": {}}


def _read_manifest(path: Path) -> dict[str, Any]:
    if not (path / MANIFEST).is_file():
        raise RunError(f"{path} is not a run folder (it has no {MANIFEST}): give the folder that a study wrote with --out")
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or not {"kind", "settings", "environment", "stages"} <= set(manifest):
        raise RunError(f"{path / MANIFEST} is not a mechscope manifest: give the folder that a study wrote with --out")
    return manifest


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load((path / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"cannot read {path / SETTINGS}: {error}. Restore the file, or choose another folder with --out.") from error
    if not isinstance(settings, dict):
        raise RunError(f"{path / SETTINGS} holds no settings: restore the file, or choose another folder with --out")
    return settings


def _require_ours_or_empty(path: Path) -> None:
    """Raise `RunError` where `path` holds anything but a run, so that nobody's folder is written into."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file, not a folder: choose another place with --out")
    if (path / MANIFEST).exists():
        _read_manifest(path)
    # with the lock but no manifest it is a run that was killed while it was being made
    elif path.exists() and not (path / LOCK).exists() and any(path.iterdir()):
        raise RunError(f"{path} is not empty and not a run folder: choose another place with --out; nothing was changed")
