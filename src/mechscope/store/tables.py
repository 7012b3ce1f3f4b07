"""Tables as Parquet and tensors as safetensors, written atomically.

Equal frames give equal bytes: the index and pandas' own metadata (which names library versions) stay out, text has one Arrow type, chunks
are joined. A tensor file may carry one JSON value in its header, so that numbers and what they mean are one file and cannot disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mechscope.errors import RunError
from mechscope.store.files import atomic


def to_arrow(table: pd.DataFrame) -> pa.Table:
    """Convert a frame to the one Arrow table that all equal frames share.

    Raises:
        ValueError: the frame has a named index, whose values would be lost.
    """
    if any(name is not None for name in table.index.names):
        raise ValueError(f"the index {list(table.index.names)} would not be stored: call reset_index() first")
    arrow = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    # pandas' str and object columns come as large_string and string; the large one has no 2 GiB limit
    fields = [field.with_type(pa.large_string()) if field.type == pa.string() else field for field in arrow.schema]
    return arrow.cast(pa.schema(fields)).combine_chunks()


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table to a Parquet file, atomically and with the same bytes for equal tables.

    Args:
        table: one row per thing, plain column names; the (unnamed) index is not stored.
        path: the file to make or to replace.

    Raises:
        RunError: the file could not be written (disk full, no permission); an old table at `path` is intact.
    """
    arrow = to_arrow(table)
    with atomic(path, size=arrow.nbytes) as temporary:
        pq.write_table(arrow, temporary, compression="zstd")


def read_table(path: Path) -> pd.DataFrame:
    """Read a table that `write_table` wrote; `RunError` where the file is missing or not Parquet."""
    try:
        # not pq.read_table: it would take a folder named "seed=1" above the file for a column
        with pq.ParquetFile(path) as file:
            return file.read().to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"cannot read the table {path}: {error}. Delete it and run the study again: it makes the table anew.") from error


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, *, meta: Any = None) -> None:
    """Write named tensors, and a JSON-able value that belongs to them, to one safetensors file, atomically.

    Args:
        tensors: any dtypes, shapes and devices; tied tensors are stored once per name.
        path: the file to make or to replace.
        meta: kept in the file's header; tuples come back as lists, keys as text.

    Raises:
        RunError: the file could not be written; an old one at `path` is intact.
    """
    plain: dict[str, torch.Tensor] = {}
    stored: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses two names for one storage
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in stored else tensor
        stored.add(storage)
    # one header entry only: safetensors does not promise an order for several, and equal input shall give equal bytes
    header = {"meta": json.dumps(meta)}
    with atomic(path, size=sum(tensor.nbytes for tensor in plain.values())) as temporary:
        try:
            save_file(plain, temporary, metadata=header)
        except SafetensorError as error:
            # safetensors tells the system's error number only in its message
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else 0, str(error)) from error


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Read the tensors (on the CPU) and the JSON value that `write_tensors` put into `path`; `RunError` where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            return tensors, json.loads((file.metadata() or {}).get("meta", "null"))
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot read the tensors in {path}: {error}. Delete the file and run again: it is made anew.") from error
