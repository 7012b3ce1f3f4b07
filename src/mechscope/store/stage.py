"""One stage of a run: a body of work that is done once for its inputs and survives a kill in the middle.

A stage that ends well is recorded in `manifest.json` with the fingerprint of its inputs and of every file it wrote. Entered again with the
same inputs, and its files as recorded, it is `done` and the caller skips the body; otherwise it runs (again). While it runs it may keep a
checkpoint and scratch files in `work/<stage>/<inputs>/` (see `mechscope.store.artifact`): the inputs' fingerprint in the path is what makes it
impossible to continue from another input's state. They go when the stage ends.

With several ranks all enter a stage together and leave it together. The body runs on each of them, so that they can share the work, and what it
writes is written by rank 0; a stage that cannot be shared is `alone`: rank 0 runs the body while for the others it counts as done.

    with run.stage("difference", inputs={"base": base.fingerprint, "data": corpus.hash}) as stage:
        if not stage.done:
            state, position = stage.resume() or ({}, 0)
            ...
            stage.checkpoint(state, position)
            stage.write_table("heads", heads)
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd
import torch

from mechscope import ranks
from mechscope.errors import RunError
from mechscope.store.artifact import Work
from mechscope.store.differences import describe, differences
from mechscope.store.files import write_bytes, write_json
from mechscope.store.hashing import hash_file, hash_if_there, hash_json, short
from mechscope.store.ledger import OWN_FILES, WORK, Ledger, now
from mechscope.store.tables import write_table, write_tensors

logger = logging.getLogger(__name__)


class Stage:
    """A context manager around one stage; made by `RunFolder.stage`.

    Attributes:
        name: the stage's name.
        done: whether the body can be skipped; known once entered.
        outputs: the files the stage wrote, by path relative to the run, with their sha256; complete once done or left.
        caveats: what weakens its results, JSON-able; kept in the manifest beside its outputs.
    """

    def __init__(self, ledger: Ledger, name: str, inputs: Mapping[str, Any], *, alone: bool = False) -> None:
        """Describe a stage of a run; nothing happens before it is entered."""
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*", name):
            raise ValueError(f"a stage is also a folder, so {name!r} must be of letters, digits and _.=+- only")
        self.name = name
        self.done = False
        self.outputs: dict[str, str] = {}
        self.caveats: list[dict[str, Any]] = []
        self._ledger = ledger
        self._inputs = dict(inputs)
        self._inputs_hash = hash_json([name, self._inputs])
        self._work = Work(ledger.path / WORK / name / short(self._inputs_hash), self._inputs)
        self._alone = alone
        self._context = contextlib.ExitStack()
        self._running = False
        self._started = 0.0
        self._seconds_before = 0.0

    def __enter__(self) -> Self:
        self.done, self.outputs = ranks.by_first(self._begin)
        self._running, self._started = not self.done, time.monotonic()
        if self._running and self._alone:
            if self._ledger.writes:
                self._context.enter_context(ranks.alone())
            else:
                self.done = True
        return self

    def _begin(self) -> tuple[bool, dict[str, str]]:
        stages = self._ledger.require_writable().stages
        record = self._ledger.stages.get(self.name)
        reason = self._reason_to_run(record)
        # refuses a work folder that is a link out of the run, where tidying up would delete what is not ours
        self._relative(self._work.folder)
        if reason is not None:
            self._work.begin()
        # only now: after an error above, nobody would take the name off the stack again
        stages.append(self.name)
        if record is not None and reason is None:
            logger.info("stage %s is done already", self.name)
            return True, dict(record["outputs"])
        logger.info("stage %s starts: %s", self.name, reason, extra={"data": {"inputs": self._inputs}})
        return False, {}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._context.close()
        try:
            if self._running and error is None:
                record = ranks.by_first(self._finish)
                self._ledger.stages[self.name] = record
                self.outputs = dict(record["outputs"])
            elif error is not None:
                # INFO: whoever catches the error tells the user, the log only notes where it struck
                logger.info("stage %s stopped", self.name, extra={"data": {"exception": repr(error)}})
        finally:
            self._running = False
            if self._ledger.writes:
                self._ledger.require_writable().stages.pop()

    def write_table(self, name: str, table: pd.DataFrame) -> Path:
        """Write `tables/<name>.parquet` and return its path; raises as `tables.write_table` does."""
        return self._written(f"tables/{name}.parquet", lambda path: write_table(table, path))

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Any = None) -> Path:
        """Write `tensors/<name>.safetensors` and return its path; raises as `tables.write_tensors` does."""
        return self._written(f"tensors/{name}.safetensors", lambda path: write_tensors(tensors, path, meta=meta))

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON-able value to the file `name`, relative to the run, and return its path."""
        return self._written(name, lambda path: write_json(value, path))

    def write_text(self, name: str, text: str) -> Path:
        """Write text to the file `name`, relative to the run (`report.html`), and return its path."""
        return self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write bytes to the file `name`, relative to the run (`figures/kl.png`), and return its path."""
        return self._written(name, lambda path: write_bytes(data, path))

    def add(self, path: Path) -> None:
        """Make outputs of files that another library wrote into the run: a file, or all files of a folder (a saved model).

        Args:
            path: in the run folder, as the caller sees it (not relative to the run).

        Raises:
            RunError: `path` is outside the run, missing, scratch, or another stage's output.
        """
        if not self._ledger.writes:
            return
        if not path.exists():
            raise RunError(f"stage {self.name} has no {path} to add: write it first")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                self._recorded(self._claimed(self._relative(file)))

    def path(self, name: str) -> Path:
        """Return a scratch folder of that name, made if missing; it outlives a kill and goes when the stage ends well."""
        self._require_running()
        ranks.by_first(lambda: self._relative(self._work.folder / name))
        return self._work.path(name)

    def checkpoint(self, tensors: Mapping[str, torch.Tensor], meta: Any) -> None:
        """Keep named tensors and a JSON-able `meta` in place of an earlier checkpoint; `RunError` where they cannot be written."""
        self._require_running()
        self._work.checkpoint(tensors, {"seconds": self._seconds(), "meta": meta})

    def resume(self) -> tuple[dict[str, torch.Tensor], Any] | None:
        """Return the tensors and meta of the last checkpoint for these inputs, or None where there is none; `RunError` where it is damaged."""
        self._require_running()
        state = self._work.resume()
        if state is None:
            return None
        tensors, header = state
        self._started, self._seconds_before = time.monotonic(), header["seconds"]
        logger.info("stage %s continues from its checkpoint", self.name)
        return tensors, header["meta"]

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _reason_to_run(self, record: Mapping[str, Any] | None) -> str | None:
        if record is None:
            return "not finished before"
        if record["inputs_hash"] != self._inputs_hash:
            return f"its inputs changed ({describe(differences(record['inputs'], self._inputs))})"
        spoilt = [name for name, digest in record["outputs"].items() if hash_if_there(self._ledger.path / name) != digest]
        return f"changed or missing since it finished: {', '.join(spoilt)}" if spoilt else None

    def _require_running(self) -> None:
        if not self._running:
            raise RuntimeError(f"stage {self.name} is not running: write inside `with`, and only if not stage.done")

    def _relative(self, path: Path) -> str:
        # the parent is resolved, not the file: a link out of the run must not carry a write with it
        resolved, root = path.parent.resolve() / path.name, self._ledger.path.resolve()
        if path.name in {"", ".."} or not resolved.is_relative_to(root) or resolved == root:
            raise RunError(f"stage {self.name} would write {path}, which is outside the run {self._ledger.path}: give a path inside it")
        return resolved.relative_to(root).as_posix()

    def _claimed(self, name: str) -> Path:
        """Return the path of an output, having checked that this stage may write it."""
        self._require_running()
        name = self._relative(self._ledger.path / name)
        path = self._ledger.path / name
        if name in OWN_FILES:
            raise RunError(f"{name} is kept by the run itself: stage {self.name} needs another name")
        if name.startswith(f"{WORK}/"):
            raise RunError(f"{name} is scratch, which goes when its stage ends: stage {self.name} needs another name")
        for other, record in self._ledger.stages.items():
            if other != self.name and name in record["outputs"]:
                raise RunError(f"{name} is an output of stage {other}: stage {self.name} needs another name")
        return path

    def _written(self, name: str, write: Callable[[Path], None]) -> Path:
        path = self._claimed(name)
        if self._ledger.writes:
            write(path)
            self._recorded(path)
        return path

    def _recorded(self, path: Path) -> None:
        self.outputs[self._relative(path)] = hash_file(path)

    def _finish(self) -> dict[str, Any]:
        stages = self._ledger.stages
        # what an earlier run of the stage wrote and this one did not belongs to no inputs any more
        for name in set(stages.get(self.name, {}).get("outputs", {})) - set(self.outputs):
            (self._ledger.path / self._relative(self._ledger.path / name)).unlink(missing_ok=True)
        stages[self.name] = {
            "inputs_hash": self._inputs_hash,
            "inputs": self._inputs,
            "outputs": dict(sorted(self.outputs.items())),
            "seconds": round(self._seconds(), 3),
            "finished": now(),
            "code": self._ledger.code,
            **({"caveats": self.caveats} if self.caveats else {}),
        }
        self._ledger.save()
        # also what other inputs left unfinished
        shutil.rmtree(self._work.folder.parent, ignore_errors=True)
        logger.info("stage %s finished", self.name, extra={"data": {"seconds": stages[self.name]["seconds"]}})
        return dict(stages[self.name])
