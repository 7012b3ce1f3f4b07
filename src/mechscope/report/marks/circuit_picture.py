"""The picture of a circuit: what writes to and reads from the residual stream, by layer, with the embedding at the bottom and the logits on top.

Every node has one place on a grid of layers (up) and heads (across, the MLP last and a little higher, since it reads the heads of its own layer),
so the circuits of two models can be laid over each other. An edge's width is its |score|, its colour the score's sign, and where it
enters a head says whether the head's query, key or value reads it.

The picture of the page holds the edges that its slider can show as well: they are drawn here too, in groups by the number of strongest edges from which
they are shown, and the page's script only shows and hides groups. A Vega-Lite chart with a bound parameter was tried: at 5,000 edges each step of the
slider cost it half a second before anything was painted, where showing and hiding sets some 200 attributes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from mechscope.errors import RunError
from mechscope.report.theme import CATEGORIES, FONT, interval, label, number

HOLDS, HARMS = CATEGORIES[0], CATEGORIES[3]
"""Colours of a score below zero (the edge holds the metric up) and above it: blue and vermilion, which every colour vision tells apart."""
THINNEST, WIDEST = 0.6, 7.0
"""Stroke widths of an edge without score and of the strongest edge, in pixels; between them width grows linearly with |score|."""

_NODE = re.compile(r"a(?P<layer>\d+)\.h(?P<head>\d+)(?:<(?P<part>[qkv])>)?|m(?P<mlp>\d+)")
_PORTS = {"q": -0.32, "k": 0.0, "v": 0.32}  # where a head is entered, in widths of its box
_LEFT, _TOP = 58.0, 14.0
_FAN = 0.16  # how far the edges of the embedding and of the logits spread over their wide boxes, as a share of the way to the other end
_RAISED = 0.42  # how far an MLP stands above its layer's heads, in rows
_INK, _SOFT, _LINE, _PANEL = "#1c2530", "#5b6672", "#dfe4ea", "#ffffff"


@dataclass(frozen=True)
class Grid:
    """Where everything stands, in pixels.

    Attributes:
        layers: Number of blocks.
        heads: Heads of a block.
    """

    layers: int
    heads: int

    @classmethod
    def of(cls, edges: pd.DataFrame) -> Grid:
        """Return the grid that has room for every node of a table of edges.

        Raises:
            RunError: A node has no name of this kind.
        """
        layers, heads = 0, 0
        for name in sorted({*edges["sender"], *edges["receiver"]}):
            if name in ("embed", "logits"):
                continue
            node = _NODE.fullmatch(str(name))
            if node is None:
                raise RunError(f"the table of circuit edges names {label(name)!r}, which is not embed, a3.h5, a3.h5<q>, m3 or logits")
            layers = max(layers, int(node["layer"] or node["mlp"] or 0) + 1)
            heads = max(heads, int(node["head"] or 0) + 1)
        return cls(layers, heads)

    @cached_property
    def pitch(self) -> float:
        """Distance of two columns."""
        return float(np.clip(940 / (self.heads + 1), 17, 84))

    @cached_property
    def rise(self) -> float:
        """Distance of two layers."""
        return float(np.clip(900 / (self.layers + 1), 46, 72))

    @property
    def box(self) -> tuple[float, float]:
        """Width and height of a node."""
        return 0.7 * self.pitch, 0.36 * self.rise

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the whole grid."""
        return max(560.0, _LEFT + (self.heads + 1) * self.pitch + 8), _TOP + (self.layers + 1) * self.rise + 2 * self.box[1] + 4

    @property
    def centre(self) -> float:
        """Where the embedding and the logits stand."""
        return _LEFT + (self.heads + 1) * self.pitch / 2

    def row(self, layer: int) -> float:
        """Return how far down a layer stands: −1 for the embedding, the number of layers for the logits."""
        return _TOP + self.box[1] + (self.layers - layer) * self.rise

    def place(self, node: str) -> tuple[float, float]:
        """Return the middle of a node."""
        named = _NODE.fullmatch(node)
        if named is None:
            return self.centre, self.row(-1 if node == "embed" else self.layers)
        if named["mlp"] is not None:
            return _LEFT + (self.heads + 0.5) * self.pitch, self.row(int(named["mlp"])) - _RAISED * self.rise
        return _LEFT + (int(named["head"]) + 0.5) * self.pitch, self.row(int(named["layer"]))

    def path(self, sender: str, receiver: str) -> str:
        """Return the curve of an edge as SVG writes it."""
        (x1, y1), (x2, y2), half = self.place(sender), self.place(owner(receiver)), self.box[1] / 2
        x2 += _PORTS.get(part(receiver), 0.0) * self.box[0]
        if sender == "embed":
            x1 += (x2 - x1) * _FAN
        if receiver == "logits":
            x2 += (x1 - x2) * _FAN
        y1, y2 = y1 - half, y2 + half
        # an edge straight up would hide behind the nodes between its ends
        bow = 0.6 * self.pitch * (1 if x1 < self.centre else -1) if abs(x2 - x1) < 0.6 * self.pitch and y1 - y2 > self.rise else 0.0
        lift = 0.42 * (y1 - y2)
        return f"M{x1:.1f} {y1:.1f}C{x1 + bow:.1f} {y1 - lift:.1f} {x2 + bow:.1f} {y2 + lift:.1f} {x2:.1f} {y2:.1f}"


def owner(receiver: str) -> str:
    """Return the node a receiver belongs to: `a3.h5` for `a3.h5<q>`."""
    return receiver.partition("<")[0]


def part(receiver: str) -> str:
    """Return `q`, `k` or `v` for a receiver of a head, nothing for others."""
    return receiver.partition("<")[2].rstrip(">")


def said_of(row: Mapping[Any, Any], name: str) -> str:
    """Return what hovering over an edge or a node says: its name, its score and, where the table has them, interval and q."""
    score = f"score {number(row['score'], sign=True)} {interval(row.get('low'), row.get('high'), sign=True)}".strip()
    q = row.get("q")
    return f"{label(name)}\n{score}" + ("" if q is None or pd.isna(q) else f", q = {number(q, digits=2)}")


def circuit_svg(
    edges: pd.DataFrame,
    nodes: pd.DataFrame | None = None,
    *,
    grid: Grid | None = None,
    largest: float | None = None,
    title: str = "",
    caption: str = "",
    steps: Sequence[int] = (),
) -> str:
    """Draw a circuit as SVG; equal tables give equal text.

    Args:
        edges: The edges to draw: `sender`, `receiver`, `score`, and `low`, `high` and `q` where there are any; with `steps` also `rank` (1 for the strongest
            edge of the model) and `chosen` (whether it belongs to the circuit).
        nodes: Scores of nodes (`node`, `score`, …), shown as their tint and when hovered over; None without.
        grid: Where things stand; by default just room for these edges.
        largest: The |score| drawn widest; by default the largest of these edges.
        title: Written above the picture, with `caption` under it; nothing without.
        caption: How to read it.
        steps: Numbers of strongest edges that a script may show instead of the circuit, rising. Edges then stand in groups whose `data-from` is the first
            number with which they are shown, nodes have the same attribute, and what belongs to the circuit has the class `chosen`: the page's style hides
            the rest until the script has marked the picture as `moved`.

    Raises:
        RunError: A node has no name of this kind.
    """
    grid = grid or Grid.of(edges)
    largest = largest or float(edges["score"].abs().max() if len(edges) else 0) or 1.0
    head = [] if not title else [_text(16, 26, label(title), size=15, ink=_INK, extra=' font-weight="600"')]
    if title and caption:
        head.append(_text(16, 45, label(caption), size=11.5, ink=_SOFT))
    above, (width, height), key = 58 if title else 0, grid.size, 46
    body = [_rows(grid), _edges(edges, grid, largest, steps), _nodes(edges, nodes, grid, steps), _key(largest, height + 16)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="circuit" viewBox="0 0 {width:.0f} {height + above + key:.0f}" width="{width:.0f}" '
        f'height="{height + above + key:.0f}" font-family="{escape(FONT)}" role="img" aria-label="{escape(label(title or "circuit"))}">'
        f'<rect class="ground" width="100%" height="100%" fill="{_PANEL}"/>{"".join(head)}<g transform="translate(0 {above})">{"".join(body)}</g></svg>'
    )


def _text(x: float, y: float, text: str, *, size: float, ink: str, extra: str = "") -> str:
    kind = "ink" if ink == _INK else "soft"
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{ink}"{extra}>{escape(text)}</text>'


def _rows(grid: Grid) -> str:
    """Draw the layers' numbers and lines, faintly."""
    right = _LEFT + (grid.heads + 1) * grid.pitch
    drawn = []
    for layer in range(grid.layers):
        y = grid.row(layer)
        drawn.append(f'<path class="row" d="M{_LEFT - 6:.1f} {y:.1f}H{right:.1f}" stroke="{_LINE}"/>')
        drawn.append(_text(_LEFT - 12, y + 4, f"layer {layer}", size=11, ink=_SOFT, extra=' text-anchor="end"'))
    return f"<g>{''.join(drawn)}</g>"


def _edges(edges: pd.DataFrame, grid: Grid, largest: float, steps: Sequence[int]) -> str:
    """Draw the edges, the strongest last, so that they lie on top."""
    ordered = edges.iloc[np.argsort(edges["score"].abs().to_numpy(), kind="stable")]
    drawn = [_edge(row, grid, largest) for row in ordered.to_dict("records")]
    if steps:
        shown_by = np.searchsorted(np.asarray(steps), ordered["rank"].to_numpy())  # len(steps): no step shows it
        groups = []
        for step in range(len(steps), -1, -1):
            own = "".join(drawn[place] for place in np.flatnonzero(shown_by == step))
            groups.append(f"<g{_from(steps, step)}>{own}</g>" if own else "")
        drawn = groups
    return f'<g class="edges" fill="none" stroke-linecap="round">{"".join(drawn)}</g>'


def _edge(row: Mapping[Any, Any], grid: Grid, largest: float) -> str:
    strength, holds = min(1.0, abs(row["score"]) / largest), row["score"] < 0
    said = escape(said_of(row, f"{row['sender']}->{row['receiver']}"), quote=False)
    return (
        f'<path class="edge {"holds" if holds else "harms"}{" chosen" if row.get("chosen") else ""}" '
        f'd="{grid.path(row["sender"], row["receiver"])}" stroke="{HOLDS if holds else HARMS}" '
        f'stroke-width="{THINNEST + (WIDEST - THINNEST) * strength:.3f}" stroke-opacity="{0.4 + 0.5 * strength:.2f}">'
        f"<title>{said}</title></path>"
    )


def _from(steps: Sequence[int], step: int) -> str:
    return f' data-from="{steps[step]}"' if step < len(steps) else ""


def _nodes(edges: pd.DataFrame, nodes: pd.DataFrame | None, grid: Grid, steps: Sequence[int]) -> str:
    ends = pd.concat([edges.assign(node=edges["sender"]), edges.assign(node=edges["receiver"].map(owner))])
    first = ends.groupby("node")["rank"].min() if steps else None
    chosen = set(ends.loc[ends["chosen"], "node"]) if steps else set[str]()
    scores = {} if nodes is None else {str(row["node"]): row for row in nodes.to_dict("records")}
    largest = max((abs(row["score"]) for name, row in scores.items() if name != "embed"), default=0.0) or 1.0
    drawn = []
    for name in sorted(set(ends["node"]), key=lambda node: grid.place(node)[::-1]):
        row, (x, y), (width, height) = scores.get(name), grid.place(name), grid.box
        if name in ("embed", "logits"):
            width = 2 * _FAN * grid.centre + 60
        when = "" if first is None else _from(steps, int(np.searchsorted(np.asarray(steps), first[name])))
        box = f'x="{-width / 2:.1f}" y="{-height / 2:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4"'
        tint = ""
        if row is not None:
            strength, colour = min(1.0, abs(row["score"]) / largest), "holds" if row["score"] < 0 else "harms"
            tint = f'<rect class="{colour}" {box} fill="{HOLDS if row["score"] < 0 else HARMS}" fill-opacity="{0.45 * strength:.2f}"/>'
        drawn.append(
            f'<g class="node{" chosen" if name in chosen else ""}" data-node="{escape(name)}" transform="translate({x:.1f} {y:.1f})"{when}>'
            f"<title>{escape(said_of(row, name) if row is not None else label(name))}</title>"
            f'<rect class="box" {box} fill="{_PANEL}" stroke="{_SOFT}"/>{tint}{_name(name, grid)}</g>'
        )
    return f'<g class="nodes" text-anchor="middle">{"".join(drawn)}</g>'


def _name(name: str, grid: Grid) -> str:
    """Write a node's name as its box has room for it, and the letters of a head's three entrances."""
    width, height = grid.box
    if name in ("embed", "logits"):
        return _text(0, 4, name, size=12, ink=_INK)
    size = float(np.clip(width / 4, 6.5, 12))
    # the layer stands at the row's beginning already
    short = name if width >= 40 else name.rpartition(".")[2] if width >= 20 else name.rpartition(".h")[2]
    if name.startswith("m") or width < 40 or height < 22:
        return _text(0, 0.36 * size, short, size=size, ink=_INK)
    letters = "".join(_text(share * width, height / 2 - 1.5, letter, size=7, ink=_SOFT) for letter, share in _PORTS.items())
    return _text(0, 1.5, short, size=size, ink=_INK) + letters


def _key(largest: float, y: float) -> str:
    """Draw what colours, widths and entrances mean."""
    drawn, x = [], 16.0
    for kind, colour, words in (("holds", HOLDS, "holds the metric up"), ("harms", HARMS, "pulls it down")):
        drawn.append(f'<path class="{kind}" d="M{x:.0f} {y - 4:.0f}h26" stroke="{colour}" stroke-width="4" stroke-linecap="round"/>')
        drawn.append(_text(x + 34, y, words, size=11, ink=_SOFT))
        x += 48 + 5.7 * len(words)
    for share, words in ((1.0, f"|score| {number(largest)}"), (0.25, number(largest / 4))):
        wide = THINNEST + (WIDEST - THINNEST) * share
        drawn.append(f'<path class="width" d="M{x:.0f} {y - 4:.0f}h26" stroke="{_SOFT}" stroke-width="{wide:.2f}" stroke-linecap="round"/>')
        drawn.append(_text(x + 34, y, words, size=11, ink=_SOFT))
        x += 48 + 6 * len(words)
    drawn.append(
        _text(
            16,
            y + 18,
            "An edge enters a head at its left (query), middle (key) or right (value). Tint: the node's own score.",
            size=11,
            ink=_SOFT,
        )
    )
    return f"<g>{''.join(drawn)}</g>"
