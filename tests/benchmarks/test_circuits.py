"""The benchmark of circuits runs every job, prints every ratio with its limit, and would notice scores that differ; nothing is timed here."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from mechscope.circuits.attribution import attribute_edges
from mechscope.circuits.graph import Graph

SMALL = ["--repeats=1", "--passes=1", "--layers=2", "--heads=2", "--vocabulary=50", "--threads=1"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the script from its path, with its siblings beside it, without peers, and put the number of threads back."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("circuits_benchmark", folder / "circuits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "missing", lambda: ["eap"])
    before = torch.get_num_threads()
    yield module
    torch.set_num_threads(before)


@pytest.fixture
def shape() -> argparse.Namespace:
    return argparse.Namespace(layers=2, heads=2, vocabulary=50, threads=1, repeats=1, passes=1)


def test_every_job_runs_and_prints_its_ratio_and_memory(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--here", "--json", *SMALL])
    rows = {row["job"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(rows) == ["eap", "eap_ig", "eap_ig_long", "evaluate", "prepare_and_evaluate"], "the peers' jobs are left out"
    assert [row["allowed"] for row in rows.values()] == [4.5, 14, None, 3, None]
    assert rows["eap_ig_long"]["allowed_memory"] == 1.2
    assert all(row["ratio"] == pytest.approx(row["seconds"] / row["forward"]) for row in rows.values())


def test_each_job_has_its_own_process_with_the_same_shape(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    row = {"job": "eap", "texts": 16, "tokens": 16, "seconds": 1.0, "forward": 0.25, "ratio": 4.0}
    row |= {"allowed": 4.5, "memory_gib": 0.125, "allowed_memory": None}

    def started(command: list[str], **_: object) -> argparse.Namespace:
        commands.append(command[2:])
        return argparse.Namespace(stdout=json.dumps(row))

    monkeypatch.setattr(benchmark.subprocess, "run", started)
    benchmark.main(["--jobs", "eap", "evaluate", *SMALL])
    assert [command[:4] for command in commands] == [["--jobs", name, "--json", "--here"] for name in ("eap", "evaluate")]
    assert all(set(command[4:]) == set(SMALL) for command in commands)
    versions, peers, _, first, *_ = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in versions
    assert "1 threads" in versions
    assert peers == "peers not installed: eap"
    assert first.split() == ["eap", "16", "×", "16", "1.000", "0.2500", "4.00", "≤", "4.5", "0.125"]


def test_half_of_all_edges_are_open_and_the_two_ways_to_evaluate_run_the_same_set(benchmark: ModuleType, shape: argparse.Namespace) -> None:
    case = benchmark.build(2, 8, shape)
    edges = benchmark._half(case)
    assert edges.shape == (1, len(Graph(2, 2)))
    assert 0.3 < edges.float().mean() < 0.7
    prepared = benchmark._prepared(case)
    assert not torch.equal(prepared.run(edges)[0], prepared.clean)


def test_scores_agree_where_they_are_the_same_and_not_where_an_edge_differs(
    benchmark: ModuleType, shape: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = benchmark.build(2, 8, shape)
    graph, own = Graph(2, 2), attribute_edges(case.subject, case.pairs, method="eap").mean
    monkeypatch.setattr(benchmark, "_reference", lambda case, method: graph.matrix(own))
    same = benchmark.agreement(case, "eap", "EAP")
    assert same["relative"] < 1e-5
    assert same["correlation"] > 1 - 1e-9
    assert same["compared"] > len(graph) / 2
    other = own.copy()
    strongest, weakest = np.argsort(np.abs(own))[[-1, 0]]
    other[strongest] *= 2
    other[weakest] += 1e-5 * np.abs(own).max()  # too small to count
    monkeypatch.setattr(benchmark, "_reference", lambda case, method: graph.matrix(other))
    assert benchmark.agreement(case, "eap", "EAP")["relative"] == pytest.approx(0.5, abs=1e-5)


def test_what_is_run_to_warm_up_is_the_same_model_on_less_text(benchmark: ModuleType, shape: argparse.Namespace) -> None:
    case = benchmark.build(4, 16, shape)
    small = benchmark._small(case)
    assert small.subject is case.subject
    assert [pair.clean for pair in small.pairs] == [pair.clean[:8] for pair in list(case.pairs)[:2]]
    assert all(replace(pair, target=None).answers == (1,) for pair in small.pairs)


def test_a_tensor_asked_for_on_a_gpu_is_made_on_the_cpu(benchmark: ModuleType) -> None:
    with benchmark._OnCpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device="meta").device.type == "meta"
