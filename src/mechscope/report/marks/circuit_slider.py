"""A circuit's picture in the page: its file, and the slider that shows more or fewer edges with the faithfulness of that many beside it.

Everything a stop of the slider says is written here; the page's script shows it and the edges that `circuit_picture` drew for it. Without a script the page
shows the chosen circuit and its faithfulness; with it the slider runs over the strongest edges by |score|, whichever circuit was chosen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from mechscope.report.marks.circuit_picture import HOLDS, Grid, circuit_svg, owner
from mechscope.report.theme import interval, label, name_of, number, percent

EDGES_IN_PAGE = 5000
"""The strongest edges of each model that the page holds; the Parquet table has all."""
EDGES_DRAWN = 1500
"""Edges of a chosen circuit that are drawn at once; more would be neither readable nor light."""

_STEPS = 60
_SMALL = (320.0, 130.0, 34.0, 22.0)  # the curve beside the slider: width, height, left and lower margin
_CURVE = ("faithfulness", "low", "high", "random", "random_low", "random_high")
_UNMEASURED = "not measured"


@dataclass(frozen=True)
class Picture:
    """The circuit of one model.

    Attributes:
        name: File name without extension and the element's id.
        model: Whose circuit.
        title: What is shown.
        caption: How to read it.
        edges: All its edges, strongest first.
        nodes: Its nodes' scores, or None.
        curve: Faithfulness by number of edges, at least one of them, in order; or None.
        chosen: Faithfulness of the chosen circuit beside random ones, as a row of the summary; or None.
        grid: Where things stand, the same for every picture of a page.
    """

    name: str
    model: str
    title: str
    caption: str
    edges: pd.DataFrame = field(repr=False)
    nodes: pd.DataFrame | None = field(repr=False)
    curve: pd.DataFrame | None = field(repr=False)
    chosen: Mapping[str, Any] | None
    grid: Grid

    @cached_property
    def circuit(self) -> pd.DataFrame:
        """The chosen circuit's edges, strongest first."""
        return self.edges[self.edges["in_circuit"].astype(bool)]

    @property
    def drawn(self) -> pd.DataFrame:
        """The edges of the chosen circuit that are drawn."""
        return self.circuit.head(EDGES_DRAWN)

    @cached_property
    def stops(self) -> list[int]:
        """How many edges the slider can show: even steps of their logarithm, every measured size and the chosen circuit's own."""
        most = min(len(self.edges), EDGES_IN_PAGE)
        steps = {round(count) for count in np.geomspace(1, most, _STEPS)}
        measured = set() if self.curve is None else {int(count) for count in self.curve["edges"]}
        return sorted(count for count in {*steps, *measured, len(self.circuit)} if 1 <= count <= most)

    @property
    def start(self) -> int:
        """Where the slider stands at first: at the size of the chosen circuit, or the nearest it can show."""
        return min(range(len(self.stops)), key=lambda stop: abs(self.stops[stop] - len(self.circuit)))

    def svg(self) -> str:
        """Draw the chosen circuit as a file of its own."""
        return self._draw(self.drawn, title=self.title, caption=self.caption)

    def page_svg(self) -> str:
        """Draw the chosen circuit for the page, and with it all edges that the slider can show."""
        edges = self.edges.assign(rank=np.arange(1, len(self.edges) + 1), chosen=self.edges.index.isin(self.drawn.index))
        return self._draw(edges[(edges["rank"] <= EDGES_IN_PAGE) | edges["chosen"]], steps=self.stops)

    def _draw(self, edges: pd.DataFrame, **options: Any) -> str:
        return circuit_svg(edges, self.nodes, grid=self.grid, largest=float(self.edges["score"].abs().max()), **options)

    def size_words(self) -> str:
        """Say how large the chosen circuit is."""
        count = len(self.circuit)
        left = f"; the strongest {number(EDGES_DRAWN)} are drawn" if count > EDGES_DRAWN else ""
        share = percent(count / len(self.edges), digits=2)
        return f"The chosen circuit: {number(count)} of {number(len(self.edges))} edges ({share}), {number(_writers(self.circuit))} nodes{left}"

    def faithfulness_words(self) -> tuple[str, str]:
        """Say how faithful the chosen circuit and random ones of its size are."""
        row = self.chosen
        if row is None:
            return _UNMEASURED, _UNMEASURED
        return _said(row["value"], row["low"], row["high"]), _said(row["random"], row["random_low"], row["random_high"])

    def data(self) -> dict[str, Any]:
        """Return what the page says of the chosen circuit and of every stop of the slider, and where the slider stands at first."""
        faithful, random = self.faithfulness_words()
        chosen = {
            "size": self.size_words(),
            "faithful": faithful,
            "random": random,
            "note": "",
            "mark": self._mark(max(1, len(self.circuit))),
        }
        return {"chosen": chosen, "stops": [self._stop(edges) for edges in self.stops], "start": self.start}

    def _stop(self, edges: int) -> dict[str, Any]:
        """Return what the page says of the strongest `edges` edges."""
        share, nodes = percent(edges / len(self.edges), digits=2), _writers(self.edges.head(edges))
        size = f"The {number(edges)} strongest of {number(len(self.edges))} edges ({share}), {number(nodes)} nodes"
        said = {"edges": edges, "size": size, "mark": self._mark(edges), "faithful": _UNMEASURED, "random": _UNMEASURED, "note": ""}
        if self.curve is None or not self.curve["edges"].iloc[0] <= edges <= self.curve["edges"].iloc[-1]:
            return said
        at, sizes = _between(self.curve, edges), self.curve["edges"].to_numpy()
        after = int(np.searchsorted(sizes, edges))
        note = f"Between the measured sizes of {number(int(sizes[after - 1]))} and {number(int(sizes[after]))} edges."
        return said | {
            "faithful": _said(at["faithfulness"], at["low"], at["high"]),
            "random": _said(at["random"], at["random_low"], at["random_high"]),
            "note": "Measured at this size." if sizes[after] == edges else note,
        }

    def _mark(self, edges: int) -> float | None:
        """Return where a number of edges stands on the small curve, None without the curve."""
        if self.curve is None:
            return None
        axis, (width, _, left, _) = _axis(self.curve), _SMALL
        return round(min(max(axis["left"] + axis["scale"] * math.log(edges), left), width - 4), 1)

    def curve_svg(self) -> str:
        """Draw faithfulness over the number of edges, small, with a mark at the chosen circuit; nothing where it was not measured."""
        if self.curve is None:
            return ""
        curve, axis = self.curve, _axis(self.curve)
        width, height, left, lower = _SMALL
        x = [axis["left"] + axis["scale"] * math.log(edges) for edges in curve["edges"]]

        def y(column: str) -> list[float]:
            values = curve[column].astype(float).clip(axis["bottom"], axis["top"])
            return [float(axis["base"] - axis["rise"] * value) for value in values]

        drawn = []
        for column, low, high, kind in (("random", "random_low", "random_high", "random"), ("faithfulness", "low", "high", "measured")):
            around = [(at, down) for at, down in zip(x, y(low), strict=True) if not math.isnan(down)]
            around += [(at, up) for at, up in reversed(list(zip(x, y(high), strict=True))) if not math.isnan(up)]
            line = [(at, v) for at, v in zip(x, y(column), strict=True) if not math.isnan(v)]
            colour, dash = ("#8C8C8C", ' stroke-dasharray="4 3"') if kind == "random" else (HOLDS, "")
            drawn.append(f'<polygon class="{kind}" points="{_points(around)}" fill="{colour}" fill-opacity="0.18"/>')
            drawn.append(f'<polyline class="{kind}" points="{_points(line)}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        for share in (0.0, 1.0):
            level = axis["base"] - axis["rise"] * share
            drawn.append(f'<path class="row" d="M{left:.0f} {level:.1f}H{width - 4:.0f}" stroke="#c9d0d8" stroke-dasharray="2 3"/>')
            drawn.append(f'<text class="soft" x="{left - 6:.0f}" y="{level + 4:.1f}" font-size="11" text-anchor="end">{share:g}</text>')
        for at, count, anchor in ((x[0], curve["edges"].iloc[0], "start"), (x[-1], curve["edges"].iloc[-1], "end")):
            drawn.append(
                f'<text class="soft" x="{at:.1f}" y="{height - 6:.0f}" font-size="11" text-anchor="{anchor}">{number(int(count))}</text>'
            )
        drawn.append(
            f'<text class="soft" x="{(x[0] + x[-1]) / 2:.1f}" y="{height - 6:.0f}" font-size="11" text-anchor="middle">edges</text>'
        )
        mark = self._mark(max(1, len(self.circuit)))
        drawn.append(
            f'<path class="mark" transform="translate({mark:g} 0)" d="M0 4V{height - lower:.0f}" stroke="#111111" stroke-width="1.5"/>'
        )
        return (
            f'<svg class="curve" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img" '
            f'aria-label="faithfulness by number of edges">{"".join(drawn)}</svg>'
        )


def pictures(tables: Mapping[str, pd.DataFrame]) -> list[Picture]:
    """Return a picture for every model of the table of edges, all on one grid; none without that table.

    Raises:
        RunError: A node has no name that the graph of a model could have.
    """
    edges = tables.get("circuit_edges")
    if edges is None:
        return []
    grid, drawn = Grid.of(edges), list[Picture]()
    for model, own in edges.groupby("model", sort=False):
        name = f"circuit-{re.sub(r'[^a-z0-9]+', '-', str(model).lower()).strip('-')[:40] or 'model'}"
        name = f"{name}-{len(drawn) + 1}" if any(name == other.name for other in drawn) else name
        # an edge that was not scored has no width
        own = own.assign(score=own["score"].astype(float).fillna(0.0))
        own = own.iloc[np.argsort(-own["score"].abs().to_numpy(), kind="stable")].reset_index(drop=True)
        curve = _measured(of_model(tables.get("circuit_curve"), model))
        drawn.append(
            Picture(
                name=name,
                model=label(model),
                title=f"The circuit of {_whose(model)}",
                caption=f"Width: |score|. {_colours(curve)}",
                edges=own,
                nodes=of_model(tables.get("circuit_nodes"), model),
                curve=curve,
                chosen=_faithfulness(of_model(tables.get("circuit_summary"), model), curve, int(own["in_circuit"].sum())),
                grid=grid,
            )
        )
    return drawn


def _colours(curve: pd.DataFrame | None) -> str:
    """Say what the colours of edges mean for the metric, by its name where it is known, and which of them help."""
    name = None if curve is None or "metric" not in curve else str(curve["metric"].iloc[0])
    words = {"loss": "the loss", "kl": "the divergence from the clean run", "logit-diff": "the logit difference"}.get(
        str(name), "the metric"
    )
    falls, rises = ("works against the task", "helps") if name in ("loss", "kl") else ("helps", "works against the task")
    if name is None:
        return "Blue: the metric falls where the edge carries the other run's value, orange: it rises."
    return f"Blue: {words} falls where the edge carries the other run's value, so the edge {falls}; orange: it rises, so the edge {rises}."


def of_model(table: pd.DataFrame | None, model: object) -> pd.DataFrame | None:
    """Return a model's rows, None where there are none."""
    own = None if table is None else table[table["model"] == model]
    return None if own is None or own.empty else own.reset_index(drop=True)


def _whose(model: object) -> str:
    return {"model": "the model", "base": "the base model", "tuned": "the tuned model"}.get(str(model), name_of(model))


def _measured(curve: pd.DataFrame | None) -> pd.DataFrame | None:
    """Return the part of a curve that has a place on a logarithmic axis."""
    own = None if curve is None else curve[(curve["edges"] > 0) & curve["faithfulness"].notna()].sort_values("edges", kind="stable")
    return None if own is None or own.empty else own.reset_index(drop=True)


def _faithfulness(summary: pd.DataFrame | None, curve: pd.DataFrame | None, size: int) -> Mapping[str, Any] | None:
    """Return the chosen circuit's faithfulness; random circuits of its size are taken from the curve where the summary has none."""
    rows = [] if summary is None else summary[(summary["measure"] == "faithfulness") & summary["value"].notna()].to_dict("records")
    if not rows:
        return None
    row = {str(key): value for key, value in rows[0].items()}
    if pd.isna(row["random"]) and curve is not None and curve["edges"].iloc[0] <= size <= curve["edges"].iloc[-1]:
        at = _between(curve, size)
        row |= {end: at[end] for end in ("random", "random_low", "random_high")}
    return row


def _between(curve: pd.DataFrame, edges: int) -> dict[str, float]:
    """Return the curve at a number of edges within it, between two measured sizes by the logarithm."""
    measured = curve[curve["edges"] == edges]
    if len(measured):
        return {column: float(measured[column].iloc[0]) for column in _CURVE}
    sizes = np.log(curve["edges"].to_numpy(dtype=float))
    return {column: float(np.interp(np.log(edges), sizes, curve[column].to_numpy(dtype=float))) for column in _CURVE}


def _said(value: float, low: float, high: float) -> str:
    return _UNMEASURED if pd.isna(value) else f"{number(value)} {interval(low, high)}".strip()


def _writers(edges: pd.DataFrame) -> int:
    """Count the nodes of some edges; the logits write nothing."""
    return len({*edges["sender"], *map(owner, edges["receiver"])} - {"logits"})


def _axis(curve: pd.DataFrame) -> dict[str, float]:
    """Return how the small curve's pixels follow from edges (`left + scale · log edges`) and faithfulness (`base − rise · value`)."""
    width, height, left, lower = _SMALL
    first, last = (math.log(float(curve["edges"].iloc[end])) for end in (0, -1))
    scale = (width - left - 14) / max(last - first, 1e-9)
    values = curve[["faithfulness", "random"]].to_numpy(dtype=float)
    bottom, top = max(-1.0, min(-0.05, float(np.nanmin(values)))), min(2.0, max(1.05, float(np.nanmax(values))))
    rise = (height - lower - 6) / (top - bottom)
    return {
        "left": left + 4 - scale * first, "scale": scale, "base": height - lower + rise * bottom, "rise": rise, "bottom": bottom, "top": top,
    }  # fmt: skip


def _points(line: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
