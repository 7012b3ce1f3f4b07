"""How the tests run jobs, and how they read what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from mechscope.data.newsroom import newsroom_model_path
from mechscope.settings import resolve
from mechscope.store.run import RunFolder
from mechscope.studies.job import Job, Result
from mechscope.studies.runner import run_job

MODEL = str(newsroom_model_path())
QUICK: dict[str, Any] = {"pairs": "newsroom:what", "limit": 12, "random_circuits": 2, "circuit_resamples": 4, "criteria": False}
"""Settings of a small circuit."""


def run(job: Job[Any], out: Path, **settings: Any) -> Result:
    """Run a job into a folder."""
    return run_job(job, resolve(job.settings, **settings), out)


def measure(table: pd.DataFrame, name: str) -> float:
    """Return one number of the table `circuit_summary`."""
    return float(table.loc[table["measure"] == name, "value"].iloc[0])


def finished(out: Path) -> list[str]:
    """Return the stages of a run that were done, one after another, by all commands on its folder."""
    return [str(event["stage"]) for event in RunFolder.read(out).events() if str(event["message"]).endswith("finished")]
