"""Roles of heads: a small map of all heads per role, what changed in them, and the heads that have each role.

Scores of different roles have different scales, so the maps are coloured by how far a score lies on the way from its null (what a head without the
role would score on the same texts) to the largest score the role allows; the numbers themselves are told on hovering and in the tables. A dot marks
heads that have the role; in the maps of change an outline marks what is significant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from mechscope.report.figure import Figure, Numbers, definition
from mechscope.report.heatmaps import Q_SIGNIFICANT, diverging, gradient
from mechscope.report.tabled import Shown, Table, strongest
from mechscope.report.theme import name_of, number
from mechscope.report.views import Cell

HEADS_SHOWN = 3
"""Heads that the table names per role and model."""

_TOP = 20
_PANEL, _ROW = 200, 980  # pixels: a map, and a row of maps


def role_figures(tables: Mapping[str, pd.DataFrame]) -> list[Figure]:
    """Return the maps of roles of every model, and those of change."""
    roles, changes, drawn = tables.get("head_roles"), tables.get("head_role_changes"), list[Figure]()
    if roles is not None:
        shown = roles[roles["head"] >= 0].assign(strength=lambda table: _strengths(table, tables.get("role_definitions")))
        groups = list(shown.groupby("model", sort=False))
        for i, (model, own) in enumerate(groups):
            whose = f": {name_of(model)}" if len(groups) > 1 else ""
            drawn.append(_scores(own, name="roles" + (f"-{i + 1}" if len(groups) > 1 else ""), title=f"Which heads have which role{whose}"))
    if changes is not None and (changes["head"] >= 0).any():
        drawn.append(_changes(changes[changes["head"] >= 0]))
    return drawn


def _strengths(roles: pd.DataFrame, definitions: pd.DataFrame | None) -> np.ndarray:
    """Return the share of the way from null to the role's largest score, 0 to 1."""
    largest = roles.groupby("role")["score"].max()
    if definitions is not None and "high" in definitions:
        stated = definitions.drop_duplicates("role").set_index("role")["high"].astype(float).reindex(largest.index)
        largest = stated.where(np.isfinite(stated), largest)
    null = roles["null"].astype(float).fillna(0.0).to_numpy() if "null" in roles else np.zeros(len(roles))
    room = roles["role"].map(largest).to_numpy(dtype=float) - null
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(room > 0, (roles["score"].to_numpy(dtype=float) - null) / room, np.nan)
    return np.asarray(np.clip(share, 0.0, 1.0))


def _scores(roles: pd.DataFrame, *, name: str, title: str) -> Figure:
    legend = gradient("from null to the largest score, √ scale", share=True)
    scale = alt.Scale(type="sqrt", domain=[0, 1], clamp=True, interpolate="rgb")
    told = {"score": "score", "low": "95 % from", "high": "to", "null": "null", "excess": "score − null", "q": "q", "n": "texts"}
    table = roles.assign(has=roles["has_role"].fillna(False).astype(bool) if "has_role" in roles else False)
    caption = (
        "Layers down, heads across. A score at or below its null has the ground's colour; no colour: there is nothing above the null. "
        "A dot marks heads that have the role."
    )
    return _maps(table, "strength", name=name, title=title, caption=caption, scale=scale, legend=legend, told=told, mark="has", dot=True)


def _changes(changes: pd.DataFrame) -> Figure:
    scale, words = diverging(changes["change"])
    legend = gradient("change of the score")
    told = {"base": "base", "tuned": "tuned", "change": "change", "low": "95 % from", "high": "to", "q": "q", "n": "texts"}
    table = changes.assign(surely=changes["q"] < Q_SIGNIFICANT)
    caption = f"Tuned minus base, in each role's own score. Outlined: q < {Q_SIGNIFICANT} (Benjamini–Hochberg).{words}"
    title = "Which roles fine-tuning strengthened"
    return _maps(
        table, "change", name="roles-change", title=title, caption=caption, scale=scale, legend=legend, told=told, mark="surely", dot=False
    )


def _maps(
    table: pd.DataFrame,
    value: str,
    *,
    name: str,
    title: str,
    caption: str,
    scale: Any,
    legend: Any,
    told: Mapping[str, str],
    mark: str,
    dot: bool,
) -> Figure:
    n_layers, n_heads = int(table["layer"].max()) + 1, int(table["head"].max()) + 1
    across, down = (int(np.clip(_PANEL // count, 5, 17)) for count in (n_heads, n_layers))
    table = table.assign(role=[name_of(role) for role in table["role"]])
    order = list(dict.fromkeys(table["role"]))
    # one row per map carries its heading
    table = table.assign(heading=np.where(table.duplicated("role"), "", table["role"]))
    told = {column: words for column, words in told.items() if column in table}
    numbers = Numbers()
    tooltip = [alt.Tooltip("role:N"), alt.Tooltip("component:N", title="head")]
    tooltip += [alt.Tooltip(f"{column}:Q", title=words, format="" if column == "n" else ".4~g") for column, words in told.items()]

    def axis(count: int) -> Any:
        return alt.Axis(
            labelAngle=0, grid=False, values=list(range(0, count, next(step for step in (2, 4, 8, 16, count) if count <= 8 * step)))
        )

    base = alt.Chart().encode(x=alt.X("head:O", title=None, axis=axis(n_heads)), y=alt.Y("layer:O", title=None, axis=axis(n_layers)))
    cells = base.mark_rect(cornerRadius=1).encode(color=alt.Color(f"{value}:Q", scale=scale, legend=legend), tooltip=tooltip)
    marked = (
        base.mark_point(filled=True, size=float(np.clip(0.05 * min(across, down) ** 2, 4, 20)), fill="#ffffff", stroke="#20262d", strokeWidth=0.7, opacity=1)
        if dot
        else base.mark_rect(style="outline", fillOpacity=0, strokeWidth=1)
    )  # fmt: skip
    headings = alt.Chart().mark_text(align="left", baseline="bottom", fontWeight=600, fontSize=11.5, limit=_PANEL + 20)
    headings = headings.encode(x=alt.value(0), y=alt.value(-5), text="heading:N").transform_filter("datum.heading !== ''")
    layered = alt.layer(cells, marked.transform_filter(f"datum.{mark}"), headings).properties(
        width=across * n_heads, height=down * n_layers
    )
    # a heading is wider than a map of few heads
    columns = max(1, min(len(order), _ROW // (max(120, across * n_heads) + 34)))
    kept = list(dict.fromkeys(["role", "heading", "component", "layer", "head", value, mark, *told]))
    # the header's own labels know no colour scheme: the marks above have the page's
    facet = alt.Facet("role:N", sort=order, title=None, header=alt.Header(labelExpr="''", labelFontSize=1, labelPadding=6))
    chart = layered.facet(data=numbers.add(table, kept), facet=facet, columns=columns, spacing={"row": 30, "column": 26})
    spec = definition(chart, numbers, description=f"{title}: {len(order)} maps of {n_layers} layers by {n_heads} heads")
    return Figure(name=name, title=title, caption=caption, spec=spec, width=_ROW, wide=True)


def role_views(tables: Mapping[str, pd.DataFrame]) -> list[Shown]:
    """Return the change of every role's mean over heads, the heads that changed most, the first heads of every role, and the definitions."""
    found = [*_change_views(tables.get("head_role_changes"))]
    roles, definitions = tables.get("head_roles"), tables.get("role_definitions")
    if roles is not None:
        heads = roles[roles["head"] >= 0]
        for model, own in heads.groupby("model", sort=False):
            whose = f", {name_of(model)}" if heads["model"].nunique() > 1 else ""
            ranked = own.sort_values("score", ascending=False, kind="stable").groupby("role", sort=False).head(HEADS_SHOWN)
            order = {role: i for i, role in enumerate(dict.fromkeys(own["role"]))}
            ranked = ranked.sort_values("role", key=lambda names: names.map(order), kind="stable")
            table = Table(ranked).mapped("role", "role")
            table = table.words("component", "head", strong=lambda row: row.get("has_role") in (True, np.True_))
            table = table.numbers("score", "score", ends=("low", "high")).numbers("null", "null")
            table = table.numbers("excess", "score − null", ends=("excess_low", "excess_high"), sign=True).numbers("q", "q", digits=2)
            words = f"The {HEADS_SHOWN} heads with the highest score in each role; bold: has the role."
            found.append(Shown(f"Heads of each role{whose}", table.view(), words, folded=True))
    if definitions is not None:
        table = Table(definitions).mapped("role", "role").texts("definition", "definition")
        table = table.cells("high", "range", _range)
        table = table.texts("null", "null").numbers("threshold", "threshold").texts("source", "source")
        found.append(Shown("What each role means", table.view(), folded=True))
    return found + _card_views(tables.get("head_cards"))


def _range(row: Mapping[Any, Any]) -> Cell:
    low, high = row.get("low"), row["high"]
    return Cell("any number" if pd.isna(low) and pd.isna(high) else f"{number(low)} to {number(high)}")


def _card_views(cards: pd.DataFrame | None) -> list[Shown]:
    """Return the chosen heads one by one, base and tuned below each other."""
    if cards is None:
        return []
    order = {component: i for i, component in enumerate(dict.fromkeys(cards["component"]))}
    cards = cards.sort_values("component", key=lambda names: names.map(order), kind="stable")
    table = Table(cards).words("component", "head", strong=lambda row: True)
    if cards["model"].nunique() > 1:
        table = table.mapped("model", "model")
    table = table.texts("role", "role").texts("attends_to", "attends to").texts("top_tokens", "raises")
    return [Shown("The chosen heads, one by one", table.view(), "What each attends to and what it writes while a summary is read.")]


def _change_views(changes: pd.DataFrame | None) -> list[Shown]:
    if changes is None:
        return []
    whole, heads = changes[changes["component"] == "all"], changes[changes["component"] != "all"]
    found = []
    if len(whole):
        view = _change_table(whole.sort_values("change", ascending=False, kind="stable"), named=False).view()
        found.append(
            Shown(
                "How much of each role the model has", view, "Mean score over all heads, before and after fine-tuning; bold: significant."
            )
        )
    if len(heads):
        top = strongest(heads, "change", _TOP, q="q")
        surely = int((heads["q"] < Q_SIGNIFICANT).sum())
        words = f"{surely} of {len(heads)} heads and roles changed at q < {Q_SIGNIFICANT}; the largest changes come first."
        found.append(Shown("Heads whose role changed", _change_table(top, named=True).view(), words))
    return found


def _change_table(rows: pd.DataFrame, *, named: bool) -> Table:
    table = Table(rows).words("component", "head") if named else Table(rows)
    table = table.mapped("role", "role").numbers("base", "base").numbers("tuned", "tuned")
    table = table.numbers("change", "change", ends=("low", "high"), sign=True, bold="q").numbers("q", "q", digits=2).numbers("n", "texts")
    return table.cells("gained", "", _turn) if named and "gained" in rows and "lost" in rows else table


def _turn(row: Mapping[Any, Any]) -> Cell:
    gained, lost = (row[name] in (True, np.True_) for name in ("gained", "lost"))
    return Cell("gained" if gained else "lost" if lost else "")
