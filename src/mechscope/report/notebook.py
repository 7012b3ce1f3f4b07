"""What a notebook shows of a run: the verdict and findings of its page, its small tables, and its figures as altair charts.

Everything here is read off the same sections as the page and the terminal; nothing is drawn or worded anew. A chart is the definition that the files
in `figures/` are made of: title, caption, colours and numbers included. How a notebook displays it is altair's own setting; `altair.renderers.enable("png")`
(or `"svg"`) draws without a network.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import altair as alt
import pandas as pd
from markupsafe import Markup, escape

from mechscope.errors import RunError
from mechscope.report.contents import Contents
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.tables import Cell, View
from mechscope.report.sections import sections, table_specs
from mechscope.report.statements import Finding
from mechscope.report.summary import Summary

# rows of a table that are shown; all are in `tables`
_ROWS = 8


class HasTables(Protocol):
    """A run, or a technique's result."""

    @property
    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Its tables by their names in a run folder."""


def figures(tables: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
    """Return every figure that the page draws of some tables, by name, in the order of the sections.

    Args:
        tables: Tables by their names in a run folder (docs/tables.md); those that no section describes are left aside.

    Raises:
        RunError: A table lacks columns.
    """
    return {figure.name: figure for figure in _drawn(tables)}


def _drawn(tables: Mapping[str, pd.DataFrame]) -> Iterator[Figure]:
    """Draw the figures one by one, as a reader who wants one need not wait for all."""
    known = shown(tables)
    for section in sections().values():
        if section.present(known):
            yield from section.drawn(known)


def shown(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return the tables that a section can show: those it describes, with rows.

    Raises:
        RunError: A table lacks columns.
    """
    known = {name: tables[name].reset_index(drop=True) for name in table_specs() if name in tables and len(tables[name])}
    for name, table in known.items():
        if missing := [column for column in table_specs()[name].required if column not in table]:
            raise RunError(f"table {name!r} lacks {', '.join(missing)}: give it as the job or the technique returned it")
    return known


def plot(value: Mapping[str, pd.DataFrame] | HasTables, name: str | None = None) -> Any:
    """Return one figure of the page as an altair chart.

    Args:
        value: Tables by their names in a run folder (docs/tables.md), or what has them: a run, `Effects`, a `Difference`.
        name: Which figure; may be left out where there is one.

    Raises:
        RunError: There is no such figure, or there are several and none is named; the message lists them.
    """
    drawn = {}
    for figure in _drawn(value if isinstance(value, Mapping) else value.tables):
        if figure.name == name:
            return chart(figure)
        drawn[figure.name] = figure
    if name is not None or len(drawn) != 1:
        raise RunError(_which(drawn, name))
    return chart(*drawn.values())


def chart(figure: Figure) -> Any:
    """Return a figure as the altair chart that its file in `figures/` is drawn from."""
    return alt.Chart.from_dict(figure.export())


def _which(drawn: Mapping[str, Figure], name: str | None) -> str:
    if not drawn:
        return "no figure is drawn of these tables: they have tables to read only"
    listed = "; ".join(f"{each.name} ({each.title})" for each in drawn.values())
    if name is None:
        return f"there are {len(drawn)} figures: name one of {listed}"
    near = difflib.get_close_matches(name, drawn, n=1)
    return f"there is no figure {name!r}{f', did you mean {near[0]!r}?' if near else ''}: there are {listed}"


def as_text(contents: Contents) -> str:
    """Return a run in a few lines: title, verdict, findings by question with what weakens them, tables by size."""
    summary = Summary.of(contents)
    lines = [contents.title, *(finding.sentence for finding in summary.verdict)]
    for group in summary.further:
        lines.append(group.heading if group.heading.endswith("?") else f"{group.heading.rstrip(':')}:")
        lines += [
            line for finding in group.findings for line in (f"• {finding.sentence}", *(f"  {caveat.text}" for caveat in finding.caveats))
        ]
    sizes = ", ".join(f"{name} ({len(table):,} × {table.shape[1]})" for name, table in contents.tables.items())
    return "\n".join([*lines, f"tables: {sizes or 'none'}"])


def as_html(contents: Contents) -> str:
    """Return a run as an HTML fragment: title, verdict, findings by question, and the tables that the terminal prints too.

    Without style sheet and script, so that it takes on the notebook's own look, dark or light. All text is escaped.
    """
    summary = Summary.of(contents)
    parts = [Markup("<p><strong>{}</strong></p>").format(contents.title)]
    parts += [Markup("<p>{}</p>").format(finding.sentence) for finding in summary.verdict]
    parts += [_folded(group.heading, Markup("<ul>{}</ul>").format(_joined(map(_item, group.findings)))) for group in summary.further]
    if summary.texts:
        items = _joined(Markup("<li>{}</li>").format(text) for text in summary.texts)
        parts.append(_folded("Caveats", Markup("<ul>{}</ul>").format(items)))
    parts += [
        _folded(shown.heading or section.heading, _table(shown.view))
        for section in contents.sections
        if section.present(contents.tables)
        for shown in section.views(contents.tables)
        if shown.terminal
    ]
    names = ", ".join(contents.tables) or "none"
    parts.append(Markup("<p><small>.tables: {}; .plots lists the figures, .plot(name) draws one</small></p>").format(names))
    return str(Markup("<div>{}</div>").format(_joined(parts)))


def _item(finding: Finding) -> Markup:
    beside = _joined(Markup("<br><small>{}</small>").format(caveat.text) for caveat in finding.caveats)
    return Markup("<li>{}{}</li>").format(finding.sentence, beside)


def _folded(heading: str, inside: Markup) -> Markup:
    return Markup("<details><summary>{}</summary>{}</details>").format(heading, inside)


def _joined(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _table(view: View) -> Markup:
    head = _joined(Markup("<th>{}</th>").format(heading) for heading in view.columns)
    rows = _joined(
        Markup("<tr>{}</tr>").format(_joined(Markup("<td>{}</td>").format(_cell(cell)) for cell in row)) for row in view.rows[:_ROWS]
    )
    more = len(view.rows) - _ROWS
    note = Markup("<p><small>{} more rows</small></p>").format(f"{more:,}") if more > 0 else ""
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>{}").format(head, rows, note)


def _cell(cell: Cell) -> Markup:
    text = Markup("<strong>{}</strong>").format(cell.text) if cell.strong else escape(cell.text)
    return Markup("{} <small>{}</small>").format(text, cell.note) if cell.note else text
