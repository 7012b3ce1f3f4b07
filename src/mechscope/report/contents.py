"""What a run folder holds, as the report reads it: tables, settings and manifest, nothing else.

An absent (or empty) table is left out, and so is what would be drawn of it. A table that is there but lacks a column is refused by name, since a page
with silent gaps would be worse than none.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechscope.errors import RunError
from mechscope.report.section import Section
from mechscope.report.sections import sections, table_specs
from mechscope.store.hashing import hash_if_there
from mechscope.store.run import RunFolder
from mechscope.store.tables import read_table


@dataclass(frozen=True)
class Contents:
    """The readable part of a run folder.

    Attributes:
        path: The folder.
        tables: Every table that a section describes, that is there and has rows, but for those that the last command on the folder left out.
        settings: The resolved settings (`study.yaml`).
        manifest: What the result depends on (`manifest.json`).
    """

    path: Path
    tables: Mapping[str, pd.DataFrame]
    settings: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> Contents:
        """Read the run folder at `path`.

        Raises:
            RunError: there is no run folder, it holds no table yet, or a table is damaged or lacks a column.
        """
        run = RunFolder.read(path)
        left_out = run.manifest.get("page", {}).get("left_out", ())
        tables = {name: table for name, table in read_tables(run.path).items() if name not in left_out}
        if not tables:
            raise RunError(
                f"{run.path} holds no table to report on: run `mechscope diff`, `mechscope circuit` or `mechscope study` with --out {run.path} first"
            )
        return cls(run.path, tables, run.settings, run.manifest)

    @property
    def sections(self) -> list[Section]:
        """The sections that this run is about, in order: those its job names, and after them any other that its tables fill."""
        known = sections()
        named = [name for name in self.manifest.get("page", {}).get("sections", []) if name in known]
        further = [name for name, section in known.items() if name not in named and section.tables and section.present(self.tables)]
        return [known[name] for name in (*named, *further) if known[name].adds or known[name].present(self.tables)]

    @property
    def edited(self) -> list[str]:
        """The names of the tables shown whose file is not what a finished stage wrote: changed since, or put there by hand.

        Of a run without any recorded table, such as one that was killed in its first stage, nothing can be said.
        """
        recorded = {name: digest for record in self.manifest.get("stages", {}).values() for name, digest in record["outputs"].items()}
        files = {name: f"tables/{name}.parquet" for name in self.tables}
        if not any(name.startswith("tables/") for name in recorded):
            return []
        return [name for name, file in files.items() if recorded.get(file) != hash_if_there(self.path / file)]

    @property
    def commands(self) -> list[str]:
        """The commands that began and continued the run, in order, each as one line that a shell reads."""
        return [shlex.join(map(str, command)) for command in self.manifest.get("commands", [])]

    @property
    def title(self) -> str:
        """The title of the page, as the job gave it."""
        return str(self.manifest.get("page", {}).get("title", "A run of mechscope"))


def read_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Return every table of a run folder that a section describes, unless it is empty.

    Raises:
        RunError: a table is damaged or lacks a column.
    """
    tables = {}
    for name, spec in table_specs().items():
        file = folder / "tables" / f"{name}.parquet"
        if not file.exists():
            continue
        table = read_table(file)
        if missing := [column for column in spec.required if column not in table]:
            raise RunError(f"{file} lacks {', '.join(missing)}: it was not written by this version of mechscope; run the job again")
        if len(table):
            tables[name] = table.reset_index(drop=True)
    return tables


def leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield the leaves of nested mappings with their paths, in order; a list of scalars is one leaf."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, str(i)))
    else:
        yield path, value


def problems(manifest: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Return every counted problem of the data: where the manifest has it, what it is, how many."""
    counted = []
    for path, value in leaves(manifest):
        if "problems" in path[:-1] and isinstance(value, int) and not isinstance(value, bool):
            at = path.index("problems")
            counted.append((" · ".join(path[:at]), " ".join(path[at + 1 :]).replace("_", " "), value))
    return counted
