"""Names that a user gives: whether one can only be a path, what is wrong with the place, and what stands there that is nearly so called.

A model or a data set may be a path or the id of one on the hub, and a slip in a path must not become half a minute of asking the hub. Nothing heavy is
imported: the command line asks here before it loads anything.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from mechscope.errors import ModelError

FILE_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
"""Ends of the names of data files."""
# names that share fewer of their letters than this (difflib's ratio) are hardly one name and a slip
_ALIKE = 0.8


def is_path(name: str) -> bool:
    """Tell whether a name can only be a path: the id of a model or data set on the hub neither begins so nor ends so."""
    return name.startswith(("/", ".", "~")) or name.lower().endswith(FILE_ENDINGS)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return what is nearly called like a name, or None."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE)
    return close[0] if close else None


def located(name: str | Path) -> str:
    """Return a name as text, a path below the home folder (`~/model`) with that folder written out."""
    text = str(name)
    return str(Path(text).expanduser()) if text.startswith("~") else text


def absent(name: str) -> str | None:
    """Say what is wrong where a name is a path at which nothing stands; None where something does, or where it may be an id on the hub.

    A name of two parts, such as `runs/tuend`, or with an end, such as `articles.jsnl`, is a path where something nearly so called stands in that folder.
    """
    path = Path(name).expanduser()
    if path.exists():
        return None
    close = nearest(path.name, _beside(path))
    hint = f"; did you mean {Path(name).parent / close}?" if close is not None else ""
    if is_path(name):
        return f"no such {'file' if name.lower().endswith(FILE_ENDINGS) else 'folder'}{hint}"
    return f"nothing there{hint}" if hint and ("/" in name or path.suffix) else None


def data_file_like(name: str) -> str | None:
    """Return the data file in the current folder that is nearly called like a name without an end, or None."""
    files = {file.stem: file.name for file in Path().iterdir() if file.name.lower().endswith(FILE_ENDINGS)}
    close = nearest(name, files)
    return None if close is None else files[close]


def _beside(path: Path) -> list[str]:
    try:
        return [other.name for other in path.parent.iterdir()]
    except OSError:
        return []


def check_model_path(source: str) -> None:
    """Refuse a model whose source is a path at which there is none.

    Args:
        source: Hub id, directory, or adapter.

    Raises:
        ModelError: Nothing is there, it is a file, or a folder that cannot be read or holds neither a model nor an adapter.
    """
    if problem := absent(source):
        raise ModelError(f"model {source!r}: {problem}")
    folder = Path(source).expanduser()
    if folder.is_file():
        raise ModelError(f"model {source!r} is a file: give the directory that holds config.json and the weights")
    if not folder.is_dir():
        return
    try:
        held = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ModelError(
            f"model {source!r} cannot be read: {error.strerror or error}: make the folder readable, or give another"
        ) from error
    if not {"config.json", "adapter_config.json"}.intersection(held):
        contents = ", ".join(held[:6]) or "nothing"
        raise ModelError(
            f"directory {source!r} is not a model: it has no config.json (it holds {contents}); give a directory written by save_pretrained"
        )
