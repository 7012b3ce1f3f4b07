"""What a page draws and packs, read back."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechscope.report.contents import Contents
from mechscope.report.marks.figure import Figure
from mechscope.report.marks.packed import MISSING, POWER
from mechscope.report.marks.tables import Shown
from mechscope.report.page import fill, html
from mechscope.report.section import Section
from mechscope.report.sections import sections
from mechscope.report.statements import Card, Finding
from mechscope.report.summary import Summary
from tests.report import synthetic

NASTY = synthetic.HOSTILE[1]


def counts(held: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(held["data"]), dtype=f"<u{held['bytes']}")


def numbers(held: Mapping[str, Any]) -> np.ndarray:
    codes = np.frombuffer(base64.b64decode(held["data"]), dtype="<u2")
    return np.where(codes == MISSING, np.nan, held["max"] * (codes / (MISSING - 1)) ** POWER)


def shown_of(made: Mapping[str, pd.DataFrame], *ids: str) -> list[Section]:
    """Return the sections that these tables fill, or those of them that are named."""
    return [section for name, section in sections().items() if section.present(made) and (not ids or name in ids)]


def figures_of(made: Mapping[str, pd.DataFrame], *ids: str) -> list[Figure]:
    return [figure for section in shown_of(made, *ids) for figure in section.drawn(made)]


def views_of(made: Mapping[str, pd.DataFrame], *ids: str) -> list[Shown]:
    return [shown for section in shown_of(made, *ids) for shown in section.views(made)]


def statements_of(made: Mapping[str, pd.DataFrame], *ids: str) -> list[Finding]:
    return [finding for section in shown_of(made, *ids) for finding in section.findings(made)]


def findings_of(made: Mapping[str, pd.DataFrame], *ids: str) -> list[str]:
    return [finding.sentence for finding in statements_of(made, *ids)]


def cards_of(made: Mapping[str, pd.DataFrame], *ids: str) -> list[Card]:
    return [finding.card for finding in statements_of(made, *ids) if finding.card is not None]


def caveats_of(made: Mapping[str, pd.DataFrame], *ids: str) -> list[str]:
    return [caveat.text for section in shown_of(made, *ids) for caveat in section.caveats(made)]


def rows_of(figure: Figure, *columns: str) -> list[dict[str, Any]]:
    """Return the rows of the figure's data that have these columns."""
    return [row for rows in figure.datasets.values() for row in rows if set(columns) <= set(row)]


def named(drawn: list[Figure], name: str) -> Figure:
    (figure,) = (figure for figure in drawn if figure.name == name)
    return figure


def view_of(shown_tables: list[Shown], heading: str) -> Shown:
    (shown,) = (each for each in shown_tables if each.heading == heading)
    return shown


def page_text(contents: Contents) -> str:
    """Return a run's page; no figure is written to a file."""
    summary = Summary.of(contents)
    return html(contents, summary, fill(contents, summary))


def page_of(made: dict[str, pd.DataFrame], tmp_path: Path, *, title: str = "A run") -> str:
    """Return the page of a run with these tables, and no other section than theirs; no figure is written to a file."""
    record = synthetic.manifest() | {"page": {"title": title, "sections": []}}
    contents = Contents.read(synthetic.write_run(tmp_path / "run", made, study={"model": "models/gpt2"}, record=record))
    return page_text(contents)


def hostile(made: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return the tables with markup in every token and every other text of data."""
    made = {name: table.copy() for name, table in made.items()}
    texts = {
        "lens_tokens": ("token", "target", "segment", "text"), "lens_grid": ("top_1", "top_2", "text", "lens"), "weight_tokens": ("source", "target"),
        "weight_singular": ("tokens",), "neurons": ("promotes", "reads"), "neuron_contexts": ("token", "context", "next"),
        "attention_tokens": ("token", "segment", "text"), "attention_edges": ("text",), "role_definitions": ("definition", "source", "null"),
        "head_cards": ("attends_to", "top_tokens", "role"),
    }  # fmt: skip
    for name, columns in texts.items():
        for column in columns:
            made[name][column] = NASTY
    made["lens_grid"] = made["lens_grid"].drop_duplicates(["model", "component", "position"])
    return made
