"""A fingerprint says whether two things are the same thing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mechscope.errors import ModelError, RunError
from mechscope.store.hashing import hash_bytes, hash_file, hash_folder, hash_json, hash_state, hash_table
from mechscope.store.tables import read_table, write_table


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "weight": torch.randn(5, 3, dtype=torch.bfloat16),
        "bias": torch.randn(3),
        "scale": torch.tensor(2.0, dtype=torch.float64),
        "empty": torch.empty(0, 4),
    }


def test_bytes_have_the_published_sha256_of_abc(tmp_path):
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert hash_bytes(b"abc") == hash_file(tmp_path / "abc") == expected


def test_a_state_is_the_same_in_any_order_and_from_an_iterator():
    assert hash_state(state()) == hash_state(iter(reversed(state().items())))


def test_a_state_is_the_same_whatever_its_strides():
    transposed = state() | {"weight": state()["weight"].t().contiguous().t()}
    assert not transposed["weight"].is_contiguous()
    assert hash_state(transposed) == hash_state(state())


@pytest.mark.parametrize("name", ["weight", "bias", "scale"])
def test_one_changed_bit_changes_a_state(name):
    changed = state()
    changed[name].reshape(-1).view(torch.uint8)[-1] ^= 1
    assert hash_state(changed) != hash_state(state())


@pytest.mark.parametrize(
    "other",
    [
        {"w": torch.zeros(4), "other": torch.ones(4)},
        {"w": torch.zeros(4, dtype=torch.int32), "v": torch.ones(4)},
        {"w": torch.zeros(2, 2), "v": torch.ones(4)},
        {"w": torch.ones(4), "v": torch.zeros(4)},
        {"w": torch.zeros(4)},
    ],
    ids=["name", "dtype", "shape", "swapped", "missing"],
)
def test_name_dtype_shape_and_assignment_count(other):
    assert hash_state(other) != hash_state({"w": torch.zeros(4), "v": torch.ones(4)})


def test_a_tensor_without_data_has_no_fingerprint():
    with pytest.raises(ModelError, match=r"tensor w .*meta device.*load the weights"):
        hash_state({"w": torch.empty(2, device="meta")})


def test_json_keys_have_no_order_and_values_do():
    assert hash_json({"a": 1, "b": (1, 2)}) == hash_json({"b": [1, 2], "a": 1})
    assert hash_json([1, 2]) != hash_json([2, 1])


def test_a_folder_is_its_names_and_contents_wherever_it_is(tmp_path):
    for name in ("one", "two", "renamed", "edited"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / ("b" if name == "renamed" else "a")).write_text("x" if name != "edited" else "y")
    assert hash_folder(tmp_path / "one") == hash_folder(tmp_path / "two")
    assert len({hash_folder(tmp_path / name) for name in ("one", "renamed", "edited")}) == 3


def test_a_missing_folder_has_no_fingerprint(tmp_path):
    with pytest.raises(RunError, match="not a folder"):
        hash_folder(tmp_path / "absent")


def frame() -> pd.DataFrame:
    return pd.DataFrame({"name": ["a", None], "value": [0.1, np.nan], "n": [1, 2]})


def test_a_table_is_the_same_after_it_was_written_and_read(tmp_path):
    write_table(frame(), tmp_path / "t.parquet")
    assert hash_table(read_table(tmp_path / "t.parquet")) == hash_table(frame())


@pytest.mark.parametrize(
    "other",
    [
        frame().rename(columns={"n": "m"}),
        frame().astype({"n": "float64"}),
        frame()[::-1],
        frame()[["value", "name", "n"]],
        frame().assign(value=[np.nextafter(0.1, 1), np.nan]),
        frame().assign(value=[0.1, 0.0]),
    ],
    ids=["name", "type", "row order", "column order", "last bit", "missing is not zero"],
)
def test_another_table_has_another_fingerprint(other):
    assert hash_table(other) != hash_table(frame())
