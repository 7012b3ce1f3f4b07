"""A job's own process: `python -m benchmarks.worker JOB BY FOLDER` reads `settings.json` there and leaves `record.json` and `numbers.npy`.

A peer's job runs under another Python, where mechscope may not be installed: nothing of it is imported for one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.harness import Job, measure
from benchmarks.settings import OWN, Settings


def job_of(name: str, by: str) -> Job:
    """Look a job up."""
    if by == OWN:
        from benchmarks.jobs import JOBS

        return JOBS[name]
    from benchmarks.peers import JOBS as PEER_JOBS

    return PEER_JOBS[name, by]


def main(name: str, by: str, folder: str) -> None:
    """Measure a job and leave what was found."""
    settings = Settings.from_json(json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8")))
    record, numbers = measure(job_of(name, by), settings)
    if numbers is not None:
        np.save(Path(folder) / "numbers.npy", numbers)
    (Path(folder) / "record.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
