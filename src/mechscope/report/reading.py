"""Readings of a model (lenses, attribution, roles, token attention, weights) as the page shows them: figures, tables, and what its scripts draw.

Lens grids and token attention are drawn by scripts of the page from packed data; without a script the tables and the exported figures remain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mechscope.report.attribution import attribution_figures, attribution_views
from mechscope.report.figure import Figure, script_json
from mechscope.report.lens_figures import lens_figures, lens_views
from mechscope.report.lens_grid import lens_grids
from mechscope.report.packed import Words
from mechscope.report.reading_summary import READING
from mechscope.report.roles import role_figures, role_views
from mechscope.report.tabled import Shown
from mechscope.report.theme import DARK, LIGHT
from mechscope.report.token_attention import token_attention
from mechscope.report.weight_views import neuron_views, weight_figures, weight_views

Tables = Mapping[str, pd.DataFrame]

SCRIPTS = ("reading.js", "lens_grid.js", "token_attention.js")
STYLE = "reading.css"


@dataclass(frozen=True)
class Reading:
    """What the page has of readings.

    Attributes:
        present: Whether there is any of their tables.
        views: Tables by section.
        grids: Lens grids for the script, or None.
        attention: Token attention for the script, or None.
        json: Both with their words and colours, as JSON that can stand in a page; empty where there is neither.
    """

    present: bool
    views: Mapping[str, list[Shown]]
    grids: Mapping[str, Any] | None
    attention: Mapping[str, Any] | None
    json: str


def reading_figures(tables: Tables) -> dict[str, list[Figure]]:
    """Return the figures of readings by section, each only where its table is."""
    drawn = {
        "lens": lens_figures(tables),
        "attribution": attribution_figures(tables),
        "roles": role_figures(tables),
        "head-weights": weight_figures(tables),
    }
    return {section: found for section, found in drawn.items() if found}


def reading(tables: Tables) -> Reading:
    """Return what the page has of readings besides figures."""
    words = Words()
    grids, attention = lens_grids(tables, words), token_attention(tables, words)
    held = ""
    if grids or attention:
        colours = {
            name: {"sequential": config["range"]["ramp"], "diverging": config["range"]["diverging"]}
            for name, config in (("light", LIGHT), ("dark", DARK))
        }
        held = script_json({"words": words.listed, "palettes": colours, "lens": grids, "attention": attention})
    views = {
        "lens": lens_views(tables),
        "attribution": attribution_views(tables),
        "roles": role_views(tables),
        "head-weights": weight_views(tables),
        "neurons": neuron_views(tables),
    }
    return Reading(any(name in READING for name in tables), views, grids, attention, held)
