"""What the tests of the harness share: a tiny shape, and records as a run would write them. Nothing is timed here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.results import FORMAT, Results
from benchmarks.settings import Settings
from benchmarks.shapes import Shape

TINY = Settings(shape=Shape(layers=2, heads=2, vocabulary=70, positions=160), threads=1, repeats=1, texts=2, documents=4, probes=3)
# the same on a command line
FLAGS = ["--layers=2", "--heads=2", "--vocabulary=70", "--positions=160", "--threads=1", "--repeats=1", "--texts=2", "--probes=3"]

_RECORD = {
    "job": "lens",
    "by": "mechscope",
    "package": "",
    "what": "logit lens",
    "shape": "small",
    "texts": 8,
    "tokens": 1024,
    "each": 128,
    "seconds": 3.0,
    "cpu_seconds": 5.0,
    "rounds": [2.9, 3.0, 3.1],
    "memory_gib": 0.25,
    "loaded_gib": 1.0,
    "forward": {"seconds": 1.5, "cpu_seconds": 2.0, "rounds": [1.5], "memory_gib": 0.2},
    "passes": 2.0,
    "beside": {"name": "forward passes", "count": 1, "seconds": 1.5, "cpu_seconds": 2.0, "rounds": [1.5], "memory_gib": 0.2},
    "ratio": 2.0,
    "cpu_ratio": 2.5,
    "memory_ratio": 1.25,
    "noise": 0.05,
    "targets": {"ratio": 2.2, "gib": None, "memory_ratio": None},
}


@pytest.fixture
def tiny() -> Iterator[Settings]:
    """Return settings of the smallest run, and put the number of threads back that a job sets for itself."""
    before = torch.get_num_threads()
    yield TINY
    torch.set_num_threads(before)


def record(**changes: Any) -> dict[str, Any]:
    """Return a record with some fields changed."""
    return {**copy.deepcopy(_RECORD), **changes}


def results(*records: dict[str, Any], path: Path | None = None, **head: Any) -> Results:
    """Return results as a run writes them."""
    whole = {
        "format": FORMAT,
        "date": "2026-01-02 03:04 UTC",
        "command": "python -m benchmarks run --out benchmarks/results/small.json",
        "settings": TINY.to_json(),
        "jobs": sorted({made["job"] for made in records}),
        "machine": {"cpu": "Some CPU", "cores": 2, "memory_gib": 23.5, "system": "Linux x86_64", "accelerators": [], "load": 0.1},
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "peers": {"nnsight": "0.8.1"},
        "absent": {"EAP-IG's code": "not installed"},
    }
    return Results({**whole, **head}, list(records), [], path)
