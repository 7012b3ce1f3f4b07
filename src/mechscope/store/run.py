"""The run folder: settings, tables, tensors, figures and page of one study, in one place that can be continued and checked (idea 10).

    study.yaml      the resolved settings             tables/*.parquet        tidy tables
    manifest.json   what the result depends on        tensors/*.safetensors
    log.jsonl       what happened when                figures/, report.html
    work/           partial state of unfinished stages

The same command on the same folder continues it. A folder belongs to its kind of study and to what is studied (its identity: models, data);
another one is refused, field by field. Any other setting may change: the change is noted, and the stages that hang on it run again. Every
file is replaced by a rename (see `files`), so that at any moment the folder is a state from which to go on. A reader (`RunFolder.read`,
`verify`) never writes. Of several ranks only the first writes; the others follow it (on several machines the folder must be on a file system
that all of them see).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd
import torch
import yaml

from mechscope import ranks
from mechscope.errors import RunError
from mechscope.store.differences import describe, differences
from mechscope.store.environment import environment
from mechscope.store.files import TEMPORARY, make_folder, plain, reading, write_text
from mechscope.store.hashing import hash_if_there, hash_json
from mechscope.store.ledger import LOG, OWN_FILES, SETTINGS, WORK, Ledger, now
from mechscope.store.log import read_log
from mechscope.store.stage import Stage
from mechscope.store.tables import read_table, read_tensors

logger = logging.getLogger(__name__)

FOLDERS = ("tables", "tensors", "figures")
MANIFEST_FIELDS = frozenset({"kind", "created", "commands", "settings", "environment", "continued", "stages"})


class RunFolder:
    """A run folder, open for writing (`open`, a context manager) or only for reading (`read`).

    Attributes:
        settings: the resolved settings: those given to `open`, or read from `study.yaml`.
        ledger: the manifest and the log, as stages use them too.
    """

    def __init__(self, settings: dict[str, Any], ledger: Ledger) -> None:
        """Describe a run; use `open` or `read`."""
        self.settings = settings
        self.ledger = ledger

    @classmethod
    def open(cls, path: str | Path, settings: Mapping[str, Any], *, kind: str, identity: tuple[str, ...] = ()) -> Self:
        """Begin a run, or continue the one that is there.

        Args:
            path: the run folder; made if missing.
            settings: resolved and JSON-able; written to `study.yaml`.
            kind: which study this is (`summarization`, `diff`).
            identity: dotted names of the settings that say what is studied (`base`, `tuned`, `data`). A folder of others is refused; other
                settings may change.

        Returns:
            The run, locked against other writers until `close` or the end of `with`.

        Raises:
            RunError: the folder belongs to something else, to another kind of study, to one of other things or to a live process, its
                settings were edited, or it cannot be written.
        """
        path, resolved = Path(path), plain(dict(settings))
        opened: list[Self] = []

        def begin() -> tuple[dict[str, Any], str]:
            run = cls(resolved, Ledger.claim(path))
            try:
                run._begin(kind, identity)
            except BaseException:
                run.close()
                raise
            opened.append(run)
            return run.manifest, run.ledger.code

        manifest, code = ranks.by_first(begin)
        return opened[0] if opened else cls(resolved, Ledger(path, manifest, code=code, follows=True))

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a run without locking or changing it; `RunError` where `path` is no run folder, or its manifest or settings are damaged."""
        ledger = Ledger.read(Path(path))
        return cls(_read_settings(ledger.path), ledger)

    @property
    def path(self) -> Path:
        """The folder, as given."""
        return self.ledger.path

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of `manifest.json`."""
        return self.ledger.manifest

    @property
    def kind(self) -> str:
        """Which study this is."""
        return self.manifest["kind"]

    def stage(self, name: str, inputs: Mapping[str, Any], *, alone: bool = False) -> Stage:
        """Return the stage `name`, to be entered with `with`; see `Stage`.

        Args:
            name: letters, digits and `_.=+-`.
            inputs: JSON-able: fingerprints and values that decide the stage's result; other inputs run it again.
            alone: of several ranks, only the first works on it.
        """
        return Stage(self.ledger, name, plain(inputs), alone=alone)

    def record(self, key: str, value: Any) -> None:
        """Note in the manifest what the result depends on: seeds, fingerprints of models and data.

        Args:
            key: a name of its own at the manifest's top level (`models`, `data`, `seeds`).
            value: JSON-able.
        """
        if not self.ledger.follows:
            self.ledger.require_writable()
        if key in MANIFEST_FIELDS:
            raise ValueError(f"{key!r} is a field of the manifest itself: record under another name")
        value = plain(value)
        changed = differences({key: self.manifest.get(key, value)}, {key: value})
        if changed:
            logger.warning("changed since the run began: %s", describe(changed))
        self.manifest[key] = value
        self.ledger.save()

    def record_command(self, command: Sequence[str]) -> None:
        """Note the command that does work on the run now, behind those that did before; the same one again adds nothing."""
        commands = self.manifest.setdefault("commands", [])
        if list(command) not in commands[-1:]:
            commands.append(list(command))
            self.ledger.save()

    def table(self, name: str) -> pd.DataFrame:
        """Read `tables/<name>.parquet`; `RunError` where it is missing or damaged."""
        return read_table(self.path / "tables" / f"{name}.parquet")

    def tensors(self, name: str) -> tuple[dict[str, torch.Tensor], Any]:
        """Read `tensors/<name>.safetensors` and its meta; `RunError` where it is missing or damaged."""
        return read_tensors(self.path / "tensors" / f"{name}.safetensors")

    def has_table(self, name: str) -> bool:
        """Tell whether a finished stage wrote the table `name`."""
        return any(f"tables/{name}.parquet" in stage["outputs"] for stage in self.ledger.stages.values())

    def events(self) -> list[dict[str, Any]]:
        """Return what happened, from `log.jsonl`."""
        return read_log(self.path / LOG)

    def close(self) -> None:
        """End the log and let other writers in; closing twice does nothing."""
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _begin(self, kind: str, identity: tuple[str, ...]) -> None:
        """Make the claimed folder a run that can be written: a new one, or the one that is there."""
        earlier = _settings_before(self.ledger) if self.manifest else None
        if earlier is not None:
            self._require_same_study(earlier, kind, identity)
        # a kill can leave a temporary file beside any file
        for leftover in self.path.rglob(f".*{TEMPORARY}"):
            leftover.unlink()
        for folder in FOLDERS:
            make_folder(self.path / folder)
        self.ledger.start_log()
        today = environment()
        self.ledger.code = today["code"]
        if earlier is None:
            self.manifest.update(kind=kind, created=now(), settings=hash_json(self.settings), stages={}, environment=today)
            self._write_settings()
            # the manifest last: where it is, the settings are
            self.ledger.save()
            logger.info("run begins", extra={"data": {"kind": kind}})
        else:
            self._continue(earlier, today)

    def _require_same_study(self, earlier: Mapping[str, Any], kind: str, identity: tuple[str, ...]) -> None:
        """Raise `RunError` unless the run is of this kind and of these things."""
        changes = [change for change in differences(earlier, self.settings) if change.is_within(identity)]
        changes = differences({"kind": self.kind}, {"kind": kind}) + changes
        if changes:
            raise RunError(
                f"{self.path} belongs to another run (what it has -> what is given): {describe(changes)}. "
                "Choose another folder with --out, or delete this one to start again."
            )

    def _continue(self, earlier: Mapping[str, Any], today: Mapping[str, Any]) -> None:
        """Note which settings are other ones now, and what is different today about code, libraries and machine."""
        logger.info("run continues")
        elsewhere = differences(self.manifest["environment"], today)
        if elsewhere:
            only_machine = all(each.name.startswith("machine.") for each in elsewhere)
            logger.log(logging.INFO if only_machine else logging.WARNING, "%s began on something else: %s", self.path, describe(elsewhere))
        changes = differences({"settings": earlier}, {"settings": self.settings})
        if changes:
            logger.info("settings changed: %s", describe(changes))
        # the manifest first, knowing both hashes: after a kill between the two files it tells the old settings from edited ones
        before, after = hash_json(earlier), hash_json(self.settings)
        if elsewhere or not before == after == self.manifest["settings"]:
            self.manifest["settings"] = after
            note = {"time": now(), "changed": [str(each) for each in (*elsewhere, *changes)], "settings_before": before}
            self.manifest.setdefault("continued", []).append(note)
            self.ledger.save()
        if before != after:
            self._write_settings()

    def _write_settings(self) -> None:
        # non-ASCII text stays escaped: PyYAML reads an unescaped U+0085 back as something else
        write_text(yaml.safe_dump(self.settings, sort_keys=False), self.path / SETTINGS)


def verify(path: str | Path) -> pd.DataFrame:
    """Hash a run's files again and compare with what its manifest recorded; nothing is written.

    Returns:
        One row per file: `file` (relative to the run), `stage`, `status` ("ok", "changed", "missing", "unreadable", or "unrecorded": there,
        but no finished stage's output), `expected` and `found` (sha256, None where there is none), `problem` (why it cannot be read, else
        empty). Of `study.yaml` the settings are hashed, not the spelling.

    Raises:
        RunError: `path` is not a run folder, or its manifest or its list of files cannot be read.
    """
    ledger = Ledger.read(Path(path))
    path = ledger.path
    recorded = [(name, stage, digest) for stage, record in ledger.stages.items() for name, digest in record["outputs"].items()]
    known = {name for name, _, _ in recorded} | OWN_FILES
    with reading(path):
        files = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
    others = [(name.as_posix(), name.parts[1] if name.parts[0] == WORK else "", None) for name in files if name.as_posix() not in known]
    rows = []
    for name, stage, expected in [(SETTINGS, "", ledger.manifest["settings"]), *recorded, *others]:
        found, problem = _found(path, name)
        rows.append((name, stage, _status(expected, found, problem), expected, found, problem))
    return pd.DataFrame(rows, columns=["file", "stage", "status", "expected", "found", "problem"])


def _found(path: Path, name: str) -> tuple[str | None, str]:
    """Return what a file of a run hashes to and, where it cannot be read, why."""
    try:
        return (_settings_hash(path) if name == SETTINGS else hash_if_there(path / name)), ""
    except OSError as error:
        return None, error.strerror or str(error)


def _status(expected: str | None, actual: str | None, problem: str) -> str:
    if problem:
        return "unreadable"
    if expected is None:
        return "unrecorded"
    if actual is None:
        return "missing"
    return "ok" if expected == actual else "changed"


def _settings_hash(path: Path) -> str | None:
    try:
        return hash_json(_read_settings(path))
    except RunError:
        return hash_if_there(path / SETTINGS)


def _settings_before(ledger: Ledger) -> dict[str, Any]:
    """Read the settings that a run had until now; `RunError` where they were edited."""
    settings = _read_settings(ledger.path)
    # those before the last change are still there where a kill came between manifest and settings
    before = {note.get("settings_before") for note in ledger.manifest.get("continued", [])[-1:]}
    if hash_json(settings) not in before | {ledger.manifest["settings"]}:
        raise RunError(f"{ledger.path / SETTINGS} was edited after the run began: undo the edit, or choose another folder with --out")
    return settings


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load((path / SETTINGS).read_text(encoding="utf-8"))
        hash_json(settings)
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        # YAML's errors have several lines
        reason = " ".join(str(error).split())
        raise RunError(f"cannot read {path / SETTINGS}: {reason}. Restore the file, or choose another folder with --out.") from error
    if not isinstance(settings, dict):
        raise RunError(f"{path / SETTINGS} holds no settings: restore the file, or choose another folder with --out")
    return settings
