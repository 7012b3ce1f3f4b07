"""Components of a circuit: what each of its heads and MLPs looks at and writes, and whether the circuit needs it."""

from __future__ import annotations

import pandas as pd

from mechscope.report.marks.tables import Cell, Row, Shown, Table, View, strongest, value, words
from mechscope.report.section import Section, Tables, number, optional, table
from mechscope.report.shared import each_model
from mechscope.report.theme import number as written

COMPONENTS = table(
    "One row per model and head or MLP of its chosen circuit.",
    model="whose circuit",
    component="the head or MLP",
    layer="its layer",
    score=number("sum of the scores of the edges that leave it", "of the metric", bare=True),
    low=optional("the score's interval (95\u202f%), lower end", "of the metric"),
    high=optional("its interval, upper end", "of the metric"),
    minimality=number("what the circuit loses without it, of the whole model's effect", "share", "p", "q", optional=True),
    attends_to="tokens it attends to, with the share of its attention; empty for MLPs",
    top_tokens="tokens whose logits its write raises most, with the change",
    role=optional("its roles and their scores; empty without head roles in the run"),
)


def _views(tables: Tables) -> list[Shown]:
    return [Shown(f"Components{whose}", _cards(own)) for _, whose, own in each_model(tables["circuit_components"])]


def _cards(components: pd.DataFrame) -> View:
    """Return a card per component of one model's circuit, the strongest first."""
    view = Table(strongest(components, "score", len(components))).words("component", "component", strong=lambda row: True)
    view = view.cells("role", "role", lambda row: words(_or_dash(row["role"])))
    view = view.numbers("score", "score", ends=("low", "high"), sign=True).cells("minimality", "minimality", _minimality)
    view = view.cells("attends_to", "attends to", lambda row: words(_or_dash(row["attends_to"])))
    return view.cells("top_tokens", "top tokens", lambda row: words(_or_dash(row["top_tokens"]))).view()


def _minimality(row: Row) -> Cell:
    p = row.get("minimality_p")
    return value(row["minimality"], note="" if p is None or pd.isna(p) else f"p = {written(p, digits=2)}")


def _or_dash(text: object) -> str:
    return "–" if text is None or text is pd.NA or (isinstance(text, float) and pd.isna(text)) or not str(text).strip() else str(text)


SECTION = Section(
    id="circuit-components",
    heading="Components of the circuit",
    intro=(
        "What each head and MLP of the circuit looks at and writes. Minimality is what the circuit loses without the component; p compares it with "
        "components put in at random."
    ),
    tables={"circuit_components": COMPONENTS},
    views=_views,
)
