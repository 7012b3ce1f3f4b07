"""The benchmark runs, does the work it claims, and prints every ratio; nothing is timed here."""

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

from mechscope.subject.load import Subject

SMALL = ["--layers=2", "--heads=2", "--vocabulary=50", "--threads=1"]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """Import the script from its path: benchmarks are not a package."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "attention_statistics.py"
    spec = importlib.util.spec_from_file_location("attention_statistics", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back that the benchmark sets for itself."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shape(benchmark: ModuleType) -> argparse.Namespace:
    jobs = [ratio[0] for ratio in benchmark.RATIOS]
    return argparse.Namespace(layers=2, heads=2, vocabulary=50, threads=1, repeats=1, jobs=jobs)


def test_every_ratio_is_printed_with_its_limit(
    benchmark: ModuleType, threads: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "memory_of", lambda job, positions, shape: 1000 + len(job))
    benchmark.main(["--positions", "16", "--repeats", "1", *SMALL])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:]] == [job for job, *_ in benchmark.RATIOS]
    assert "≤ 1.4" in lines[1]
    assert "≤ 1.3" in lines[1]
    assert "≤ 1.8" in lines[4]


def test_a_ratio_is_the_jobs_time_over_that_of_the_passes_it_is_measured_against(
    benchmark: ModuleType, shape: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "times", lambda case, repeats, *jobs: [3.0 if "both" in job else 2.0 for job in jobs])
    monkeypatch.setattr(benchmark, "memory_of", lambda job, positions, shape: 4 * benchmark.GIB)
    rows = {row["job"]: row for row in benchmark.run(16, shape)}
    assert rows["entropy"]["time_ratio"] == 1.0
    assert rows["both_with_logits"]["time_ratio"] == 0.75, "one run of both models against two passes"
    assert rows["both"]["memory_gib"] == 4.0


@pytest.mark.slow  # two processes import everything
def test_memory_is_measured_in_a_process_of_its_own_above_the_loaded_models(benchmark: ModuleType, shape: argparse.Namespace) -> None:
    # logits of 2,048 tokens × 20,000 words × 4 bytes are 156 MiB; the pass without them holds a few MiB
    shape.vocabulary = 20_000
    with_logits, without = (benchmark.memory_of(job, 2048, shape) for job in ("forward", "backbone"))
    assert with_logits - without > 100 * 2**20
    assert with_logits < 600 * 2**20


def test_the_long_run_prints_its_peak(benchmark: ModuleType, threads: None, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--long", "600", "--json", *SMALL])
    found = json.loads(capsys.readouterr().out)
    assert found["positions"] == 600
    assert found["peak_gib"] >= found["loaded_gib"] > 0


def test_both_models_are_walked_to_their_own_last_residual_stream(benchmark: ModuleType, shape: argparse.Namespace) -> None:
    case = benchmark.build(16, shape)

    def last(subject: Subject) -> torch.Tensor:
        return subject.anatomy.backbone(case.ids, use_cache=False).last_hidden_state

    with torch.inference_mode():
        for (walk, stream), subject in zip(benchmark.both(case), (case.base, case.tuned), strict=True):
            torch.testing.assert_close(walk.subject.anatomy.final_norm(stream), last(subject), rtol=1e-4, atol=1e-5)
