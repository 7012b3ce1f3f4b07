"""The report's page: one HTML file that holds its figures, their numbers and the code that draws them, and asks the network for nothing.

The page is a loop over the sections that the run's tables fill (`mechscope.report.sections`); nothing here knows what any of them is about.

Text from data, models and settings is escaped by jinja, and inside JSON by `script_json`. Behind that stands a content policy that
allows no request at all and only the page's own scripts, by their hash: even markup that slipped through could neither load nor run
anything. The charts' expressions are interpreted rather than compiled (Vega's `ast` mode), so the policy needs no `unsafe-eval`. Styles may be
inline, because Vega's tooltips set them.

Equal run folders give equal bytes: the only date is the manifest's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import vl_convert
import yaml
from markupsafe import Markup

from mechscope.report.contents import Contents, leaves, problems
from mechscope.report.marks.figure import Figure, png, script_json
from mechscope.report.marks.tables import Shown
from mechscope.report.rendering import environment, exists, policy, template_text
from mechscope.report.section import Drawing, Panel, Section, Tables
from mechscope.report.summary import Summary
from mechscope.report.theme import DARK, LIGHT, number
from mechscope.store.files import write_bytes, write_text

logger = logging.getLogger(__name__)

PAGE = "report.html"
FURTHER = "pages"
"""Folder of the pages beside it."""

# what the manifest keeps for `mechscope verify` and for resuming, not for readers; and what has a place of its own on the page
_UNSHOWN = {"settings", "stages", "continued", "commands", "kind", "created", "page"}


@dataclass(frozen=True)
class Filled:
    """A section with what a run's tables make of it."""

    section: Section
    present: bool
    figures: list[Figure]
    panels: list[Panel]
    views: list[Shown]

    @classmethod
    def of(cls, section: Section, tables: Tables) -> Filled:
        """Fill a section; one without its tables stays empty."""
        if not section.present(tables):
            return cls(section, False, [], [], [])
        return cls(section, True, section.drawn(tables), list(section.panels(tables)), list(section.views(tables)))


def render(run_path: str | Path) -> Path:
    """Write a run's report (`report.html`), its figures (`figures/*.svg`, `figures/*.png`) and further pages (`pages/*.html`), each file atomically.

    Args:
        run_path: A run folder with at least one table.

    Returns:
        The path of the page.

    Raises:
        RunError: it is no run folder, has no tables, or cannot be written.
    """
    contents = Contents.read(run_path)
    summary = Summary.of(contents)
    filled = fill(contents, summary)
    drawings: list[Drawing] = [
        drawing for each in filled for drawing in (*each.figures, *(one for panel in each.panels for one in panel.drawings))
    ]
    for drawing in drawings:
        svg = drawing.svg()
        write_text(svg, contents.path / "figures" / f"{drawing.name}.svg")
        write_bytes(png(svg), contents.path / "figures" / f"{drawing.name}.png")
    sheets = {f"{sheet.name}.html": sheet for each in filled for sheet in each.section.pages(contents.tables)}
    for name, sheet in sheets.items():
        write_text(sheet.html(), contents.path / FURTHER / name)
    for old in (contents.path / FURTHER).glob("*.html"):
        if old.name not in sheets:
            old.unlink()
    page = contents.path / PAGE
    write_text(html(contents, summary, filled), page)
    logger.info("report of %d tables and %d figures written to %s", len(contents.tables), len(drawings), page)
    return page


def fill(contents: Contents, summary: Summary) -> list[Filled]:
    """Fill the sections of a run, the caveats as they are today."""
    caveats = summary.table()
    kept = {name: table for name, table in contents.tables.items() if name != "caveats"}
    weighed = replace(contents, tables={**kept, "caveats": caveats} if len(caveats) else kept)
    return [Filled.of(section, weighed.tables) for section in weighed.sections]


def html(contents: Contents, summary: Summary, filled: list[Filled]) -> str:
    """Return the page as text; nothing is written."""
    panels = [panel for each in filled for panel in each.panels]
    scripts = dict.fromkeys(["report.js", *(script for panel in panels for script in (*panel.scripts, f"{panel.kind}.js"))])
    styles = [script.removesuffix(".js") + ".css" for script in scripts]
    library, own = _library(), "".join(template_text(name) for name in scripts if exists(name))
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            policy=policy(library, own),
            style=Markup("".join(template_text(name) for name in styles if exists(name))),
            library=Markup(library),
            script=Markup(own),
            charts_json=Markup(script_json(_charts(figure for each in filled for figure in each.figures))),
            panels_json=[(kind, Markup(script_json(values))) for kind, values in _panel_values(panels).items()],
            filled=filled,
            header=_header(contents),
            title=contents.title,
            summary=summary,
            switch=_switch(filled),
            problems=problems(contents.manifest),
            settings=yaml.safe_dump(dict(contents.settings), sort_keys=False, allow_unicode=True, width=100),
            record=[
                (" · ".join(path), text(value)) for path, value in leaves({k: v for k, v in contents.manifest.items() if k not in _UNSHOWN})
            ],
            commands=contents.commands,
            edited=contents.edited,
            kind=contents.manifest.get("kind", ""),
        )
    )


def _panel_values(panels: Iterable[Panel]) -> dict[str, list[Any]]:
    """Return what the scripts of panels read: a list per kind."""
    values: dict[str, list[Any]] = {}
    for panel in panels:
        if panel.json is not None:
            values.setdefault(panel.kind, []).append(panel.json)
    return values


def _charts(drawn: Iterable[Figure]) -> dict[str, Any]:
    """Return what the page's script draws: definitions, the numbers they share (column by column names once), and both colour schemes."""
    charts: dict[str, Any] = {"figures": {}, "datasets": {}, "light": LIGHT | {"background": None}, "dark": DARK}
    for figure in drawn:
        charts["figures"][figure.name] = figure.page_spec()
        for name, rows in figure.datasets.items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            charts["datasets"][name] = {"columns": columns, "rows": [[row.get(column) for column in columns] for row in rows]}
    return charts


@cache
def _library() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script."""
    # a script element ends at this text wherever it stands, in a string too; today's libraries do not have it
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


def _header(contents: Contents) -> list[tuple[str, str]]:
    """Return what was studied, from the manifest: job, models, data, date."""
    manifest = contents.manifest
    models = {label: model.get("source") for label, model in manifest.get("models", {}).items()}
    named = {f"{label} model" if label != "model" else label: source for label, source in models.items()}
    facts = {"job": manifest.get("kind"), **named, "data": _measured_on(manifest.get("data", {}))}
    facts["begun"] = str(manifest.get("created", ""))[:16].replace("T", " ")
    return [(name, str(value)) for name, value in facts.items() if value]


def _measured_on(data: Mapping[str, Any]) -> str:
    """Return the data that were measured: where they are from and how many, per split where there are several."""
    count = data.get("documents")
    if isinstance(count, Mapping):
        many = f"{', '.join(f'{number(n)} {split}' for split, n in count.items())} documents"
    elif count is not None:
        many = f"{number(count)} document{'s' * (count != 1)}"
    else:
        many = f"{number(data['pairs'])} pair{'s' * (data['pairs'] != 1)}" if "pairs" in data else ""
    return ": ".join(filter(None, (str(data.get("source") or ""), many)))


def _switch(filled: Iterable[Filled]) -> list[str]:
    """Return the kinds of query rows the reader can switch between, all tokens first; empty where there is no choice."""
    kinds = dict.fromkeys(shown.view.kind for each in filled for shown in each.views if shown.view.kind is not None)
    return sorted(kinds, key=lambda kind: kind != "all") if len(kinds) > 1 else []


def text(value: object) -> str:
    """Return a value of data or settings as text; nothing for what is missing."""
    if value is None or value != value:
        return ""
    return ", ".join(text(each) for each in value) if isinstance(value, list) else str(value)
