"""Result files as tables of a markdown page, between `<!-- generated: NAME -->` and `<!-- end -->`; the rest of the page is left alone.

NAME is the result file's, without `.json`. The table says when, where, with what versions and by which command it was measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.processes import text_of
from benchmarks.results import Results
from benchmarks.settings import FORWARD, BenchmarkError

_BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_COLUMNS = ("job", "by", "text", "seconds", "±", "forward passes", "GiB above the models", "target", "numbers differ by")


def written(page: str, tables: Mapping[str, str]) -> str:
    """Return a page with its blocks replaced.

    Raises:
        BenchmarkError: The page has no block of a name.
    """
    names = [found["name"] for found in _BLOCK.finditer(page)]
    for name in tables:
        if name not in names:
            raise BenchmarkError(
                f"the page has no block {name!r} (it has {', '.join(names) or 'none'}): add the lines <!-- generated: {name} --> and <!-- end -->"
            )
    return _BLOCK.sub(lambda found: f"{found[1]}{tables[found['name']]}{found[3]}" if found["name"] in tables else found[0], page)


def write_tables(page: Path, files: Mapping[str, Results]) -> None:
    """Write result files into a page, by their names.

    Raises:
        BenchmarkError: The page cannot be read or written, or has no block of a name.
    """
    write_blocks(page, {name: table(results) for name, results in files.items()})


def write_blocks(page: Path, blocks: Mapping[str, str], *, try_only: bool = False) -> None:
    """Replace blocks of a page.

    Args:
        page: The markdown file.
        blocks: Their new text, by name.
        try_only: Only see whether that can be done, before hours are spent on what is to be written.

    Raises:
        BenchmarkError: The page cannot be read or written, or has no block of a name.
    """
    try:
        text = written(page.read_text(encoding="utf-8"), blocks)
        with page.open("a" if try_only else "w", encoding="utf-8") as file:
            if not try_only:
                file.write(text)
    except OSError as error:
        raise BenchmarkError(f"{page}: {error.strerror}: name a page with --page") from error


def table(results: Results) -> str:
    """Return a result file as markdown."""
    lines = ["", f"{_where(results.head)}", ""]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for name, records in groupby(results.records, lambda record: record["job"]):
        first = True
        for record in records:
            lines.append("| " + " | ".join(_cells(record, f"{record['what']} (`{name}`)" if first else "the same", results.head)) + " |")
            first = False
    lines.append("")
    for failure in results.failures:
        lines.append(f"Failed: `{failure['job']}` by {failure['by']}: {failure['error']}")
    named = {entry["job"] for entry in (*results.records, *results.failures)}
    if left := [name for name in results.head["jobs"] if name not in named]:
        lines += ["Not finished: " + ", ".join(f"`{name}`" for name in left) + "."]
    if absent := results.head["absent"]:
        lines += ["Absent, so not measured: " + "; ".join(f"{name} ({why})" for name, why in sorted(absent.items())) + "."]
    return "\n".join(lines).rstrip() + "\n\n"


def _where(head: Mapping[str, Any]) -> str:
    machine, settings = head["machine"], head["settings"]
    shape = settings["shape"]
    parts = [
        f"Measured on {head['date']} with `{head['command']}`",
        f"on {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}"
        + "".join(f", {name}" for name in machine["accelerators"])
        + f" (load {machine['load']} at the start)",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in (head["versions"] | head["peers"]).items())
    model = (
        f"{shape['layers']} layers × {shape['heads']} heads × {64 * shape['heads']}, {shape['vocabulary']:,} words, "
        f"{shape['positions']:,} positions, random weights, float32"
    )
    return f"{' '.join(parts)}; {settings['threads']} threads on {settings['device']}. {versions}. Model: {model}."


def _cells(record: Mapping[str, Any], what: str, head: Mapping[str, Any]) -> list[str]:
    seconds = f"{record['seconds']:.3g}" if record["seconds"] < 100 else f"{record['seconds']:,.0f}"
    noise = "one round" if record["noise"] is None else f"{100 * record['noise']:.0f} %"
    passes = "–" if record["passes"] is None else f"{record['passes']:.3g}"
    who = record["by"] + (f" {version}" if (version := head["peers"].get(record.get("package", ""))) else "")
    return [what, who, text_of(dict(record)), seconds, noise, passes, f"{record['memory_gib']:.2f}", _targets(record), _agreement(record)]


def _targets(record: Mapping[str, Any]) -> str:
    """Say what the job's ratio and memory are, and were to be, where they are more than forward passes."""
    targets, beside, said = record["targets"], record["beside"], []
    if beside is not None:
        own = beside["name"] == FORWARD and beside["count"] == 1
        of = beside["name"] if beside["count"] == 1 else f"{beside['count']} × {beside['name']}"
        if not own or targets["ratio"] is not None:
            said.append(_target(record["ratio"], targets["ratio"], f"× {of}"))
    if targets["memory_ratio"] is not None and record["memory_ratio"] is not None:
        said.append(_target(record["memory_ratio"], targets["memory_ratio"], "× its memory"))
    if targets["gib"] is not None:
        said.append(_target(record["memory_gib"], targets["gib"], "GiB"))
    if beside is None:
        said.append(f"process's peak {record['loaded_gib'] + record['memory_gib']:.2f} GiB")
    return "; ".join(said) or "–"


def _target(value: float, most: float | None, unit: str) -> str:
    if most is None:
        return f"{value:.3g} {unit}"
    return f"{value:.3g} {unit} (≤ {most:g}{'' if value <= most else ', **missed**'})"


def _agreement(record: Mapping[str, Any]) -> str:
    found = record.get("agreement")
    if found is None:
        return "–"
    return f"{found['difference']:.0e}" + ("" if found["same"] else " (**not the same work**)")
