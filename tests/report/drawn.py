"""What a page draws and packs, read back."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechscope.report.contents import Contents
from mechscope.report.figure import Figure
from mechscope.report.figures import figures
from mechscope.report.packed import MISSING, POWER
from mechscope.report.page import html
from mechscope.report.reading import reading_figures
from mechscope.report.tabled import Shown
from tests.report import synthetic

NASTY = synthetic.HOSTILE[1]


def counts(held: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(held["data"]), dtype=f"<u{held['bytes']}")


def numbers(held: Mapping[str, Any]) -> np.ndarray:
    codes = np.frombuffer(base64.b64decode(held["data"]), dtype="<u2")
    return np.where(codes == MISSING, np.nan, held["max"] * (codes / (MISSING - 1)) ** POWER)


def rows_of(figure: Figure, *columns: str) -> list[dict[str, Any]]:
    return [row for rows in figure.datasets.values() for row in rows if set(columns) <= set(row)]


def named(drawn: list[Figure], name: str) -> Figure:
    (figure,) = (figure for figure in drawn if figure.name == name)
    return figure


def view_of(shown_tables: list[Shown], heading: str) -> Shown:
    (found,) = (each for each in shown_tables if each.heading == heading)
    return found


def page_of(made: dict[str, pd.DataFrame], tmp_path: Path, *, study: dict[str, object] | None = None) -> str:
    """Return the page of a run with these tables; no figure is written to a file."""
    contents = Contents.read(synthetic.write_run(tmp_path / "run", made, study=study or {"model": "models/gpt2"}))
    return html(contents, figures(contents.tables) | reading_figures(contents.tables))


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
