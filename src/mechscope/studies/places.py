"""Where runs go and where models and data come from: a new folder's name, and paths that are not there, found before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechscope.choices import CORPORA, PAIR_KINDS, PAIR_TASKS
from mechscope.errors import ModelError, SettingsError
from mechscope.store.paths import absent, check_model_path, is_path, nearest
from mechscope.store.series import Series

if TYPE_CHECKING:
    from mechscope.store.run import RunFolder
    from mechscope.studies.job import Job


def new_run(job: str, root: Path = Path("runs")) -> Path:
    """Return a folder for a run that was given none: `runs/JOB-DATE-N` with the first N that is free."""
    number = 1
    while (folder := root / f"{job}-{date.today().isoformat()}-{number}").exists():
        number += 1
    return folder


def check_paths(job: Job[Any], settings: Any) -> None:
    """Refuse models, data and files that are named by a path where there is nothing, and words that are a slip for known ones.

    Raises:
        SettingsError: A path is not there, or a word is not known.
    """
    for leaf in job.options:
        value = leaf.read(settings)
        check = _CHECKS.get(leaf.name, check_model if leaf.name in job.arguments else None)
        if isinstance(value, str) and check is not None:
            check(f"setting {leaf.name!r}", value)


def check_model(name: str, source: str) -> None:
    """Refuse a model that is not there; `name` is what names it, for the error."""
    try:
        check_model_path(source)
    except ModelError as error:
        # in one form, whichever setting it is: BASE is '/nope/model': no such folder
        problem = absent(source)
        raise SettingsError(f"{name} is {source!r}: {problem}" if problem else f"{name}: {error}") from error


def _check_file(name: str, source: str) -> None:
    """Refuse a file that is not there."""
    if not Path(source).expanduser().exists():
        raise SettingsError(f"{name} is {source!r}: {absent(source) or 'no such file'}")


def _check_documents(name: str, source: str) -> None:
    """Refuse documents that are a path where there is nothing, or a folder, or nearly a known word."""
    if problem := absent(source):
        raise SettingsError(f"{name} is {source!r}: {problem}")
    if Path(source).expanduser().is_dir():
        raise SettingsError(f"{name} is {source!r}: a folder; name one data file")
    if not Path(source).exists() and (close := nearest(source, CORPORA)) not in (None, source):
        raise SettingsError(f"{name} is {source!r}: neither a file here nor a known corpus: did you mean {close}?")


def _check_pairs(name: str, source: str) -> None:
    """Refuse prompt pairs that are neither a file nor a known word: nothing else can be meant."""
    kind, colon, rest = source.partition(":")
    place = rest if colon and kind in ("facts", "salience") else source
    if source in PAIR_TASKS or (kind in PAIR_KINDS and place == source) or Path(place).expanduser().exists():
        return
    if kind == "salience":
        _check_documents(name, place)
    elif is_path(place) or kind == "facts":
        raise SettingsError(f"{name} is {source!r}: {absent(place) or 'no such file'}")
    else:
        close = nearest(source, PAIR_TASKS) or nearest(kind, PAIR_KINDS)
        known = ", ".join([*PAIR_TASKS, *(f"{word}:…" for word in PAIR_KINDS)])
        raise SettingsError(
            f"{name} is {source!r}: neither a file here nor known: {f'did you mean {close}?' if close else f'known are {known}'}"
        )


def _check_circuit(name: str, source: str) -> None:
    """Refuse a circuit's file that is not there; components by name are no file."""
    if source.endswith(".json"):
        _check_file(name, source)


def _each(check: Callable[[str, str], None]) -> Callable[[str, str], None]:
    def of_all(name: str, sources: str) -> None:
        for source in sources.split(","):
            check(name, source.strip())

    return of_all


def _check_control(name: str, source: str) -> None:
    for kind in ("seed:", "shuffled:", "other:"):
        source = source.removeprefix(kind)
    check_model(name, source)


def _check_series(name: str, source: str) -> None:
    """Refuse a series on this machine that is none; one on the hub is asked for later."""
    if "," in source or is_path(source) or Path(source).exists() or absent(source):
        try:
            Series.find(source)
        except ModelError as error:
            raise SettingsError(f"{name}: {error}") from error


def _known(name: str, value: str) -> None:
    """Accept what the settings themselves have checked."""


# what settings of a name hold, in whatever job
_CHECKS: dict[str, Callable[[str, str], None]] = {
    **dict.fromkeys(("tuned", "base"), check_model),
    **dict.fromkeys(("data", "validation_data", "test_data", "lens_data", "neutral"), _check_documents),
    **dict.fromkeys(("runs", "hypothesis", "positive", "negative", "like", "edits"), _check_file),
    **dict.fromkeys(("target_circuit", "targets"), _check_circuit),
    "pairs": _check_pairs,
    "series": _check_series,
    "job": _known,
    "checkpoints": _each(check_model),
    "dictionary": _each(_check_file),
    "controls": _each(_check_control),
}


def table_names(folder: RunFolder) -> list[str]:
    """Return the names of a run's tables."""
    outputs = (name for stage in folder.manifest["stages"].values() for name in stage["outputs"])
    return sorted(Path(name).stem for name in outputs if name.startswith("tables/"))
