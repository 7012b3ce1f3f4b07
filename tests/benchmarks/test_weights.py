"""The benchmark of weights runs every job, prints times per head and memory with its limit; nothing is timed here."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SMALL = ["--layers=2", "--heads=2", "--vocabulary=50", "--threads=1"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the script from its path, with its siblings beside it, and put the number of threads back."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("weights_benchmark", folder / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    before = torch.get_num_threads()
    yield module
    torch.set_num_threads(before)


@pytest.mark.parametrize(("components", "heads"), [("all", 4), ("a1.h0", 1)])
def test_every_job_runs_and_prints_its_time_per_head_and_memory(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], components: str, heads: int
) -> None:
    benchmark.main(["--here", "--json", f"--components={components}", *SMALL])
    rows = {row["job"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(rows) == list(benchmark.JOBS)
    assert all(row["heads"] == (4 if name == "composition" else heads) for name, row in rows.items())
    assert [row["allowed_memory"] for row in rows.values()] == [3] * 4 + [None] * 4
    assert all(row["per_head"] == pytest.approx(row["seconds"] / row["heads"]) for row in rows.values())
    assert all(row["ratio"] == pytest.approx(row["per_head"] / row["whole"]) for row in rows.values())


def test_each_job_has_its_own_process_with_the_same_shape(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    row = {"job": "ov", "heads": 12, "seconds": 48.0, "per_head": 4.0, "whole": 8.0, "ratio": 0.5, "memory_gib": 0.25, "allowed_memory": 3}

    def started(command: list[str], **_: object) -> argparse.Namespace:
        commands.append(command[2:])
        return argparse.Namespace(stdout=json.dumps(row))

    monkeypatch.setattr(benchmark.subprocess, "run", started)
    benchmark.main(["--jobs", "ov", "copying", "--components=a0.h1", *SMALL])
    assert [command[:4] for command in commands] == [["--jobs", name, "--json", "--here"] for name in ("ov", "copying")]
    assert all(set(command[4:]) == {"--components=a0.h1", *SMALL} for command in commands)
    versions, _, first, *_ = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in versions
    assert first.split() == ["ov", "12", "48.00", "4.000", "8.000", "0.50", "0.250", "≤", "3"]


def test_the_reference_makes_the_whole_matrix(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_ROWS", 3)
    monkeypatch.setattr(benchmark, "_COLUMNS", 4)
    made: list[int] = []
    product = torch.Tensor.__matmul__

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        found = product(a, b)
        made.append(found.numel())
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    benchmark.whole(10, 2)
    assert sum(made) == 100
