"""How jobs are measured: rounds, medians, memory, processes, failures. No time is asserted: clocks are replaced."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from benchmarks.harness import Beside, Job, measure, spread
from benchmarks.peers import JOBS as PEER_JOBS
from benchmarks.results import Results
from benchmarks.settings import BenchmarkError, Settings
from benchmarks.shapes import Size
from benchmarks.watch import Watch

from benchmarks import cli, processes, watch
from tests.benchmarks.conftest import FLAGS, record, results


@dataclass
class Clock:
    """Stands in for the time module; work moves it on."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now

    process_time = perf_counter


@dataclass
class Counted:
    """A case that knows what was done with it."""

    done: list[str] = field(default_factory=list)
    texts: int = 2
    tokens: int = 16
    each: int = 8

    def small(self) -> Counted:
        return Counted(self.done, 1, 1, 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watch, "time", made)
    return made


def _job(clock: Clock, case: Counted, **changes: Any) -> Job:
    """Return a job that takes 8 seconds, one more each round, beside a pass of 2 and something of 4."""

    def run(case: Counted) -> np.ndarray:
        case.done.append("job" if case.texts == 2 else "small")
        clock.now += 8 + case.done.count("job")
        return np.ones(3)

    def forward(case: Counted) -> None:
        case.done.append("forward")
        clock.now += 2

    def other(case: Counted) -> None:
        case.done.append("other")
        clock.now += 4

    options = {
        "name": "made",
        "what": "a job",
        "build": lambda settings, size: case,
        "run": run,
        "forward": forward,
        "numbers": lambda found: found,
    }
    return Job(**{**options, "beside": Beside("others", other, 2), "rounds": 3, **changes})


def test_rounds_take_turns_after_one_to_warm_up_and_their_median_counts(clock: Clock, tiny: Settings) -> None:
    case = Counted()
    found, numbers = measure(_job(clock, case), replace(tiny, repeats=None))
    # first all three for their memory; then three rounds; one pass each, as a pass is a quarter of the job
    assert case.done == ["small", "job", "forward", "other", *["other", "forward", "job"] * 3]
    assert found["rounds"] == [10, 11, 12]
    assert (found["seconds"], found["forward"]["seconds"], found["beside"]["seconds"]) == (11, 2, 4)
    assert found["passes"] == 5.5
    assert found["ratio"] == 11 / 2 / 4, "it stands for two of the others"
    assert found["noise"] == pytest.approx(1 / 11)
    assert numbers is not None
    assert numbers.tolist() == [1, 1, 1]


def test_a_slow_job_counts_its_first_round_and_the_command_line_decides_how_many(clock: Clock, tiny: Settings) -> None:
    assert measure(_job(clock, Counted(), slow=True), replace(tiny, repeats=None))[0]["rounds"] == [9, 10, 11]
    found = measure(_job(clock, Counted(), slow=True), replace(tiny, repeats=1))[0]
    assert found["rounds"] == [9]
    assert found["noise"] is None


def test_passes_that_are_short_beside_the_job_are_repeated_within_a_round(clock: Clock, tiny: Settings) -> None:
    def quick(case: Counted) -> None:
        case.done.append("quick")
        clock.now += 0.75

    case = Counted()
    measure(_job(clock, case, forward=quick, beside=None), replace(tiny, repeats=1))
    # the job's nine seconds are twelve passes, and a quarter of that is three
    assert case.done == ["small", "job", "quick", "quick", "quick", "quick", "job"]


def test_alone_a_job_runs_once_and_has_no_ratio(clock: Clock, tiny: Settings) -> None:
    case = Counted()
    found, _ = measure(_job(clock, case), replace(tiny, alone=True))
    assert case.done == ["job"]
    assert (found["seconds"], found["ratio"], found["passes"], found["beside"]) == (9, None, None, None)


def test_a_watch_adds_up_its_stretches_and_sees_only_their_memory(clock: Clock) -> None:
    stopped = torch.ones(2**24)  # 64 MiB that are there before
    with Watch(memory=True) as seen:
        clock.now += 1
        seen._stopped.wait(0.05)
    clock.now += 10
    big = torch.ones(2**26)  # 256 MiB while it stands still
    del big, stopped
    with seen:
        clock.now += 2
        held = torch.ones(2**24)
        seen._stopped.wait(0.05)
    assert (seen.seconds, seen.cpu_seconds) == (3, 3)
    del held
    assert seen.peak < 200 * 2**20


def test_memory_that_is_held_in_a_stretch_is_seen() -> None:
    seen = Watch(memory=True)
    with seen:
        held = torch.ones(2**25)  # 128 MiB
        seen._stopped.wait(0.05)
    assert 120 * 2**20 < seen.peak < 200 * 2**20
    del held


def test_the_spread_is_half_of_how_far_rounds_lie_apart() -> None:
    assert spread([1.0, 2.0, 4.0]) == 0.75
    assert spread([1.0]) is None


def _fails(job: Job, settings: Settings) -> tuple[dict[str, Any], np.ndarray | None]:
    if job.name == "bad":
        raise BenchmarkError("no such thing")
    numbers = {"mechscope": [1.0, 2.0], "same": [1.0, 2.0005], "other": [1.0, 2.5], "more": [1.0, 2.0, 3.0]}[job.by]
    return record(job=job.name, by=job.by), np.array(numbers)


def test_a_job_that_fails_is_reported_and_loses_nothing(
    tmp_path: Path, clock: Clock, tiny: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    made = results(path=tmp_path / "deep" / "out.json")
    jobs = [(_job(clock, Counted(), name=name), tiny) for name in ("first", "bad", "last")]
    peers = [_job(clock, Counted(), name="last", by=by) for by in ("same", "other", "more")]
    written: list[int] = []

    def measured(job: Job, settings: Settings) -> tuple[dict[str, Any], np.ndarray | None]:
        written.append(len(Results.read(made.path).records) if made.path and made.path.exists() else 0)
        return _fails(job, settings)

    processes.run(jobs, peers, measured, made, print)
    found = Results.read(tmp_path / "deep" / "out.json")
    assert [(one["job"], one["by"]) for one in found.records] == [
        ("first", "mechscope"),
        ("last", "mechscope"),
        ("last", "same"),
        ("last", "other"),
    ]
    assert written == [0, 1, 1, 2, 3, 4], "the file is written after every job"
    assert found.failures[0] == {"job": "bad", "by": "mechscope", "error": "no such thing"}
    assert "mechscope gave 2 numbers, the peer 3" in found.failures[1]["error"]
    same, other = (one["agreement"] for one in found.records[2:])
    assert (same["same"], other["same"]) == (True, False)
    assert other["difference"] == 0.25
    out = capsys.readouterr().out
    assert "failed: no such thing" in out
    assert "NOT the same work" in out


@pytest.mark.slow
def test_a_run_measures_a_job_in_its_process_and_leaves_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert cli.main(["run", "weights_composition", *FLAGS, "--no-peers", "--out", str(out)]) == 0
    found = Results.read(out)
    assert [one["job"] for one in found.records] == ["weights_composition"]
    assert str(tmp_path) not in out.read_text(encoding="utf-8"), "no path of this machine is published"
    assert found.head["command"].startswith("python -m benchmarks run weights_composition --layers=2")
    assert found.head["versions"]["torch"] == importlib.metadata.version("torch")
    assert found.head["settings"]["shape"]["layers"] == 2
    assert "weights_composition" in capfd.readouterr().out


@pytest.mark.slow
def test_a_run_that_is_ended_takes_the_job_s_process_with_it() -> None:
    command = [sys.executable, "-m", "benchmarks", "run", "difference", "--documents", "5000", "--no-peers", "--alone"]
    with subprocess.Popen(command, cwd=processes.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        parent, deadline = psutil.Process(run.pid), time.monotonic() + 120
        while not (workers := [one for one in parent.children() if "benchmarks.worker" in one.cmdline()]) and time.monotonic() < deadline:
            time.sleep(0.1)
        run.terminate()
    assert run.returncode == 128 + signal.SIGTERM
    assert workers
    assert not any(one.is_running() for one in workers)


def test_a_run_with_a_failure_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(python: str, job: Job, settings: Settings) -> None:
        raise BenchmarkError(f"{settings.documents} documents were too many")

    monkeypatch.setattr(cli, "measure_apart", fails)
    assert cli.main(["run", "difference", "lens", "--documents", "3", "9", "--no-peers"]) == 1
    out = capsys.readouterr().out
    assert "3 documents were too many" in out
    assert "9 documents were too many" in out, "each number of documents is measured"


def test_what_a_process_said_last_is_the_error(tiny: Settings) -> None:
    with pytest.raises(BenchmarkError, match="nonsense"):
        processes.measure_apart(sys.executable, PEER_JOBS["lens", "Hugging Face"], replace(tiny, device="nonsense"))


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("Traceback\nValueError: no such head\n", "ValueError: no such head"),
        ("warning\nlast words\n\n", "last words"),
        (
            "[rank1]: Traceback\n[rank1]: torch.OutOfMemoryError: too much\nE1122 errors.py\nx.ChildFailedError: \n=====\n",
            "torch.OutOfMemoryError: too much",
        ),
        ("", ""),
    ],
)
def test_the_last_error_counts_and_not_what_a_launcher_writes_behind_it(stderr: str, said: str) -> None:
    assert processes.last_line(stderr) == said


def test_a_process_that_was_killed_is_said_to_be(tiny: Settings, tmp_path: Path) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\necho 'UserWarning: never mind' >&2\nkill -9 $$\n", encoding="utf-8")
    killed.chmod(0o755)
    with pytest.raises(BenchmarkError, match="killed by signal 9, as one is that needs too much memory"):
        processes.measure_apart(str(killed), PEER_JOBS["lens", "Hugging Face"], tiny)


def test_peers_are_looked_for_and_the_absent_ones_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = processes.find_peers([sys.executable])
    assert found.pythons["transformers"] == sys.executable
    assert set(found.versions) | set(found.absent) == {
        "transformers",
        "peft",
        "transformer_lens",
        "nnsight",
        "eap",
        "circuit_tracer",
        "sae_lens",
        "sparsify",
    }
    answers = {"one": {"eap": {"absent": "no"}, "peft": {"version": "1"}}, "two": {"eap": {"version": "2"}, "peft": {"version": "3"}}}

    def asked(command: Sequence[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, 0, stdout="noise\n" + json.dumps(answers[command[0]]))

    monkeypatch.setattr(subprocess, "run", asked)
    both = processes.find_peers(["one", "two"])
    assert both.pythons == {"peft": "one", "eap": "two"}
    assert both.absent == {}


def test_an_interpreter_that_is_not_there_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="no such program"):
        processes.find_peers([str(Path(sys.prefix) / "nowhere")])
    with pytest.raises(BenchmarkError, match=r"--peers true cannot run the harness \(it is no Python\)"):
        processes.find_peers(["true"])


def test_a_job_s_texts_are_those_of_its_variant_unless_the_command_line_says(tiny: Settings) -> None:
    assert replace(tiny, texts=None).size(Size(8, 16)) == Size(8, 16)
    assert replace(tiny, texts=3, tokens=5).size(Size(8, 16)) == Size(3, 5)
    assert Settings.from_json(json.loads(json.dumps(tiny.to_json()))) == tiny
