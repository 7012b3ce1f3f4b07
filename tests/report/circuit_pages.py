"""Circuits on a page: invented edges and runs, and what a picture of them draws."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pandas as pd

from mechscope.report.page import render
from tests.report import synthetic

SVG = "{http://www.w3.org/2000/svg}"


def some_edges(*names: str, scores: list[float] | None = None) -> pd.DataFrame:
    sender, receiver = zip(*(name.split("->") for name in names), strict=True)
    return pd.DataFrame({"edge": names, "sender": sender, "receiver": receiver, "score": scores or [-0.5] * len(names)})


def drawn_edges(svg: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg).iter(f"{SVG}path") if "edge" in element.get("class", "").split()]


def shown_edges(svg: str, count: int | None = None) -> list[str]:
    """Return the names of the edges that a page's picture shows, the weakest first: of its circuit, or at a stop of the slider."""
    groups = [group for group in ElementTree.fromstring(svg).iter(f"{SVG}g") if group.get("class") == "edges"]
    steps = [step for group in groups for step in group if count is None or float(step.get("data-from", "inf")) <= count]
    edges = [edge for step in steps for edge in step if count is not None or "chosen" in edge.get("class", "").split()]
    return [name_of(edge) for edge in edges]


def drawn_nodes(svg: str) -> list[str]:
    return [element.get("data-node", "") for element in _nodes(svg)]


def shown_nodes(svg: str, count: int | None = None) -> list[str]:
    """Return the nodes that a page's picture shows: of its circuit, or at a stop of the slider."""
    chosen = [element for element in _nodes(svg) if "chosen" in element.get("class", "").split()]
    shown = chosen if count is None else [element for element in _nodes(svg) if float(element.get("data-from", "inf")) <= count]
    return [element.get("data-node", "") for element in shown]


def by_title(svg: str) -> dict[str, ElementTree.Element]:
    return {name_of(element): element for element in drawn_edges(svg)}


def name_of(edge: ElementTree.Element) -> str:
    return said(edge).splitlines()[0]


def said(element: ElementTree.Element) -> str:
    """Return what hovering over an element says."""
    return str(element.findtext(f"{SVG}title"))


def _nodes(svg: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg).iter(f"{SVG}g") if "node" in element.get("class", "").split()]


def run_of(
    tmp_path: Path, kind: str, tables: dict[str, pd.DataFrame], *, title: str = "The circuit of gpt2", sections: tuple[str, ...] = ()
) -> Path:
    settings: dict[str, object] = {"model": "models/gpt2"} if kind == "circuit" else {"base": "models/gpt2", "tuned": "runs/tuned"}
    record = synthetic.manifest() | {"kind": kind, "page": {"title": title, "sections": list(sections)}}
    folder = synthetic.write_run(tmp_path / "run", tables, study=settings, record=record)
    render(folder)
    return folder
