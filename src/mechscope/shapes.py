"""How values with tensors and tables print: types, shapes and short values, never the numbers themselves.

`__repr__ = by_shape` in a class's body is all that it takes. Nothing heavy is imported: a tensor is what has a shape and a dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Any

# characters of a text, and entries of a list, that are printed whole
_LONGEST, _MOST = 60, 6


def by_shape(value: Any) -> str:
    """Return a dataclass as text: its name and its fields, tensors and tables by shape, long lists by their number.

    Fields that are None, empty, or left out of the dataclass's own repr are left out.
    """
    shown = [
        f"{field.name}={short(held)}"
        for field in dataclasses.fields(value)
        if field.repr and (held := getattr(value, field.name)) is not None and not (isinstance(held, Collection) and _empty(held))
    ]
    return f"{type(value).__name__}({', '.join(shown)})"


def short(value: Any) -> str:
    """Return one value as text of a few words: `float32 (2, 14, 64)`, `24 rows × 12 columns`, `tuple of 40`."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
    if shape is not None and hasattr(value, "columns"):
        return f"{shape[0]:,} rows × {shape[1]} columns"
    if isinstance(value, str | PurePath):
        text = str(value)
        return repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, tuple | list | set | frozenset):
        if len(value) > _MOST:
            return f"{type(value).__name__} of {len(value):,}"
        inside = ", ".join(short(each) for each in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})" if isinstance(value, tuple) else f"{{{inside}}}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if hasattr(value, "named_parameters"):
        return type(value).__name__
    text = repr(value)
    # a value within a value: what is in it is asked of itself
    return text if len(text) <= _LONGEST else f"{type(value).__name__}(…)"


def _mapping(value: Mapping[Any, Any]) -> str:
    if len(value) > _MOST:
        return f"{len(value):,} entries"
    return "{" + ", ".join(f"{short(key)}: {short(held)}" for key, held in value.items()) + "}"


def _empty(value: Collection[Any]) -> bool:
    # the length of a table is its rows: a table without rows is still printed
    return not hasattr(value, "shape") and len(value) == 0
