"""Caveats: what weakens the statements of a run, and what is withheld for it."""

from __future__ import annotations

from dataclasses import replace

from mechscope.report.marks.tables import Cell, Shown, Table
from mechscope.report.section import Section, Tables, table

CAVEATS = table(
    "One row per caveat: the run's own weaknesses, and what a reader must keep in mind of a section.",
    section="the section of the page that it belongs to; empty for the whole run",
    weakens="the table whose statements it weakens; empty for all of the section",
    caveat="the caveat",
    withheld="whether what rests on it is withheld",
)


def _views(tables: Tables) -> list[Shown]:
    view = Table(tables["caveats"]).cells("caveat", "caveat", lambda row: Cell(str(row["caveat"])))
    view.cells("section", "section", lambda row: Cell(str(row["section"]) or "all"))
    view.cells("weakens", "weakens", lambda row: Cell(str(row["weakens"]) or "all of it"))
    view.cells("withheld", "withheld", lambda row: Cell("yes" if row["withheld"] else ""))
    return [Shown("", replace(view.view(), prose=True))]


SECTION = Section(
    id="caveats",
    heading="Caveats",
    intro="All of them, as the table caveats has them; each also stands beside what it weakens.",
    tables={"caveats": CAVEATS},
    views=_views,
)
