"""The picture of an attribution graph: nodes by layer (up) and token (across), the embedding at the bottom and the likeliest next tokens on top.

It is drawn here, with the edges that carry most influence; the page's script shows the edges of a node that is selected, what is known of it, and lets nodes
be pinned and grouped. A chart of Vega-Lite would have to draw every edge anew at each click; hiding and showing SVG is what the circuit's picture does as
well. A latent is a circle, an error a diamond, a token and a logit a square; size is influence, a group is a ring of its colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from mechscope.report.marks.packed import shown
from mechscope.report.marks.tables import line
from mechscope.report.theme import CATEGORIES, FONT, label, number, percent

NODES_IN_PAGE = 500
"""Nodes of most influence that the page holds; the Parquet table has all."""
EDGES_IN_PAGE = 6000
"""Edges of most influence that the page holds."""
EDGES_DRAWN = 80
"""Edges that are drawn while no node is selected."""
ADDS, TAKES = CATEGORIES[0], CATEGORIES[3]
"""Colours of an edge that raises its target and of one that lowers it."""

_LEFT, _TOP, _FOOT = 78.0, 18.0, 62.0
_PITCH, _PER_LINE, _NARROWEST, _LOGIT = 15.0, 5, 30.0, 96.0
_INK, _SOFT, _LINE, _PANEL = "#1c2530", "#5b6672", "#dfe4ea", "#ffffff"
# a wider picture is scrolled, not made smaller
_FITS = 1500.0
# ring colours of groups; blue and vermilion are the edges'
_RINGS = (CATEGORIES[2], CATEGORIES[4], CATEGORIES[1], CATEGORIES[5], CATEGORIES[7], CATEGORIES[6])


@dataclass(frozen=True)
class GraphPicture:
    """The pruned graph of one prompt.

    Attributes:
        nodes: Its nodes, those of most influence; with their places `x` and `y` in pixels.
        edges: Edges between them, those of most influence first: `from`, `to` (numbers of nodes), `weight`, `share`.
        dropped: Nodes of the pruned graph that are left out.
        details: What is known of latents by name: `promotes`, `suppresses`, `examples`.
        groups: Names with their nodes.
        prompt: The prompt.
        size: Width and height.
    """

    nodes: pd.DataFrame = field(repr=False)
    edges: pd.DataFrame = field(repr=False)
    dropped: int
    details: Mapping[str, Mapping[str, Any]] = field(repr=False)
    groups: Sequence[tuple[str, Sequence[str]]]
    prompt: str
    size: tuple[float, float]

    name = "attribution-graph"

    @property
    def caption(self) -> str:
        """How to read it."""
        more = f" {number(self.dropped)} nodes of least influence are left out here." if self.dropped else ""
        drawn = min(EDGES_DRAWN, len(self.edges))
        return (
            "Layers upwards, tokens across. Circles are latents, diamonds errors (what dictionaries miss of an MLP), squares tokens and next tokens; "
            f"the larger, the more influence. Drawn are the {number(drawn)} edges of most influence: blue ones raise their target, orange ones lower it.{more}"
        )

    def svg(self) -> str:
        """Draw it as a file of its own."""
        return self._draw("")

    def page_svg(self) -> str:
        """Draw it for the page, whose script finds nodes by their numbers."""
        return self._draw(f' class="graph-picture{" fits" if self.size[0] <= _FITS else ""}"')

    def _draw(self, attributes: str) -> str:
        width, height = self.size
        body = [
            *self._rows(),
            self._edges(),
            *self._labels(),
            *(self._node(number, row) for number, row in enumerate(self.nodes.to_dict("records"))),
        ]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg"{attributes} viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
            f'font-family="{escape(FONT)}" role="img" aria-label="attribution graph"><rect class="ground" width="100%" height="100%" fill="{_PANEL}"/>'
            f"{''.join(body)}</svg>"
        )

    def _rows(self) -> list[str]:
        drawn = []
        for layer, own in self.nodes.groupby("layer"):
            y = float(own["y"].mean())
            kind = own["kind"].iloc[0]
            words = {"token": "tokens", "logit": "next token"}.get(str(kind), f"layer {layer}")
            drawn.append(f'<path class="row" d="M{_LEFT - 6:.0f} {y:.1f}H{self.size[0] - 4:.0f}" stroke="{_LINE}"/>')
            drawn.append(_text(_LEFT - 10, y + 4, words, extra=' text-anchor="end"'))
        return drawn

    def _edges(self) -> str:
        drawn = [edge_path(self.nodes, row) for row in self.edges.head(EDGES_DRAWN).iloc[::-1].to_dict("records")]
        return f'<g class="edges" fill="none" stroke-linecap="round">{"".join(drawn)}</g>'

    def _labels(self) -> list[str]:
        drawn = []
        for row in self.nodes.to_dict("records"):
            x, y = float(row["x"]), float(row["y"])
            if row["kind"] == "token":
                turned = f' text-anchor="end" transform="rotate(-38 {x + 4:.1f} {y + 20:.1f})"'
                drawn.append(_text(x + 4, y + 20, _short(row["token"], 11), ink=True, extra=turned))
            if row["kind"] == "logit":
                drawn.append(
                    _text(x, y - 12, f"{_short(row['token'], 9)} {percent(row['probability'])}", ink=True, extra=' text-anchor="middle"')
                )
        return drawn

    def _node(self, at: int, row: Mapping[Any, Any]) -> str:
        size = row["size"]
        match row["kind"]:
            case "latent":
                shape = f'<circle r="{size:.1f}"'
            case "error":
                shape = f'<rect x="{-size:.1f}" y="{-size:.1f}" width="{2 * size:.1f}" height="{2 * size:.1f}" transform="rotate(45) scale(.85)"'
            case _:
                shape = f'<rect x="{-size:.1f}" y="{-size:.1f}" width="{2 * size:.1f}" height="{2 * size:.1f}"'
        ring = "".join(
            f'<g class="ring"><circle r="{size + 3:.1f}" fill="none" stroke="{colour}" stroke-width="2.2"/></g>'
            for group, (_, members) in enumerate(self.groups)
            if row["node"] in members
            for colour in (_RINGS[group % len(_RINGS)],)
        )
        return (
            f'<g class="node {row["kind"]}" data-at="{at}" transform="translate({row["x"]:.1f} {row["y"]:.1f})"><title>{escape(said_of(row))}</title>'
            f'{ring}{shape} class="shape" fill="{_FILLS[row["kind"]]}" stroke="{_SOFT}"/></g>'
        )

    def data(self) -> dict[str, Any]:
        """Return what the page's script needs, as plain JSON values."""
        listed = [
            {
                "node": str(row["node"]),
                "kind": str(row["kind"]),
                "component": str(row["component"]),
                "layer": int(row["layer"]),
                "position": int(row["position"]),
                "token": shown(row["token"]),
                "x": round(float(row["x"]), 1),
                "y": round(float(row["y"]), 1),
                "size": round(float(row["size"]), 1),
                "value": _plain(row["value"]),
                "probability": _plain(row["probability"]),
                "influence": _plain(row["influence"]),
            }
            for row in self.nodes.to_dict("records")
        ]
        edges = [[int(row["from"]), int(row["to"]), _plain(row["weight"]), _plain(row["share"])] for row in self.edges.to_dict("records")]
        known = set(self.nodes["component"])
        return {
            "nodes": listed,
            "edges": edges,
            "drawn": EDGES_DRAWN,
            "details": {name: held for name, held in self.details.items() if name in known},
            "groups": [{"name": name, "nodes": list(nodes)} for name, nodes in self.groups],
            "rings": list(_RINGS),
            "prompt": self.prompt,
        }


_FILLS = {"latent": "#cfe3f2", "error": "#d9d9d9", "token": "#fbe3b8", "logit": "#bfe5d6"}


def graph_picture(tables: Mapping[str, pd.DataFrame]) -> GraphPicture | None:
    """Return the picture of a run's graph; None without one."""
    nodes, edges = tables.get("graph_nodes"), tables.get("graph_edges")
    if nodes is None or edges is None:
        return None
    kept = nodes[nodes["kept"].astype(bool)]
    always = kept["kind"].isin(("token", "logit"))
    most = kept[~always].nlargest(max(0, NODES_IN_PAGE - int(always.sum())), "influence", keep="first")
    own = kept[always | kept["node"].isin(most["node"])].reset_index(drop=True)
    own, size = _placed(own)
    number_of = {node: at for at, node in enumerate(own["node"])}
    inside = edges[edges["source"].isin(number_of) & edges["target"].isin(number_of)].head(EDGES_IN_PAGE)
    listed = pd.DataFrame(
        {
            "from": inside["source"].map(number_of).astype(int),
            "to": inside["target"].map(number_of).astype(int),
            "weight": inside["weight"].astype(float),
            "share": inside["share"].astype(float),
        }
    )
    grouped = tables.get("graph_groups")
    groups = [] if grouped is None else [(str(name), rows["node"].tolist()) for name, rows in grouped.groupby("group", sort=False)]
    scores = tables.get("graph_scores")
    prompt = "" if scores is None else str(scores["prompt"].iloc[0])
    return GraphPicture(own, listed, len(kept) - len(own), _details(tables), groups, prompt, size)


def _details(tables: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, Any]]:
    latents, examples = tables.get("graph_latents"), tables.get("graph_examples")
    if latents is None:
        return {}
    found: dict[str, dict[str, Any]] = {
        str(row["component"]): {
            "promotes": [shown(token) for token in row["promotes"]],
            "suppresses": [shown(token) for token in row["suppresses"]],
            "examples": [],
        }
        for row in latents.to_dict("records")
    }
    for row in [] if examples is None else examples.sort_values("place").to_dict("records"):
        if row["component"] in found:
            found[row["component"]]["examples"].append([_plain(row["value"]), *(line(row[part]) for part in ("before", "token", "after"))])
    return found


def _placed(nodes: pd.DataFrame) -> tuple[pd.DataFrame, tuple[float, float]]:
    """Give nodes their places: a column for each token, as wide as its fullest layer; a row for each layer, as high as its fullest token."""
    inner = nodes[nodes["kind"] != "logit"]
    counts = inner.groupby(["layer", "position"]).size()
    positions = sorted(inner["position"].unique())
    fullest = counts.groupby("position").max()
    widths = {at: max(_NARROWEST, _PITCH * min(_PER_LINE, int(fullest[at])) + 12) for at in positions}
    logits = int((nodes["kind"] == "logit").sum())
    width = max(560.0, _LEFT + sum(widths.values()) + 12, _LEFT + logits * _LOGIT + 12)
    lefts = dict(zip(positions, np.cumsum([0.0, *(widths[at] for at in positions)])[:-1] + _LEFT, strict=True))
    layers = sorted(inner["layer"].unique())
    lines = {layer: int(np.ceil(counts[layer].max() / _PER_LINE)) for layer in layers}
    y, middles = _TOP + 52.0, {}
    for layer in reversed(layers):
        height = _PITCH * lines[layer] + 22
        middles[layer] = y + height / 2
        y += height
    made = nodes.copy()
    largest = float(inner["influence"].max()) or 1.0
    made["size"] = 3.4 + 3.2 * np.sqrt(np.clip(made["influence"].astype(float) / largest, 0.0, 1.0))
    made.loc[made["kind"] == "logit", "size"] = 6.0
    made["x"], made["y"] = 0.0, 0.0
    for (layer, position), own in inner.groupby(["layer", "position"]):
        order = own.sort_values(["influence", "node"], ascending=[False, True]).index
        rows = int(np.ceil(len(own) / _PER_LINE))
        for place, at in enumerate(order):
            line, column = divmod(place, _PER_LINE)
            many = min(_PER_LINE, len(own) - line * _PER_LINE)
            made.loc[at, "x"] = lefts[position] + widths[position] / 2 + (column - (many - 1) / 2) * _PITCH
            made.loc[at, "y"] = middles[layer] + (line - (rows - 1) / 2) * _PITCH
    at = made.index[made["kind"] == "logit"]
    # the likeliest stands on the right, above the token that it follows
    made.loc[at, "x"] = [width - 12 - _LOGIT / 2 - place * _LOGIT for place in range(logits)]
    made.loc[at, "y"] = _TOP + 26.0
    return made, (width, y + _FOOT)


def edge_path(nodes: pd.DataFrame, row: Mapping[Any, Any]) -> str:
    """Return an edge as SVG: the wider the larger its share of what its target reads."""
    (x1, y1, r1), (x2, y2, r2) = (tuple(nodes.loc[row[end], ["x", "y", "size"]].astype(float)) for end in ("from", "to"))
    y1, y2 = y1 - r1, y2 + r2
    lift = 0.45 * (y1 - y2)
    kind, colour = ("adds", ADDS) if row["weight"] > 0 else ("takes", TAKES)
    wide = 0.6 + 5 * float(row["share"]) ** 0.6
    return (
        f'<path class="edge {kind}" d="M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 - lift:.1f} {x2:.1f} {y2 + lift:.1f} {x2:.1f} {y2:.1f}" stroke="{colour}" '
        f'stroke-width="{wide:.2f}" stroke-opacity=".45"/>'
    )


def said_of(row: Mapping[Any, Any]) -> str:
    """Return what hovering over a node says."""
    at = f"{label(row['node'])} “{_short(row['token'], 24)}”"
    influence = "" if row["kind"] == "logit" else f"\ninfluence {number(row['influence'])}"
    return at + ("" if pd.isna(row["value"]) else f"\nvalue {number(row['value'])}") + influence


def _text(x: float, y: float, text: str, *, ink: bool = False, extra: str = "") -> str:
    kind, colour = ("ink", _INK) if ink else ("soft", _SOFT)
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" font-size="11" fill="{colour}"{extra}>{escape(text)}</text>'


def _short(token: object, most: int) -> str:
    text = shown(token).strip() or "␣"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _plain(value: Any) -> float | None:
    x = float(value)
    return float(f"{x:.5g}") if np.isfinite(x) else None
