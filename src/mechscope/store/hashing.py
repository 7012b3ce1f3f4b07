"""Fingerprints (sha256, hexadecimal) of what a study reads and writes.

One thing, one fingerprint, wherever it lives: tensors are hashed by value, not by storage, order or device; tables by their columns and
values, not by the file format; JSON in one canonical spelling; folders by relative names and contents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mechscope.errors import ModelError, RunError
from mechscope.store.tables import to_arrow


def hash_bytes(data: bytes) -> str:
    """Return the sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_if_there(path: Path) -> str | None:
    """Return the sha256 of a file's content, or None where there is no file."""
    return hash_file(path) if path.is_file() else None


def hash_folder(path: Path, pattern: str = "**/*") -> str:
    """Return the fingerprint of the files under a folder: their relative names and contents.

    Args:
        path: the folder; links to files are followed (a model hub's cache is made of them).
        pattern: which files count, as a glob relative to the folder.

    Raises:
        RunError: `path` is not a folder.
    """
    if not path.is_dir():
        raise RunError(f"{path} is not a folder, so it has no fingerprint: check the path")
    return hash_json({file.relative_to(path).as_posix(): hash_file(file) for file in path.glob(pattern) if file.is_file()})


def hash_json(value: Any) -> str:
    """Return the fingerprint of a JSON-able value: key order and tuple-or-list do not matter, 1 and 1.0 differ."""
    return hash_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def hash_state(tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the fingerprint of named tensors, whatever their order, strides and device.

    Every name, dtype, shape and bit counts. Tensors are taken one at a time, so an iterator that loads them lazily stays lazy.

    Args:
        tensors: a state dict, or pairs as `named_parameters()` gives them; any dtype.

    Raises:
        ModelError: a tensor has no data (meta device).
    """
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    return hash_json(sorted((name, _hash_tensor(name, tensor)) for name, tensor in pairs))


def hash_table(table: pd.DataFrame) -> str:
    """Return the fingerprint of a table: its column names, types and values in their order; missing values are all alike.

    The values are spelled out as JSON, which is exact but slow (about a second per million values).
    """
    arrow = to_arrow(table)
    # column by column, so that only one is spelled out at a time
    return hash_json(
        [(field.name, str(field.type), hash_json(column.to_pylist())) for field, column in zip(arrow.schema, arrow.columns, strict=True)]
    )


def short(digest: str) -> str:
    """Return the first 12 digits, enough to tell the things of one study apart and to read out."""
    return digest[:12]


def _hash_tensor(name: str, tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        raise ModelError(f"tensor {name} has no data (it is on the meta device): load the weights before taking their fingerprint")
    digest = hashlib.sha256(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    # seen as bytes, because numpy has no bfloat16 or float8
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
