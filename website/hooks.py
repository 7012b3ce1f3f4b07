"""What mkdocs puts into the site beside docs/*.md: commands and functions from the jobs and packages, notebooks, and the figures of a run.

Nothing generated is committed. The gallery shows the run that `MECHSCOPE_GALLERY` names; without one it says how to make it.
"""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

from mechscope.api import python_name
from mechscope.errors import MechscopeError
from mechscope.report.contents import Contents
from mechscope.report.sections import sections
from mechscope.studies.job import Job
from mechscope.studies.jobs import jobs
from website import notebooks

PACKAGES = ("causal", "circuits", "lens", "heads", "weights", "difference", "adapt", "instrument", "subject")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, content in generated().items():
        files.append(File.generated(config, name, content=content))
    return files


def generated() -> dict[str, str | bytes]:
    """Return every generated file of the site by its path in docs."""
    made: dict[str, str | bytes] = {"reference/commands.md": commands(), "reference/index.md": _python()}
    for package in PACKAGES:
        made[f"reference/{package}.md"] = f"::: mechscope.{package}\n    options:\n      heading_level: 1\n"
    titles = {}
    for path in notebooks.paths():
        text, pictures = notebooks.page(path)
        titles[path.stem] = text.partition("\n")[0].removeprefix("# ")
        made[f"notebooks/{path.stem}.md"] = f"{text}\n[This page as a notebook]({path.name})\n"
        made |= {f"notebooks/{name}": picture for name, picture in pictures.items()}
    listed = "\n".join(f"- [{title}]({name}.md)" for name, title in titles.items())
    made["notebooks/index.md"] = f"# Notebooks\n\nExecuted on the embedded model; each runs offline in about a minute.\n\n{listed}\n"
    return made | gallery(os.environ.get("MECHSCOPE_GALLERY"))


def commands() -> str:
    """Return the page of all commands: what each does, an example, its settings with defaults, and what it writes."""
    return "\n".join(["# Commands\n", *(line for job in jobs().values() for line in _command(job))])


def _command(job: Job[Any]) -> Iterator[str]:
    name = f"{job.group} {job.name}".strip()
    yield f"## mechscope {name}\n\n{_inline(job.help)}\n\n```\n{job.example}\n```\n\nIn Python: `mechscope.{python_name(job)}`.\n"
    known = sections()
    tables = [table for section in job.sections if section in known for table in known[section].tables]
    if tables:
        links = ", ".join(f"[`{table}`](../tables.md#{table})" for table in tables)
        yield f"Tables: {links}.\n"
    if job.options:
        yield '??? note "Settings"\n\n    | setting | default | meaning |\n    |---|---|---|'
        for leaf in job.options:
            default = "required" if leaf.default is dataclasses.MISSING else "`{}`".format(str(leaf.default).replace("\n", "\\n"))
            yield f"    | `{leaf.name}` | {default} | {_inline(leaf.help)} |"
        yield ""


def _python() -> str:
    """Return the page that leads to the packages."""
    listed = "\n".join(f"- [`mechscope.{package}`]({package}.md)" for package in PACKAGES)
    functions = "\n".join(f"- `mechscope.{python_name(job)}`: {_inline(job.help)}" for job in jobs().values())
    return (
        "# Python\n\nEvery [command](commands.md) is a function, with its settings as keywords; models, documents and pairs may be given in memory. "
        "It returns the tables by name and as attributes, `plots` and `plot(name)`.\n\n"
        f"{functions}\n\n`mechscope.plot(tables, name)` draws the page's figures of any tables. The techniques themselves:\n\n{listed}\n"
    )


def gallery(run: str | None) -> dict[str, str | bytes]:
    """Return the gallery: every figure of a run, by section, with title and caption.

    Raises:
        MechscopeError: There is no such run.
    """
    head = "# Gallery\n\nThe figures of the report, as they stand in a run's folder `figures`.\n"
    if not run:
        return {
            "gallery.md": f"{head}\nBuilt without a run: `make demo` makes one, and `make docs GALLERY=runs/demo` shows its figures here.\n"
        }
    contents, parts, made = Contents.read(run), [head], dict[str, bytes]()
    parts.append(f"These are of one run: {html.escape(contents.title)}.\n")
    for section in contents.sections:
        figures = section.drawn(contents.tables) if section.present(contents.tables) else []
        if figures:
            parts.append(f"## {section.heading}\n")
        for figure in figures:
            file = contents.path / "figures" / f"{figure.name}.png"
            if not file.is_file():
                raise MechscopeError(f"{file} is missing: `mechscope report {run}` draws the figures of a run again")
            picture = made[f"gallery/{file.name}"] = file.read_bytes()
            # title and caption stand in the picture, which has two pixels for one; its width stands in its header
            width = int.from_bytes(picture[16:20], "big") // 2
            parts.append(f"![{html.escape(figure.title)}](gallery/{file.name}){{ loading=lazy width={width} }}\n")
    return {"gallery.md": "\n".join(parts)} | made


def _inline(text: str) -> str:
    """Return plain text for a line or a cell of Markdown."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
