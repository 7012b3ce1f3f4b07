"""The benchmark of interventions runs every job and prints every ratio with its limit; nothing is timed here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch


def test_every_job_runs_and_prints_its_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "patching.py"
    spec = importlib.util.spec_from_file_location("patching", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    before = torch.get_num_threads()
    try:
        module.main(["--repeats", "1", "--passes", "1", "--layers", "2", "--heads", "2", "--vocabulary", "50", "--threads", "1", "--json"])
    finally:
        torch.set_num_threads(before)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["job"] for row in rows] == [name for name in module.JOBS if name not in module.PEERS]
    assert [row["allowed"] for row in rows] == [42, None, 105, 3, 1.15]
    assert all(row["ratio"] == pytest.approx(row["seconds"] / row["forward"]) for row in rows)
