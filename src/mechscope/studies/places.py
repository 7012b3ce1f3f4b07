"""Where runs go and where models and data come from: a new folder's name, and paths that are not there, found before anything heavy is imported."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechscope.errors import SettingsError

if TYPE_CHECKING:
    from mechscope.store.run import RunFolder
    from mechscope.studies.job import Job

# what can only be a path: a hub id neither begins like this nor ends like that
_BEGINS = ("/", "./", "../", "~")
_ENDS = (".jsonl", ".json", ".csv", ".parquet")
# settings that name models, documents or prompt pairs; pairs may name a file behind a colon
_SOURCES = ("tuned", "data", "validation_data", "test_data", "pairs")


def new_run(job: str, root: Path = Path("runs")) -> Path:
    """Return a folder for a run that was given none: `runs/JOB-DATE-N` with the first N that is free."""
    number = 1
    while (folder := root / f"{job}-{date.today().isoformat()}-{number}").exists():
        number += 1
    return folder


def check_paths(job: Job[Any], settings: Any) -> None:
    """Refuse models and data that are named by a path where there is nothing.

    Raises:
        SettingsError: A path is not there.
    """
    for leaf in job.options:
        value = leaf.read(settings)
        if isinstance(value, str) and (leaf.name in job.arguments or leaf.name in _SOURCES):
            check_source(f"setting {leaf.name!r}", value)
        elif isinstance(value, str) and leaf.name == "controls":
            for source in value.split(","):
                check_source("setting 'controls'", source.strip().removeprefix("seed:").removeprefix("shuffled:").removeprefix("other:"))
        elif isinstance(value, str) and leaf.name == "like" and not Path(value).expanduser().is_dir():
            raise SettingsError(f"setting 'like' is {value!r}: no such folder")


def check_source(name: str, source: str) -> None:
    """Refuse a source that can only be a path where there is nothing.

    Args:
        name: What names it, for the error.
        source: A hub id, a path, a word such as `newsroom`, or a kind and a path such as `facts:FILE`.

    Raises:
        SettingsError: The path is not there.
    """
    kind, colon, rest = source.partition(":")
    place = rest if colon and kind in ("facts", "salience") else source
    is_path = place.startswith(_BEGINS) or place.lower().endswith(_ENDS)
    if is_path and not Path(place).expanduser().exists():
        raise SettingsError(f"{name} is {source!r}: no such {'file' if place.lower().endswith(_ENDS) else 'folder'}")


def table_names(folder: RunFolder) -> list[str]:
    """Return the names of a run's tables."""
    outputs = (name for stage in folder.manifest["stages"].values() for name in stage["outputs"])
    return sorted(Path(name).stem for name in outputs if name.startswith("tables/"))
