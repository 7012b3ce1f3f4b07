"""The benchmark of the lens runs every job and prints every ratio with its limit; nothing is timed here."""

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

SMALL = ["--repeats=1", "--layers=2", "--heads=2", "--vocabulary=70", "--threads=1"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the script from its path, with its siblings beside it, and put the number of threads back."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("lens_benchmark", folder / "lens.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    before = torch.get_num_threads()
    yield module
    torch.set_num_threads(before)


def test_every_job_runs_and_prints_its_ratio_and_memory(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--here", "--json", *SMALL])
    rows = {row["job"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(rows) == ["backbone", "projection", "projection_all", "likeliest", "everything", "training_step"]
    assert [row["allowed"] for row in rows.values()] == [None, None, None, 1.3, None, None]
    assert rows["likeliest"]["allowed_memory"] == 0.5
    assert all(row["ratio"] == pytest.approx(row["seconds"] / row["unembeddings"]) for row in rows.values())


def test_each_job_has_its_own_process_with_the_same_shape(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    row = {"job": "likeliest", "seconds": 1.5, "unembeddings": 1.25, "ratio": 1.2, "allowed": 1.3}
    row |= {"memory_gib": 0.125, "allowed_memory": 0.5}

    def started(command: list[str], **_: object) -> argparse.Namespace:
        commands.append(command[2:])
        return argparse.Namespace(stdout=json.dumps(row))

    monkeypatch.setattr(benchmark.subprocess, "run", started)
    benchmark.main(["--jobs", "likeliest", "everything", *SMALL])
    assert [command[:4] for command in commands] == [["--jobs", name, "--json", "--here"] for name in ("likeliest", "everything")]
    assert all(set(command[4:]) == set(SMALL) for command in commands)
    versions, _, first, _ = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}, 1 threads, 8 × 128 tokens" in versions
    assert first.split() == ["likeliest", "1.500", "1.250", "1.200", "≤", "1.3", "0.125", "≤", "0.5"]


def test_what_is_compared_with_is_the_unembedding_of_every_token_of_every_layer(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = benchmark.build(2, 8, argparse.Namespace(layers=3, heads=2, vocabulary=70))
    calls: list[tuple[torch.Size, torch.Size]] = []
    plain = torch.nn.functional.linear

    def seen(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append((rows.shape, weight.shape))
        return plain(rows, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", seen)
    benchmark.unembeddings(case)
    assert calls == [(torch.Size([16, 128]), torch.Size([70, 128]))] * 3
