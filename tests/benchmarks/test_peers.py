"""The peers' jobs do mechscope's work: on the same weights and texts they find the same numbers. Those that are not installed are skipped by name."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import numpy as np
import pytest
import torch
from benchmarks.harness import measure
from benchmarks.peers.__main__ import look
from benchmarks.peers.cases import build
from benchmarks.peers.eap import OnDevice
from benchmarks.results import agreement
from benchmarks.settings import BenchmarkError, Settings
from benchmarks.shapes import Size

from benchmarks import jobs, peers


@pytest.mark.parametrize(("name", "by"), peers.JOBS)
def test_a_peer_s_numbers_are_mechscope_s(name: str, by: str, tiny: Settings) -> None:
    job = peers.JOBS[name, by]
    if "version" not in (found := look(job.package)):
        pytest.skip(f"{by}: {found['absent']}")
    record, theirs = measure(job, tiny)
    _, own = measure(jobs.JOBS[name], tiny)
    assert own is not None
    assert theirs is not None
    assert np.ptp(own) > 0 or own.size == 1
    compared = agreement(own, theirs)
    assert compared["difference"] < 1e-4
    assert (record["job"], record["by"]) == (name, by)
    if job.forward is None:
        assert record["ratio"] == pytest.approx(record["seconds"] / record["beside"]["seconds"])
    else:
        assert record["passes"] == pytest.approx(record["seconds"] / record["forward"]["seconds"])


def test_every_peer_s_job_has_one_of_mechscope_s_with_the_same_texts() -> None:
    for (name, _), job in peers.JOBS.items():
        own = jobs.JOBS[name]
        assert own.numbers is not None
        assert all(own.sizes[variant] == size for variant, size in job.sizes.items())
        assert job.package in peers.NAMES


def test_agreement_is_relative_to_the_largest_number() -> None:
    own = np.array([100.0, 1.0, 0.01])
    assert agreement(own, own)["difference"] == 0
    close = agreement(own, np.add(own, [0.05, 0, 0.005]))
    assert close["difference"] == pytest.approx(5e-4)
    assert close["same"]
    assert close["compared"] == 2, "the third is too small to count"
    assert close["relative"] == pytest.approx(5e-4)
    assert not agreement(own, own * [1, 1.2, 1])["same"]
    assert not agreement(own, -own)["same"]
    with pytest.raises(BenchmarkError, match="3 numbers, the peer 2"):
        agreement(own, own[:2])


def test_maps_that_would_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, tiny: Settings) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(BenchmarkError, match="maps of all layers"):
        build(tiny, Size(1, 16), wrap=lambda model: model, maps=True)


def test_the_authors_code_needs_the_older_transformer_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.3.0")
    assert "before 4.0" in look("eap")["absent"]
    assert "before 4.0" in look("circuit_tracer")["absent"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.16.1")
    assert look("eap") == {"version": "2.16.1"}


def test_a_tensor_asked_for_on_a_gpu_is_made_where_the_model_is() -> None:
    with OnDevice("cpu"):
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device="meta").device.type == "meta"
