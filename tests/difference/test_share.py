"""A difference that was interrupted or killed goes on with the batches that are left, to the tables of one that was not disturbed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechscope.difference import Difference, lockstep, one_pass
from mechscope.instrument import Execution
from mechscope.store.run import RunFolder
from tests.difference import oracle
from tests.difference.test_one_pass import assert_equal_tables, run


def staged(folder: Path, progress: Any = None, *, tokens: int = 46, dtype: torch.dtype = torch.float32) -> tuple[Difference, bool]:
    """Run in a stage of a run folder that saves after every batch; tell whether it continued from a checkpoint."""
    with RunFolder.open(folder, {}, kind="test") as run_folder, run_folder.stage("difference", {"of": "test"}) as stage:
        resumed = any((folder / "work").rglob("checkpoint*"))
        execution = Execution(tokens_per_batch=tokens, progress=progress)
        return run(oracle.models("gpt2", dtype), stage=stage, checkpoint_seconds=0, execution=execution), resumed


class Stopped(Exception):
    """Raised to interrupt."""


def interrupted(folder: Path, documents: int, **options: Any) -> None:
    """Stop in a stage after so many documents."""

    def stop(label: str, done: int, total: int) -> None:
        if label == "comparing documents" and done >= documents:
            raise Stopped

    with pytest.raises(Stopped):
        staged(folder, stop, **options)


@pytest.mark.parametrize("documents", [3, 5])
def test_an_interrupted_difference_continues_to_equal_tables(tmp_path: Path, documents: int):
    measured: list[int] = []
    interrupted(tmp_path, documents)
    found, resumed = staged(tmp_path, lambda label, done, total: measured.append(done) if label == "comparing documents" else None)
    assert resumed
    assert measured[0] > 2, "documents measured before the interruption were measured again"
    undisturbed = run(oracle.models("gpt2", torch.float32))
    assert_equal_tables(found, undisturbed)
    assert np.array_equal(found.replicates("entropy_change"), undisturbed.replicates("entropy_change"))


@pytest.mark.parametrize(
    ("asked", "lengths"),
    [(25, [[17], [14], [12, 9], [12, 9]]), (12, [[17], [14], [12], [12], [9]]), (1000, [[17, 14], [12, 9], [12, 9]])],
)
def test_a_difference_goes_on_in_smaller_batches_where_these_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int, lengths: list[list[int]]
):
    # in float64, since other batches round otherwise
    interrupted(tmp_path, 3, dtype=torch.float64)  # the documents of 23 and 20 tokens are done; a batch holds 46
    seen: list[list[int]] = []

    def launch(pairs: Any, batch: Any, **options: Any) -> Any:
        seen.append([len(example) for example in batch.examples])
        return lockstep.launch(pairs, batch, **options)

    monkeypatch.setattr(one_pass, "launch", launch)
    interrupted(tmp_path, 5, tokens=asked, dtype=torch.float64)  # the last batch before it stops is done again
    found, resumed = staged(tmp_path, dtype=torch.float64)
    assert resumed
    assert seen == lengths
    assert_equal_tables(found, run(oracle.models("gpt2")), rtol=1e-6, atol=1e-9)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(int(sys.argv.pop()))
from tests.difference import test_share

def kill(label, done, total):
    if done >= 3:
        os.kill(os.getpid(), signal.SIGKILL)

test_share.staged(test_share.Path(sys.argv[1]), kill)
"""


def test_a_killed_difference_continues_to_equal_tables(tmp_path: Path):
    project = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(project), str(torch.get_num_threads())]
    assert subprocess.run(command, check=False, timeout=300).returncode == -9
    found, resumed = staged(tmp_path)
    assert resumed
    assert_equal_tables(found, run(oracle.models("gpt2", torch.float32)))
