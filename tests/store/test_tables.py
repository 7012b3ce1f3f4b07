"""Tables and tensors come back as they were written, and a failed write loses nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope.errors import RunError
from mechscope.store.tables import read_table, read_tensors, write_table, write_tensors

FRAME = pd.DataFrame({"component": ["a3.h5", "m3"], "n": [1, 2], "value": [0.5, np.nan], "chosen": [True, False]})

WRITE_TOO_MUCH = """
import resource, sys
from pathlib import Path
import numpy as np, pandas as pd, torch
from mechscope.errors import RunError
from mechscope.store.tables import write_table, write_tensors
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
write_table(pd.DataFrame({"value": [1.0]}), folder / "old.parquet")
write_tensors({"x": torch.ones(3)}, folder / "old.safetensors")
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
noise = np.random.default_rng(0).random(500_000)
for write in (
    lambda: write_table(pd.DataFrame({"value": noise}), folder / "old.parquet"),
    lambda: write_table(pd.DataFrame({"value": noise}), folder / "new.parquet"),
    lambda: write_tensors({"x": torch.from_numpy(noise)}, folder / "old.safetensors"),
):
    try:
        write()
    except RunError as error:
        print(error)
for file in sorted(folder.iterdir()):
    print("there:", file.name, file.stat().st_size)
"""


def check_nothing_lost(answer: subprocess.CompletedProcess[str], reason: str) -> None:
    assert answer.returncode == 0, answer.stderr
    *refusals, first, second = answer.stdout.splitlines()
    assert [reason in line and "about 3.8 MiB needed" in line and "Free some space" in line for line in refusals] == [True] * 3
    assert ["the old file is intact" in line for line in refusals] == [True, False, True]
    assert first.startswith("there: old.parquet")
    assert second.startswith("there: old.safetensors")
    assert max(int(line.split()[-1]) for line in (first, second)) < 5000


def test_a_file_size_limit_leaves_the_old_table_and_tensors(tmp_path):
    answer = subprocess.run([sys.executable, "-c", WRITE_TOO_MUCH, tmp_path, "100000"], capture_output=True, text=True)
    check_nothing_lost(answer, "File too large")


def test_a_full_disk_leaves_the_old_table_and_tensors(tmp_path):
    mount = f"mount -t tmpfs -o size=200k tmpfs '{tmp_path}'"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a small disk")
    script = tmp_path.parent / f"{tmp_path.name}.py"
    script.write_text(WRITE_TOO_MUCH)
    command = f"{mount} && exec '{sys.executable}' '{script}' '{tmp_path}' 0"
    answer = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True)
    check_nothing_lost(answer, "No space left on device")


def test_a_table_comes_back_as_it_was(tmp_path):
    write_table(FRAME, tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.parquet"), FRAME)


def test_equal_tables_make_equal_files_however_they_came_about(tmp_path):
    # long enough that Parquet cuts pages, which it does where the pieces meet
    whole = pd.DataFrame({"text": [f"{number} " * 30 for number in range(20_000)]})
    frames = {"one": whole, "pieces": pd.concat([whole[:7000], whole[7000:]]), "objects": whole.astype(object)}
    for name, frame in frames.items():
        write_table(frame, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "pieces").read_bytes() == (tmp_path / "objects").read_bytes()


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path):
    path = tmp_path / "seed=1" / "t.parquet"
    write_table(FRAME, path)
    assert list(read_table(path).columns) == list(FRAME.columns)


def test_a_named_index_is_not_lost_in_silence(tmp_path):
    with pytest.raises(ValueError, match=r"index \['component'\].*reset_index"):
        write_table(FRAME.set_index("component"), tmp_path / "t.parquet")


@pytest.mark.parametrize("content", [None, b"PAR1 but no table"], ids=["missing", "damaged"])
def test_an_unreadable_table_is_named(tmp_path, content):
    path = tmp_path / "t.parquet"
    if content:
        path.write_bytes(content)
    with pytest.raises(RunError, match=rf"cannot read the table {path}"):
        read_table(path)


def test_tensors_of_every_kind_come_back_bit_equal_with_their_meta(tmp_path):
    stack = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "bfloat16": stack.bfloat16(),
        "view": stack[1],
        "transposed": stack.t(),
        "tied": stack,
        "tied too": stack,
        "flag": torch.tensor(True),
        "none": torch.empty(0, 2),
    }
    write_tensors(tensors, tmp_path / "t.safetensors", meta={"step": 3, "best": float("inf"), "names": ("é", "b")})
    found, meta = read_tensors(tmp_path / "t.safetensors")
    assert meta == {"step": 3, "best": float("inf"), "names": ["é", "b"]}
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()
    }


def test_truncated_tensors_are_named(tmp_path):
    path = Path(tmp_path / "t.safetensors")
    write_tensors({"x": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(RunError, match=rf"cannot read the tensors in {path}"):
        read_tensors(path)
