"""The benchmark of roles runs every job, prints every ratio with its limit, and compares with passes over the very probes; nothing is timed here."""

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

from mechscope.heads.pattern_roles import repeated_texts

SMALL = ["--probes=3", "--repeats=1", "--layers=2", "--heads=2", "--vocabulary=50", "--threads=1"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the script from its path, with its siblings beside it, and put the number of threads back."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("heads_benchmark", folder / "heads.py")
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
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["job"] for row in rows] == ["patterns", "copying", "role_table"]
    assert [row["allowed"] for row in rows] == [None, None, 12]
    assert all(row["ratio"] == pytest.approx(row["seconds"] / row["forward"]) for row in rows)
    assert all(row["texts"] == 6 and row["memory_gib"] >= 0 for row in rows)


def test_each_job_has_its_own_process_with_the_same_shape(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    row = {
        "job": "role_table",
        "texts": 64,
        "tokens": 2304,
        "seconds": 4.0,
        "forward": 0.5,
        "ratio": 8.0,
        "allowed": 12,
        "memory_gib": 0.25,
    }

    def started(command: list[str], **_: object) -> argparse.Namespace:
        commands.append(command[2:])
        return argparse.Namespace(stdout=json.dumps(row))

    monkeypatch.setattr(benchmark.subprocess, "run", started)
    benchmark.main(["--jobs", "patterns", "role_table", *SMALL])
    assert [command[:4] for command in commands] == [["--jobs", name, "--json", "--here"] for name in ("patterns", "role_table")]
    assert all(set(command[4:]) == set(SMALL) for command in commands)
    versions, _, first, *_ = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in versions
    assert first.split() == ["role_table", "64", "2,304", "4.000", "0.500", "8.00", "≤", "12", "0.250"]


def test_the_forward_pass_reads_every_probe_and_its_control_once(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = argparse.Namespace(layers=1, heads=1, vocabulary=50)
    case = benchmark.Case(benchmark.build(1, 2, shape).subject, 5)
    read: list[tuple[int, ...]] = []

    def noted(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        read.extend(map(tuple, args[0].tolist()))

    handle = case.subject.plain.register_forward_pre_hook(noted)
    benchmark.forward(case)
    handle.remove()
    texts = repeated_texts(case.subject, 5)
    longest = max(len(pair.clean) for pair in texts)
    expected = [ids + (0,) * (longest - len(ids)) for pair in texts for ids in (pair.clean, pair.corrupt)]
    assert sorted(read) == sorted(expected)
