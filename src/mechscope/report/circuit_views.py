"""Tables of circuits as the page shows them: measures, strongest edges, a card per component, and the edges whose scores shifted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from mechscope.report.heatmaps import Q_SIGNIFICANT
from mechscope.report.theme import interval, name_of, number
from mechscope.report.views import Cell, View, value, words

TOP_EDGES = 40
MEASURES = {
    "faithfulness": "faithfulness",
    "CPR": "CPR (area under faithfulness, higher is better)",
    "CMD": "CMD (area between faithfulness and 1, lower is better)",
}


def circuit_views(tables: Mapping[str, pd.DataFrame]) -> dict[str, list[tuple[str, View]]]:
    """Return the tables of circuits by what they show, each with its heading: `summary`, `edges`, `components`, `shift`."""
    found: dict[str, list[tuple[str, View]]] = {}
    if "circuit_summary" in tables:
        found["summary"] = [("", summary_view(tables["circuit_summary"]))]
    if "circuit_edges" in tables:
        found["edges"] = _by_model(tables["circuit_edges"], edges_view)
    if "circuit_components" in tables:
        found["components"] = _by_model(tables["circuit_components"], components_view)
    if "circuit_shift" in tables:
        found["shift"] = [("", shift_view(tables["circuit_shift"]))]
    return found


def _by_model(table: pd.DataFrame, view: Callable[[pd.DataFrame], View]) -> list[tuple[str, View]]:
    return [(name_of(model) if table["model"].nunique() > 1 else "", view(own)) for model, own in table.groupby("model", sort=False)]


def summary_view(summary: pd.DataFrame) -> View:
    """Return a line per measure: its value for every model, beside random circuits of the same size where they were measured."""
    models = list(dict.fromkeys(summary["model"]))
    found = {(row["measure"], row["model"]): row for row in summary.to_dict("records")}
    rows = tuple(
        (
            words(MEASURES.get(str(measure), name_of(measure))),
            *(_measured(found[measure, model]) if (measure, model) in found else Cell("") for model in models),
        )
        for measure in dict.fromkeys(summary["measure"])
    )
    return View(("measure", *(name_of(model) if len(models) > 1 else "circuit" for model in models)), rows)


def _measured(row: Mapping[Any, Any]) -> Cell:
    random = f"random {number(row['random'])} {interval(row['random_low'], row['random_high'])}".strip() if pd.notna(row["random"]) else ""
    ends = interval(row["low"], row["high"])
    return value(_count(row), note=f"{ends} · {random}" if ends and random else ends or random)


def edges_view(edges: pd.DataFrame) -> View:
    """Return the strongest edges of one model."""
    top = edges.reindex(edges["score"].abs().sort_values(ascending=False, kind="stable").index).head(TOP_EDGES)
    rows = tuple(
        (
            words(row["edge"], strong=bool(row["in_circuit"])),
            value(row["score"], note=interval(row.get("low"), row.get("high"), sign=True), sign=True),
            value(row.get("q"), digits=2),
            Cell("yes" if row["in_circuit"] else "no"),
        )
        for row in top.to_dict("records")
    )
    return View(("edge", "score", "q", "in the circuit"), rows)


def components_view(components: pd.DataFrame) -> View:
    """Return a card per component of one model's circuit: what it does, and whether the circuit needs it."""
    top = components.reindex(components["score"].abs().sort_values(ascending=False, kind="stable").index)
    rows = tuple(
        (
            words(row["component"], strong=True),
            words(_or_dash(row.get("role"))),
            value(row["score"], note=interval(row.get("low"), row.get("high"), sign=True), sign=True),
            value(row.get("minimality"), note=f"p = {number(row['minimality_p'], digits=2)}" if pd.notna(row.get("minimality_p")) else ""),
            words(_or_dash(row["attends_to"])),
            words(_or_dash(row["top_tokens"])),
        )
        for row in top.to_dict("records")
    )
    return View(("component", "role", "score", "minimality", "attends to", "top tokens"), rows)


def shift_view(shift: pd.DataFrame) -> View:
    """Return the edges whose scores shifted most between the models; bold where the shift is significant."""
    top = shift.reindex(shift["shift"].abs().sort_values(ascending=False, kind="stable").index).head(TOP_EDGES)
    where = {(True, True): "both", (True, False): "base", (False, True): "tuned", (False, False): "neither"}
    rows = tuple(
        (
            words(row["edge"]),
            value(row["base"], sign=True),
            value(row["tuned"], sign=True),
            value(row["shift"], note=interval(row["low"], row["high"], sign=True), sign=True, strong=row["q"] < Q_SIGNIFICANT),
            value(row["q"], digits=2),
            Cell(where[bool(row["in_base"]), bool(row["in_tuned"])]),
        )
        for row in top.to_dict("records")
    )
    return View(("edge", "score in base", "in tuned", "shift", "q", "in the circuit of"), rows)


def _count(row: Mapping[Any, Any]) -> Any:
    """Return a measure's value, as a whole number where it is a count: it is whole and has no interval."""
    return int(row["value"]) if pd.isna(row["low"]) and float(row["value"]).is_integer() else row["value"]


def _or_dash(text: object) -> str:
    return "–" if text is None or text is pd.NA or (isinstance(text, float) and pd.isna(text)) or not str(text).strip() else str(text)
