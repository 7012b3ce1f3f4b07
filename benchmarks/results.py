"""A run's results: one JSON file, written again after every job, so that a run that is killed or a job that fails loses nothing.

format, date, command, settings   what was asked for
machine, versions                 where
jobs                              their names, in order
peers                             by package: its version, or null and why under `absent`
records                           one per job and who did it: rounds, medians, memory, ratios, targets, agreement
failures                          jobs that failed, with the error's last line
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.settings import BenchmarkError

FORMAT = 2
# a peer does the same work if its numbers differ by no more than this part of the largest
TOLERANCE = 1e-3


@dataclass
class Results:
    """What was measured.

    Attributes:
        head: What was asked for, and where it ran.
        records: One per job and who did it.
        failures: `job`, `by`, `error`.
        path: The file, if there is one.
    """

    head: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    path: Path | None = None

    @classmethod
    def read(cls, path: Path, command: str = "run") -> Results:
        """Read a file that a command, `run` or `scale`, wrote.

        Raises:
            BenchmarkError: It is no such file.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BenchmarkError(f"{path}: {error}: name a file that `python -m benchmarks {command} --out` wrote") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise BenchmarkError(f"{path} is no results file of format {FORMAT}: measure again with `python -m benchmarks {command} --out`")
        wrote = "run" if "settings" in found else "scale"
        if wrote != command:
            use = "`run`, `table` and `compare`" if wrote == "run" else "`python -m benchmarks scale --read`"
            raise BenchmarkError(f"{path} was written by `{wrote}`, not by `{command}`: it is for {use}")
        records, failures = found.pop("records"), found.pop("failures")
        return cls(found, records, failures, path)

    def write(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        if self.path.is_dir():
            raise BenchmarkError(f"--out {self.path} is a folder: name a file in it")
        text = json.dumps({**self.head, "records": self.records, "failures": self.failures}, indent=1, ensure_ascii=False)
        temporary = self.path.with_name(f".{self.path.name}.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(f"{text}\n", encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            raise BenchmarkError(f"{self.path} cannot be written: {error.strerror}: choose another --out") from error

    def by_key(self) -> dict[tuple[str, ...], dict[str, Any]]:
        """Return the records by what makes them comparable between files."""
        return {key(record): record for record in self.records}


def key(record: dict[str, Any]) -> tuple[str, ...]:
    """Say what a record is of: job, who did it, variant and texts."""
    return record["job"], record["by"], record["shape"], str(record["texts"]), str(record["tokens"])


def agreement(own: np.ndarray, peer: np.ndarray) -> dict[str, Any]:
    """Compare a peer's numbers with mechscope's.

    Returns:
        `difference`: the largest, as a part of the largest number; `relative`: the largest relative one among the `compared` numbers above a
        thousandth of the largest; `correlation` of all; `same`: whether they are the same work's.

    Raises:
        BenchmarkError: There are more of the one than of the other.
    """
    if own.shape != peer.shape:
        raise BenchmarkError(f"mechscope gave {own.size:,} numbers, the peer {peer.size:,}: they do not do the same work")
    largest = float(np.abs(own).max())
    counted = np.abs(own) > 1e-3 * largest
    apart = np.abs(own - peer)
    difference = float(apart.max()) / largest
    varied = own.size > 1 and np.ptp(own) > 0 and np.ptp(peer) > 0
    return {
        "difference": difference,
        "relative": float((apart[counted] / np.abs(own[counted])).max()),
        "compared": int(counted.sum()),
        "correlation": float(np.corrcoef(own, peer)[0, 1]) if varied else None,
        "same": bool(difference <= TOLERANCE),
    }
